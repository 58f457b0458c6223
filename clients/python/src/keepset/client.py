"""Typed client of keepsetd."""

from __future__ import annotations

import os
import queue
import threading
import uuid
from typing import Iterator, Literal, Mapping, Sequence

import grpc
import numpy as np

from keepset import _codec, types
from keepset._side_socket import SideSocket
from keepset.errors import InvalidInput, KeepsetError, error_of, error_of_rpc
from keepset.memory import SharedRegion
from keepset.v1 import (
    common_pb2,
    compression_pb2,
    compression_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
)

TransportName = Literal["auto", "memfd", "inline"]

_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Client:
    """One session with a server. Calls may come from several threads; arrays are the caller's.

    `transport` says how tensors travel: "memfd" by descriptor, "inline" in the message, "auto" memfd when
    the server passes descriptors. The choice made is `client.transport`, never silent.
    """

    def __init__(self, channel: grpc.Channel, transport: TransportName, timeout_seconds: float,
                 engine: str):
        self._channel = channel
        self._timeout = timeout_seconds
        self._compression = compression_pb2_grpc.CompressionServiceStub(channel)
        self._sessions = session_pb2_grpc.SessionServiceStub(channel)
        self._server = server_pb2_grpc.ServerServiceStub(channel)
        self._regions: list[tuple[SharedRegion, str]] = []
        self._spare: list[SharedRegion] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._side: SideSocket | None = None
        self._client_uuid = uuid.uuid4().bytes
        opened = self._call(
            self._sessions.OpenSession,
            session_pb2.OpenSessionRequest(
                client_uuid=self._client_uuid, engine=engine, pid_hint=os.getpid()
            ),
        )
        self.session_id = opened.session_id
        self.transport = "inline"
        if transport != "inline":
            if opened.side_socket_path:
                self._side = SideSocket(
                    opened.side_socket_path, opened.side_socket_token, timeout_seconds
                )
                self.transport = "memfd"
            elif transport == "memfd":
                raise KeepsetError(
                    "FAILED_PRECONDITION", "the server passes no descriptors; use transport='inline'"
                )
        self._beat = threading.Thread(
            target=self._keep_alive, args=(max(1, opened.heartbeat_seconds),), daemon=True
        )
        self._beat.start()

    @staticmethod
    def connect(address: str, *, transport: TransportName = "auto", timeout_seconds: float = 30.0,
                engine: str = "python") -> Client:
        """Opens a session. `address`: "unix:/path" or "host:port". Raises Unreachable."""
        channel = grpc.insecure_channel(address, options=_UNLIMITED)
        try:
            return Client(channel, transport, timeout_seconds, engine)
        except BaseException:
            channel.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def close(self) -> None:
        """Ends the session; the server releases all of its regions."""
        if self._closed.is_set():
            return
        self._closed.set()
        try:
            self._call(
                self._sessions.CloseSession,
                session_pb2.CloseSessionRequest(session_id=self.session_id),
            )
        except KeepsetError:
            pass  # The hang-up below ends the session as well.
        if self._side is not None:
            self._side.close()
        self._beat.join()
        self._channel.close()
        for region, _ in self._regions:
            region.close()

    # ---- memory

    def shared_region(self, num_bytes: int, *, writable_by_server: bool = False) -> SharedRegion:
        """A new registered memory region; arrays made in it travel by reference."""
        if self._side is None:
            raise KeepsetError("FAILED_PRECONDITION", "shared regions need transport 'memfd'")
        region = SharedRegion(num_bytes)
        try:
            token = self._side.pass_fd(region.fd)
            with self._lock:
                name = f"region-{len(self._regions)}"
            registered = self._call(
                self._sessions.RegisterRegion,
                session_pb2.RegisterRegionRequest(
                    session_id=self.session_id,
                    name=f"{name}-{uuid.uuid4().hex[:8]}",
                    kind="memfd",
                    fd_token=token,
                    allocation_bytes=region.size_bytes,
                    length=region.size_bytes,
                    access=session_pb2.REGION_ACCESS_READ_WRITE
                    if writable_by_server
                    else session_pb2.REGION_ACCESS_READ_ONLY,
                ),
            )
        except BaseException:
            region.close()
            raise
        with self._lock:
            self._regions.append((region, registered.region_id))
        return region

    def retire(self, region: SharedRegion) -> None:
        """Unregisters a region; returns when no operation uses it any more."""
        with self._lock:
            found = next((r for r in self._regions if r[0] is region), None)
        if found is None:
            raise InvalidInput("INVALID_ARGUMENT", "this region is not registered with this client")
        self._call(
            self._sessions.RetireRegion,
            session_pb2.RetireRegionRequest(session_id=self.session_id, region_id=found[1]),
        )
        with self._lock:
            self._regions.remove(found)
        region.close()

    # ---- server

    def server_info(self) -> server_pb2.GetServerInfoResponse:
        """Version, transports, policies, limits and active tables of the server."""
        return self._call(self._server.GetServerInfo, server_pb2.GetServerInfoRequest())

    # ---- operations

    def compress(self, *, layers: Sequence[types.Layer], **spec) -> types.Result:
        """One operation in one call. Keywords are those of `begin`."""
        operation = _Request(self, **spec)
        # The first layer completes the spec, so the inputs are built before it.
        inputs = [operation.layer_input(index, layer) for index, layer in enumerate(layers)]
        request = compression_pb2.CompressRequest(spec=operation.spec, layers=inputs)
        response = self._call(self._compression.Compress, request)
        return operation.result(response.result)

    def begin(self, **spec) -> Operation:
        """Starts an operation on a stream: `observe` each layer as it is computed, then `finish`.

        model: ModelFingerprint. seq_len: T. softmax_scale. policy: name; parameters: mapping.
        budget: Budget, default the table's. scope: name, default the policy's own.
        num_rows / row_positions: the observed rows, default the last W of q_window or attn_tile.
        protect_sink, protect_window, protect_spans: positions that stay, inside the budget.
        ppl or window_logprobs: the prompt signal a gated table needs. table: TablePin.
        shadow: decide and report only. gather: also return compacted K and V.
        deadline_ms: past it the outcome is kept_full. request_id: for the log.
        """
        return Operation(_Request(self, **spec))

    # ---- inside

    def _call(self, method, request):
        try:
            return method(request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise error_of_rpc(error) from error

    def _keep_alive(self, seconds: float) -> None:
        def beats() -> Iterator[session_pb2.LeaseBeat]:
            while not self._closed.is_set():
                yield session_pb2.LeaseBeat(session_id=self.session_id)
                self._closed.wait(seconds)

        try:
            for _ in self._sessions.Lease(beats()):
                if self._closed.is_set():
                    return
        except grpc.RpcError:
            return  # A lost server shows at the next call.

    def _slice_of(self, array: np.ndarray) -> common_pb2.RegionSlice | None:
        num_bytes = _codec.span_bytes(array)
        with self._lock:
            regions = list(self._regions)
        for region, region_id in regions:
            offset = region.offset_of(array)
            if offset is not None:
                return common_pb2.RegionSlice(region_id=region_id, offset=offset, length=num_bytes)
        return None

    def _take_spare(self, num_bytes: int) -> SharedRegion:
        """A read-write region of at least num_bytes for results or copied inputs, from the pool."""
        with self._lock:
            for region in self._spare:
                if region.size_bytes >= num_bytes:
                    self._spare.remove(region)
                    region.reset()
                    return region
        return self.shared_region(num_bytes, writable_by_server=True)

    def _give_spare(self, region: SharedRegion) -> None:
        with self._lock:
            self._spare.append(region)


class _Request:
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
        budget: types.Budget = types.Budget(),
        scope: str | None = None,
        protect_sink: int = 0,
        protect_window: int = 0,
        protect_spans: Sequence[types.Span] = (),
        ppl: float | None = None,
        window_logprobs: Sequence[float] | np.ndarray | None = None,
        table: types.TablePin = types.TablePin(),
        shadow: bool = False,
        gather: bool = False,
        deadline_ms: int = 0,
        request_id: str = "",
        request_generation: int = 0,
        kv_dtype: str | None = None,
        value_head_dim: int = 0,
    ):
        self._client = client
        self._model = model
        self._budget = budget
        self._gather = gather and not shadow
        self._kv_dtype = kv_dtype
        self._regions: list[SharedRegion] = []
        self._outputs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._inputs: dict[int, types.Layer] = {}
        self._value_head_dim = value_head_dim or model.head_dim
        gather_mode = compression_pb2.GATHER_NONE
        if self._gather:
            gather_mode = (
                compression_pb2.GATHER_DESTINATION
                if client.transport == "memfd"
                else compression_pb2.GATHER_INLINE
            )
        self.spec = compression_pb2.OperationSpec(
            session_id=client.session_id,
            request_id=request_id,
            request_generation=request_generation,
            model=_codec.fingerprint_message(model),
            seq_len=seq_len,
            num_rows=num_rows or (len(row_positions) if row_positions is not None else 0),
            row_positions=[int(p) for p in row_positions] if row_positions is not None else [],
            softmax_scale=softmax_scale,
            value_head_dim=value_head_dim,
            policy=policy,
            parameters={name: str(value) for name, value in (parameters or {}).items()},
            budget=_codec.budget_message(budget),
            scope=_codec.scope_value(scope),
            protect_sink=protect_sink,
            protect_window=protect_window,
            protect_spans=[
                compression_pb2.Span(name=s.name, begin=s.begin, end=s.end) for s in protect_spans
            ],
            ppl=ppl,
            window_logprobs=[float(p) for p in window_logprobs] if window_logprobs is not None else [],
            table=compression_pb2.TablePin(
                name=table.name, version=table.version, digest=table.digest
            ),
            mode=compression_pb2.MODE_SHADOW if shadow else compression_pb2.MODE_DECIDE,
            gather=gather_mode,
            deadline_ms=deadline_ms,
        )

    def describe(self, layer: types.Layer) -> None:
        """Completes the spec by what the first layer shows: dtype of K, number of rows."""
        if self.spec.kv_dtype == common_pb2.DTYPE_UNSPECIFIED:
            kv = layer.k if layer.k is not None else layer.v
            if kv is not None:
                data = kv.data if isinstance(kv, types.PagedKv) else kv
                name = (kv.dtype if isinstance(kv, types.PagedKv) else None) or layer.dtype
                self.spec.kv_dtype = _codec.dtype_of(data, name or self._kv_dtype)
            else:
                self.spec.kv_dtype = common_pb2.DTYPE_F32
        if self.spec.num_rows == 0:
            rows = layer.attn_tile if layer.attn_tile is not None else layer.q_window
            self.spec.num_rows = 0 if rows is None else rows.shape[1]

    def layer_input(self, index: int, layer: types.Layer) -> compression_pb2.LayerInput:
        if index == 0:
            self.describe(layer)
        message = compression_pb2.LayerInput(layer=index)
        where = f"layer {index}"
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
            message.lse_base = compression_pb2.LSE_BASE_E
        for field, kv in (("k", layer.k), ("v", layer.v)):
            if kv is not None:
                data = kv.data if isinstance(kv, types.PagedKv) else kv
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
                self._client._give_spare(region)

        if self._outputs and result.outcome == "compressed":
            result._release = release
        else:
            release()
        return result

    def _dtype(self, array: np.ndarray, layer: types.Layer) -> str | None:
        return (layer.dtype or self._kv_dtype) if array.dtype == np.uint16 else None

    def _data(self, array: np.ndarray) -> common_pb2.TensorData:
        if self._client.transport == "memfd":
            found = self._client._slice_of(array)
            if found is None:
                # One copy into a registered region; arrays that lie in one already need none.
                num_bytes = _codec.span_bytes(array)
                region = self._client._take_spare(num_bytes)
                self._regions.append(region)
                copy = region.empty((num_bytes,), np.uint8)
                copy[:] = _raw(array, num_bytes)
                found = self._client._slice_of(copy)
            return common_pb2.TensorData(region=found)
        return common_pb2.TensorData(inline=_raw(array, _codec.span_bytes(array)).tobytes())

    def _destine(self, index: int, layer: types.Layer, message) -> None:
        if layer.k is None or layer.v is None:
            raise InvalidInput("INVALID_ARGUMENT", f"layer {index}: gather needs k and v")
        k_data = layer.k.data if isinstance(layer.k, types.PagedKv) else layer.k
        heads, dim, item = self._model.num_kv_heads, self._model.head_dim, k_data.itemsize
        capacity = self._budget.capacity(
            self.spec.seq_len, heads * (dim + self._value_head_dim) * item
        )
        capacity = max(1, capacity)
        num_bytes = heads * capacity * (dim + self._value_head_dim) * item
        region = self._client._take_spare(num_bytes + 128)
        self._regions.append(region)
        k = region.empty((heads, capacity, dim), k_data.dtype)
        v = region.empty((heads, capacity, self._value_head_dim), k_data.dtype)
        for field, array in (("k", k), ("v", v)):
            data = common_pb2.TensorData(region=self._client._slice_of(array))
            tensor = _codec.kv_tensor(data, array, self._dtype(array, layer), field)
            getattr(message.destination, field).CopyFrom(tensor)
        message.destination.capacity_tokens = capacity
        self._outputs[index] = (k, v)

    def _attach(self, result: types.Result, index: int, layer: types.LayerKept, message) -> None:
        if result.outcome != "compressed":
            # Nothing was moved: the caller's own cache is the answer.
            layer.k, layer.v = self._inputs[index].k, self._inputs[index].v
            return
        counts = [len(one.indices) for one in layer.sets]
        for name in ("k", "v"):
            dim = self._model.head_dim if name == "k" else self._value_head_dim
            if index in self._outputs:
                full = self._outputs[index][0 if name == "k" else 1]
                heads = [full[g, : counts[g % len(counts)]] for g in range(full.shape[0])]
                value = full[:, : counts[0]] if len(counts) == 1 else heads
            else:
                source = self._inputs[index].k
                data = source.data if isinstance(source, types.PagedKv) else source
                flat = np.frombuffer(getattr(message, name), dtype=data.dtype)
                if len(counts) == 1:
                    value = flat.reshape(self._model.num_kv_heads, counts[0], dim)
                else:
                    ends = np.cumsum([n * dim for n in counts])
                    value = [part.reshape(-1, dim) for part in np.split(flat, ends[:-1])]
            setattr(layer, name, value)


def _raw(array: np.ndarray, num_bytes: int) -> np.ndarray:
    """The bytes from the first to the last element, gaps included, as a view."""
    return np.lib.stride_tricks.as_strided(
        array.reshape(-1)[:1].view(np.uint8) if array.flags.c_contiguous else _first_bytes(array),
        shape=(num_bytes,),
        strides=(1,),
    )


def _first_bytes(array: np.ndarray) -> np.ndarray:
    first = np.lib.stride_tricks.as_strided(array, shape=(1,), strides=(array.itemsize,))
    return first.view(np.uint8)


class Operation:
    """One operation on its own stream. Use from one thread.

    A reader thread takes credits and the reply; `observe` waits while the server grants no credit.
    """

    def __init__(self, request: _Request):
        self._request = request
        self._next_layer = 0
        self._outgoing: queue.SimpleQueue = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._credit = 0
        self._result: compression_pb2.OperationResult | None = None
        self._error: KeepsetError | None = None
        self._early: dict[int, types.LayerKept] = {}
        self._call = request._client._compression.CompressStream(
            iter(self._outgoing.get, None), timeout=request._client._timeout
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def observe(self, layer: types.Layer) -> None:
        """Sends the next layer. Raises what the server answered when it refused an earlier one."""
        message = self._request.layer_input(self._next_layer, layer)
        if self._next_layer == 0:
            self._send(begin=self._request.spec)
        with self._changed:
            self._changed.wait_for(lambda: self._credit > 0 or self._ended())
            if self._error is not None:
                raise self._error
            self._credit -= 1
        self._send(layer=message)
        self._next_layer += 1

    def early_result(self, layer: int) -> types.LayerKept | None:
        """The keep set of a layer that a layer-local policy has answered already."""
        with self._changed:
            return self._early.get(layer)

    def finish(self) -> types.Result:
        """Ends the operation and waits for its result."""
        if self._next_layer == 0:
            self.cancel()
            raise InvalidInput("INVALID_ARGUMENT", "no layer was observed")
        self._send(end=compression_pb2.OperationEnd())
        with self._changed:
            self._changed.wait_for(self._ended)
        self.cancel()
        if self._result is None:
            assert self._error is not None
            raise self._error
        return self._request.result(self._result)

    def cancel(self) -> None:
        """Gives the operation up; idempotent."""
        self._outgoing.put(None)
        self._call.cancel()
        self._reader.join()

    def _ended(self) -> bool:
        return self._result is not None or self._error is not None

    def _send(self, **step) -> None:
        self._outgoing.put(compression_pb2.StreamRequest(operation_id=1, **step))

    def _read(self) -> None:
        error = KeepsetError("UNAVAILABLE", "the stream ended without a result")
        try:
            for response in self._call:
                with self._changed:
                    self._take(response)
                    self._changed.notify_all()
        except grpc.RpcError as failed:
            error = error_of_rpc(failed)
        with self._changed:
            if not self._ended():
                self._error = error
            self._changed.notify_all()

    def _take(self, response: compression_pb2.StreamResponse) -> None:
        step = response.WhichOneof("step")
        if step == "credit":
            self._credit += response.credit.layer_inputs
        elif step == "layer":
            seq_len = self._request.spec.seq_len
            self._early[response.layer.layer] = _codec.layer_kept(response.layer, seq_len)
        elif step == "result":
            self._result = response.result
        elif step == "error":
            self._error = error_of(response.error.code, response.error.message)
