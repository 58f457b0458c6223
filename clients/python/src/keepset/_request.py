"""Builds the messages of one operation and reads its result."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from keepset import _codec, types
from keepset.errors import InvalidInput, KeepsetError, NotFound, Overloaded, Refused
from keepset.memory import SharedRegion
from keepset.v1 import common_pb2, compression_pb2

if TYPE_CHECKING:
    from keepset.client import Client


# Errors with which the server has let go of the operation, or never saw it.
_ENDED = (InvalidInput, NotFound, Refused, Overloaded, ValueError, TypeError)


class Request:
    """Builds the messages of one operation and reads its result."""

    def __init__(
        self,
        client: Client,
        *,
        model: types.ModelFingerprint,
        seq_len: int,
        policy: str,
        softmax_scale: float = 0.0,
        num_rows: int | None = None,
        row_positions: Sequence[int] | None = None,
        parameters: Mapping[str, object] | None = None,
        budget: types.Budget = types.Budget.table_default(),  # noqa: B008 - frozen
        scope: str | None = None,
        protect_sink: int = 0,
        protect_window: int = 0,
        protect_spans: Sequence[types.Span] = (),
        ppl: float | None = None,
        window_logprobs: Sequence[float] | np.ndarray | None = None,
        table: types.TablePin = types.TablePin(),  # noqa: B008 - frozen
        shadow_table: types.TablePin | None = None,
        shadow: bool = False,
        gather: bool | str = False,
        shared_prefix_tokens: int = 0,
        layer_groups: Sequence[types.LayerGroup] = (),
        deadline_ms: int = 0,
        request_id: str = "",
        request_generation: int = 0,
        kv_dtype: str | None = None,
        value_head_dim: int = 0,
    ):
        self._client = client
        self._model = model
        self._budget = budget
        if gather not in (False, True, "in_place"):
            raise ValueError(f"gather {gather!r}, want False, True or 'in_place'")
        self._gather = bool(gather) and not shadow
        self._in_place = self._gather and gather == "in_place"
        self._kv_dtype = kv_dtype
        self._described = False
        self._regions: list[SharedRegion] = []
        self._outputs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._inputs: dict[int, types.Layer] = {}
        self._value_head_dim = value_head_dim or model.head_dim
        positions = [_codec.unsigned(f"row_positions[{i}]", position)
                     for i, position in enumerate(() if row_positions is None else row_positions)]
        gather_mode = compression_pb2.GATHER_NONE
        if self._in_place:
            if client.transport != "memfd":
                raise InvalidInput(
                    "INVALID_ARGUMENT",
                    f"gather='in_place' over transport '{client.transport}', want 'memfd' and arrays "
                    "in a region that the server may write")
            gather_mode = compression_pb2.GATHER_IN_PLACE
        elif self._gather:
            gather_mode = (
                compression_pb2.GATHER_DESTINATION
                if client.transport == "memfd"
                else compression_pb2.GATHER_INLINE
            )
        self.spec = compression_pb2.OperationSpec(
            session_id=client.session_id,
            request_id=request_id,
            request_generation=_codec.unsigned("request_generation", request_generation),
            model=_codec.fingerprint_message(model),
            seq_len=_codec.unsigned("seq_len", seq_len),
            num_rows=_codec.unsigned("num_rows", num_rows or len(positions)),
            row_positions=positions,
            softmax_scale=softmax_scale,
            value_head_dim=_codec.unsigned("value_head_dim", value_head_dim),
            policy=policy,
            parameters={name: str(value) for name, value in (parameters or {}).items()},
            budget=_codec.budget_message(budget),
            scope=_codec.scope_value(scope),
            protect_sink=_codec.unsigned("protect_sink", protect_sink),
            protect_window=_codec.unsigned("protect_window", protect_window),
            protect_spans=[
                compression_pb2.Span(
                    name=s.name, begin=_codec.unsigned(f"protect_spans: {s.name}: begin", s.begin),
                    end=_codec.unsigned(f"protect_spans: {s.name}: end", s.end))
                for s in protect_spans
            ],
            ppl=ppl,
            window_logprobs=[float(p) for p in window_logprobs] if window_logprobs is not None else [],
            table=_codec.pin_message(table),
            shadow_table=_codec.pin_message(shadow_table) if shadow_table is not None else None,
            mode=compression_pb2.MODE_SHADOW if shadow else compression_pb2.MODE_DECIDE,
            gather=gather_mode,
            deadline_ms=_codec.unsigned("deadline_ms", deadline_ms, 32),
            shared_prefix_tokens=_codec.unsigned("shared_prefix_tokens", shared_prefix_tokens),
            layer_groups=[_codec.group_message(group) for group in layer_groups],
        )

    @property
    def client_stub(self):
        return self._client.compression_stub

    @property
    def timeout_seconds(self) -> float:
        return self._client.timeout_seconds

    def describe(self, layer: types.Layer) -> None:
        """Completes the spec by what the first layer shows: dtype of K, number of rows."""
        if self.spec.kv_dtype == common_pb2.DTYPE_UNSPECIFIED:
            kv = layer.k if layer.k is not None else layer.v
            if kv is not None:
                data = _array_of(kv)
                own = kv.dtype if isinstance(kv, types.PagedKv) else None
                self.spec.kv_dtype = _codec.dtype_of(data, own or self._dtype(data, layer))
            else:
                self.spec.kv_dtype = common_pb2.DTYPE_F32
        if self.spec.num_rows == 0:
            rows = layer.attn_tile if layer.attn_tile is not None else layer.q_window
            self.spec.num_rows = 0 if rows is None else rows.shape[1]

    def complete(self) -> None:
        """The spec of an operation that may have got no layer: its cache is of the dtype that was stated."""
        if self.spec.kv_dtype == common_pb2.DTYPE_UNSPECIFIED and self._kv_dtype is not None:
            self.spec.kv_dtype = _codec.dtype_named(self._kv_dtype)

    def layer_input(self, index: int, layer: types.Layer) -> compression_pb2.LayerInput:
        if not self._described:
            self.describe(layer)
            self._described = True
        message = compression_pb2.LayerInput(layer=_codec.unsigned("layer", index, 32))
        where = f"layer {index}"
        if layer.qo_heads is not None:
            message.qo_heads.extend(
                _codec.unsigned(f"{where}: qo_heads", head, 32) for head in layer.qo_heads)
        for field, array in (("q_window", layer.q_window), ("attn_tile", layer.attn_tile)):
            if array is not None:
                tensor = _codec.rows_tensor(
                    self._data(array), array, self._dtype(array, layer), f"{where}: {field}"
                )
                getattr(message, field).CopyFrom(tensor)
        if layer.window_lse is not None:
            lse = layer.window_lse
            message.window_lse.CopyFrom(
                _codec.rows_tensor(self._data(lse), lse, self._dtype(lse, layer), f"{where}: window_lse")
            )
            message.lse_base = _codec.lse_base(layer.lse_base, where)
        if layer.column_stats is not None:
            columns = layer.column_stats
            what = f"{where}: column_stats"
            if columns.ndim != 2:
                raise ValueError(f"{what}: {columns.ndim} dimensions, want 2 [num_qo_heads, seq_len]")
            message.column_stats.CopyFrom(_codec.rows_tensor(
                self._data(columns), columns, self._dtype(columns, layer), what))
            message.column_reduction = _codec.column_reduction(layer.column_reduction, what)
        for field, kv in (("k", layer.k), ("v", layer.v)):
            if kv is not None:
                data = _array_of(kv)
                if self._in_place and self._client.slice_of(data) is None:
                    raise InvalidInput(
                        "INVALID_ARGUMENT",
                        f"{where}: {field} lies in no registered region, gather='in_place' would move "
                        "the rows of a copy")
                tensor = _codec.kv_tensor(
                    self._data(data), kv, self._dtype(data, layer), f"{where}: {field}"
                )
                getattr(message, field).CopyFrom(tensor)
        if self._gather:
            self._inputs[index] = layer
            if self.spec.gather == compression_pb2.GATHER_DESTINATION:
                self._destine(index, layer, message)
        return message

    def result(self, message: compression_pb2.OperationResult) -> types.Result:
        result = _codec.result_of(message)
        if self._gather:
            for index, layer in enumerate(result.layers):
                self._attach(result, index, layer, message.layers[index])
        regions, self._regions = self._regions, []

        def release() -> None:
            for region in regions:
                self._client.give_spare(region)

        if self._outputs and result.outcome == "compressed":
            result._release = release
        else:
            release()
        return result

    def abandon(self, error: BaseException | None = None) -> None:
        """Gives up the memory of an operation that has no result; `error`: why, None: it was cancelled.

        What the server may still be using is not used again: it is retired.
        """
        regions, self._regions = self._regions, []
        has_ended = isinstance(error, _ENDED)
        for region in regions:
            if has_ended:
                self._client.give_spare(region)
                continue
            # A server that does not answer frees it with the session.
            with contextlib.suppress(KeepsetError):
                self._client.retire(region)

    def _dtype(self, array: np.ndarray, layer: types.Layer) -> str | None:
        return (layer.dtype or self._kv_dtype) if array.dtype == np.uint16 else None

    def _data(self, array: np.ndarray) -> common_pb2.TensorData:
        if self._client.transport == "memfd":
            found = self._client.slice_of(array)
            if found is None:
                # One copy into a registered region; arrays that lie in one already need none.
                num_bytes = _codec.span_bytes(array)
                region = self._client.take_spare(num_bytes)
                self._regions.append(region)
                copy = region.empty((num_bytes,), np.uint8)
                copy[:] = raw_bytes(array, num_bytes)
                found = self._client.slice_of(copy)
            return common_pb2.TensorData(region=found)
        return common_pb2.TensorData(inline=raw_bytes(array, _codec.span_bytes(array)).tobytes())

    def _destine(self, index: int, layer: types.Layer, message) -> None:
        if layer.k is None or layer.v is None:
            raise InvalidInput("INVALID_ARGUMENT", f"layer {index}: gather needs k and v")
        k_data = _array_of(layer.k)
        heads, dim, item = self._model.num_kv_heads, self._model.head_dim, k_data.itemsize
        capacity = self._budget.capacity(
            self.spec.seq_len, heads * (dim + self._value_head_dim) * item
        )
        capacity = max(1, capacity)
        num_bytes = heads * capacity * (dim + self._value_head_dim) * item
        region = self._client.take_spare(num_bytes + 128)
        self._regions.append(region)
        k = region.empty((heads, capacity, dim), k_data.dtype)
        v = region.empty((heads, capacity, self._value_head_dim), k_data.dtype)
        for field, array in (("k", k), ("v", v)):
            data = common_pb2.TensorData(region=self._client.slice_of(array))
            tensor = _codec.kv_tensor(data, array, self._dtype(array, layer), field)
            getattr(message.destination, field).CopyFrom(tensor)
        message.destination.capacity_tokens = capacity
        self._outputs[index] = (k, v)

    def _attach(self, result: types.Result, index: int, layer: types.LayerKept,
                message: compression_pb2.LayerResult) -> None:
        if result.outcome != "compressed":
            # Nothing was moved: the caller's own cache is the answer.
            layer.k, layer.v = self._inputs[index].k, self._inputs[index].v
            return
        counts = [len(one.indices) for one in layer.sets]
        if self._in_place:
            for name in ("k", "v"):
                setattr(layer, name, _front_rows(getattr(self._inputs[index], name), counts))
            return
        for name in ("k", "v"):
            dim = self._model.head_dim if name == "k" else self._value_head_dim
            if index in self._outputs:
                full = self._outputs[index][0 if name == "k" else 1]
                if len(counts) == 1:
                    setattr(layer, name, full[:, : counts[0]])
                else:
                    setattr(layer, name, [full[g, :n] for g, n in enumerate(counts)])
                continue
            flat = np.frombuffer(getattr(message, name), dtype=_array_of(self._inputs[index].k).dtype)
            if len(counts) == 1:
                setattr(layer, name, flat.reshape(self._model.num_kv_heads, counts[0], dim))
            else:
                ends = np.cumsum([n * dim for n in counts])
                parts = [part.reshape(-1, dim) for part in np.split(flat, ends[:-1])]
                setattr(layer, name, parts)


def _array_of(kv: np.ndarray | types.PagedKv | None) -> np.ndarray:
    if kv is None:
        raise InvalidInput("INVALID_ARGUMENT", "gather needs k and v")
    return kv.data if isinstance(kv, types.PagedKv) else kv


def _front_rows(kv: np.ndarray | types.PagedKv, counts: Sequence[int]):
    """The first rows of a cache: one array, one per KV head, or the blocks that hold them."""
    if isinstance(kv, types.PagedKv):
        blocks = -(-max(counts) // kv.data.shape[1])
        return types.PagedKv(kv.data, kv.block_table[:blocks], kv.dtype)
    return kv[:, : counts[0]] if len(counts) == 1 else [kv[g, :n] for g, n in enumerate(counts)]


def raw_bytes(array: np.ndarray, num_bytes: int) -> np.ndarray:
    """The bytes from the first to the last element, gaps included, as a view."""
    return np.lib.stride_tricks.as_strided(
        array.reshape(-1)[:1].view(np.uint8) if array.flags.c_contiguous else _first_bytes(array),
        shape=(num_bytes,),
        strides=(1,),
    )


def _first_bytes(array: np.ndarray) -> np.ndarray:
    first = np.lib.stride_tricks.as_strided(array, shape=(1,), strides=(array.itemsize,))
    return first.view(np.uint8)
