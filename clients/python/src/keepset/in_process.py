"""libkeepset in this process through its C ABI (engine/keepset.h): decides keep sets, moves no K or V.

For calibration, where one prompt is decided with many candidate tables: no socket, no table directory,
the same engine as keepsetd's.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from keepset import _abi
from keepset.types import InputNeeds, Layer, LayerNeeds, ModelFingerprint, PagedKv, TableIdentity

_ABI_VERSION = 1
_HANDOVERS = {"together": 0, "one_by_one": 1}
_ROW_MOVES = {"gathered": 0, "in_place": 1, "stay": 2}
_BUDGET_TOKENS = 1
_POINTER = _abi.POINTER
_MOST_THREADS = 2**31 - 1
_LEGACY_STREAM = 1  # cudaStreamLegacy: in the structure NULL is no stream of the caller's


# By keepset_status, canonical codes.
_CODES = ("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
          "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED",
          "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")


class EngineError(Exception):
    """A call into libkeepset failed; `code` ("INVALID_ARGUMENT") and `message` are the library's."""

    def __init__(self, code: str, message: str):
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


@dataclasses.dataclass(frozen=True)
class TileLayer:
    """Attention tile [num_qo_heads, num_rows, seq_len] and values [num_kv_heads, seq_len, d], fp32."""

    attn_tile: np.ndarray
    v: np.ndarray


@dataclasses.dataclass(frozen=True)
class Kept:
    """keep_indices[layer][set]: one ascending set per layer, or one per KV head."""

    keep_indices: list[list[np.ndarray]]
    outside_mass: float | None
    predicted_miss_rate: float | None
    document: dict

    def sets(self) -> list:
        """Per layer the shared set, or the list of sets per KV head."""
        return [one[0] if len(one) == 1 else one for one in self.keep_indices]


@dataclasses.dataclass(frozen=True)
class Decision:
    """Ascending positions and number of candidates per layer; signals of the prompt."""

    keep_indices: list[np.ndarray]
    candidates: list[int | None]
    entropy: list[float]  # per layer; the same for all in alpha_scope global
    ppl: float | None


class Engine:
    """One engine on `backend`. Use from one thread; close it or use it as a context manager.

    Of backend cuda: window_kernels "portable", "hopper" or "cublas"; device_memory_bytes of memory for operations,
    allocated now, 0: as they need it.
    """

    def __init__(self, library: str | os.PathLike, num_threads: int = 1, backend: str = "cpu",
                 window_kernels: str = "", device_memory_bytes: int = 0):
        self._engine = _POINTER()
        self._library = ctypes.CDLL(str(library))
        self._declare()
        if self._library.keepset_abi_version() != _ABI_VERSION:
            raise EngineError("FAILED_PRECONDITION",
                              f"{library}: ABI {self._library.keepset_abi_version()}, "
                              f"want {_ABI_VERSION}")
        options = _abi.EngineOptions(
            ctypes.sizeof(_abi.EngineOptions), _abi.text(backend, "backend"),
            _abi.count("num_threads", num_threads, -1 - _MOST_THREADS, _MOST_THREADS),
            _abi.text(window_kernels, "window_kernels"),
            _abi.count("device_memory_bytes", device_memory_bytes))
        self._check(self._library.keepset_engine_create(
            ctypes.byref(options), ctypes.byref(self._engine)))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def close(self) -> None:
        if self._engine:
            self._library.keepset_engine_destroy(self._engine)
            self._engine = _POINTER()

    @property
    def version(self) -> str:
        return self._library.keepset_version().decode()

    @property
    def backend(self) -> str:
        return self._library.keepset_engine_backend(self._open_engine()).decode()

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of all policies."""
        return tuple(self._library.keepset_engine_policies(self._open_engine()).decode().split())

    def decide(self, *, model: ModelFingerprint, layers: Sequence[TileLayer], table: bytes,
               budget_tokens: int, ppl: float, parameters: Mapping[str, object] | None = None,
               protect_sink: int = 0, protect_window: int = 0) -> Decision:
        """Runs compilerkv with a table given as the bytes of its file."""
        shown = [Layer(attn_tile=one.attn_tile, v=one.v) for one in layers]
        if not shown:
            raise ValueError("layers=[], want those of the model")
        _, num_rows, seq_len = shown[0].attn_tile.shape
        spec = self._spec(model, "compilerkv", parameters)
        self._shape(spec, seq_len, num_rows, budget_tokens, None, protect_sink, protect_window)
        spec.softmax_scale, spec.kv_dtype, spec.ppl = 1.0, _abi.F32, ppl
        spec.value_head_dim = shown[0].v.shape[2]
        with self._operation(spec, table, enumerate(shown), seq_len) as result:
            document = json.loads(self._library.keepset_result_json(result))
            keep_indices = [self._indices(result, layer, 0) for layer in range(len(shown))]
        entropy = [layer.get("entropy") if layer.get("entropy") is not None
                   else document["entropy"] for layer in document["layers"]]
        return Decision(keep_indices, [layer["candidates"] for layer in document["layers"]],
                        entropy, document["ppl"])

    def keep(self, *, model: ModelFingerprint, policy: str, layers: Mapping[int, Layer],
             seq_len: int, budget_tokens: int, softmax_scale: float,
             row_positions: Sequence[int] | np.ndarray, table: bytes | None = None,
             parameters: Mapping[str, object] | None = None, scope: str | None = None,
             protect_sink: int = 0, protect_window: int = 0, ppl: float = float("nan"),
             cuda_stream: int | None = None, kv_dtype: str | None = None,
             keep_full_on_short_memory: bool = False) -> Kept:
        """Runs any policy; `layers` by index, those that the policy reads (`input_needs`).

        cuda_stream: a cudaStream_t for the operation's kernels (backend cuda); 0 is the default stream, as in
        `torch.cuda.current_stream().cuda_stream`. None: the engine's own, which waits for no other.
        kv_dtype: of the cache, where no layer shows it: "float32" by default.
        keep_full_on_short_memory: an operation for which there is no device memory keeps every position,
        outcome kept_full and reason shed, instead of EngineError RESOURCE_EXHAUSTED.
        """
        rows = _abi.integers(row_positions, np.int64, "row_positions")
        spec = self._spec(model, policy, parameters)
        self._shape(spec, seq_len, len(rows), budget_tokens, scope, protect_sink, protect_window)
        spec.row_positions = rows.ctypes.data
        spec.softmax_scale, spec.ppl = softmax_scale, ppl
        spec.kv_dtype = _kv_dtype(layers, kv_dtype)
        if cuda_stream is not None:
            spec.cuda_stream = _abi.count("cuda_stream", cuda_stream, 0) or _LEGACY_STREAM
        spec.keep_full_on_short_memory = int(bool(keep_full_on_short_memory))
        with self._operation(spec, table, sorted(layers.items()), seq_len) as result:
            document = json.loads(self._library.keepset_result_json(result))
            num_sets = self._library.keepset_result_num_sets(result)
            kept = [[self._indices(result, layer, number) for number in range(num_sets)]
                    for layer in range(model.num_layers)]
        return Kept(kept, document.get("outside_mass"), document.get("predicted_miss_rate"), document)

    def input_needs(self, *, model: ModelFingerprint, policy: str, table: bytes | None = None,
                    parameters: Mapping[str, object] | None = None) -> InputNeeds:
        """What an operation of this policy and table reads: nothing else has to be handed over."""
        spec = self._spec(model, policy, parameters)
        spec.kv_dtype = _abi.F32
        report = _POINTER()
        with self._table(table) as spec.table:
            identity = None if table is None else self._identity(spec.table)
            try:
                self._check(self._library.keepset_input_needs(
                    self._open_engine(), ctypes.byref(spec), ctypes.byref(report)))
                document = json.loads(self._library.keepset_report_json(report))
            finally:
                self._library.keepset_report_destroy(report)
        probe = document["probe"]
        return InputNeeds(
            tuple(LayerNeeds(one["layer"], one["queries"], one["keys"], one["values"],
                             tuple(one["qo_heads"]), tuple(one["kv_heads"]), one["columns"])
                  for one in document["layers"]),
            tuple(document["rows"]), document["ppl"], (probe["name"], probe["text"]) if probe else None,
            identity, document["max_rows"])

    def device_bytes(self, *, model: ModelFingerprint, policy: str, seq_len: int,
                     budget_tokens: int, num_rows: int, kv_dtype: str = "bfloat16",
                     table: bytes | None = None, parameters: Mapping[str, object] | None = None,
                     scope: str | None = None, handover: str = "together",
                     row_move: str = "gathered") -> int:
        """Bytes of device memory that one such operation takes, before there are tensors; 0 without a device.

        Memory of that fixed size (`device_memory_bytes`) holds the operation alone, with queries, K and V of the
        device in pages of 16 tokens, and no log-sum-exp. num_rows: observed rows W. handover: layers come
        "together" or "one_by_one", which takes less and more time; row_move: kept rows are "gathered" elsewhere,
        move "in_place" or "stay".
        """
        spec = self._spec(model, policy, parameters)
        self._shape(spec, seq_len, num_rows, budget_tokens, scope)
        spec.kv_dtype = _abi.choice("kv_dtype", kv_dtype, _abi.DTYPES)
        spec.softmax_scale, spec.ppl = 1.0, 1.0
        options = _abi.DeviceBytesOptions(
            ctypes.sizeof(_abi.DeviceBytesOptions), _abi.choice("handover", handover, _HANDOVERS),
            _abi.choice("row_move", row_move, _ROW_MOVES))
        found = ctypes.c_int64()
        with self._table(table) as spec.table:
            self._check(self._library.keepset_operation_device_bytes(
                self._open_engine(), ctypes.byref(spec), ctypes.byref(options), ctypes.byref(found)))
        return found.value

    def _open_engine(self) -> ctypes.c_void_p:
        if not self._engine:
            raise EngineError("FAILED_PRECONDITION", "the engine is closed")
        return self._engine

    @staticmethod
    def _spec(model: ModelFingerprint, policy: str,
              parameters: Mapping[str, object] | None) -> _abi.OperationSpec:
        listed = [(_abi.text(name, "parameter"), _abi.text(value, f"parameter {name}"))
                  for name, value in (parameters or {}).items()]
        return _abi.OperationSpec(
            struct_size=ctypes.sizeof(_abi.OperationSpec),
            model_json=json.dumps(model.to_json()).encode(), policy=_abi.text(policy, "policy"),
            parameters=(_abi.Parameter * len(listed))(*listed), num_parameters=len(listed),
            ppl=float("nan"))

    @staticmethod
    def _shape(spec: _abi.OperationSpec, seq_len: int, num_rows: int, budget_tokens: int,
               scope: str | None, protect_sink: int = 0, protect_window: int = 0) -> None:
        spec.seq_len = _abi.count("seq_len", seq_len)
        spec.num_rows = _abi.count("num_rows", num_rows)
        spec.budget_kind = _BUDGET_TOKENS
        spec.budget = _abi.count("budget_tokens", budget_tokens)
        spec.scope = None if scope is None else _abi.text(scope, "scope")
        spec.protect_sink = _abi.count("protect_sink", protect_sink)
        spec.protect_window = _abi.count("protect_window", protect_window)

    @contextlib.contextmanager
    def _operation(self, spec: _abi.OperationSpec, table: bytes | None,
                   layers: Iterable[tuple[int, Layer]], seq_len: int) -> Iterator[ctypes.c_void_p]:
        """The result of an operation that has seen `layers`; it lives inside the block."""
        operation, result = _POINTER(), _POINTER()
        with self._table(table) as spec.table:
            try:
                self._check(self._library.keepset_operation_begin(
                    self._open_engine(), ctypes.byref(spec), ctypes.byref(operation)))
                for index, layer in layers:
                    observation = _abi.Observation(index, layer, seq_len)
                    self._check(self._library.keepset_operation_observe(
                        operation, _abi.count("layer", index), ctypes.byref(observation.structure)))
                self._check(self._library.keepset_operation_finish(operation, ctypes.byref(result)))
                yield result
            finally:
                self._library.keepset_operation_destroy(operation)

    @contextlib.contextmanager
    def _table(self, table: bytes | None) -> Iterator[ctypes.c_void_p]:
        """The library takes tables from files only: every table passes the same strict reader."""
        handle = _POINTER()
        try:
            if table is not None:
                with tempfile.NamedTemporaryFile(suffix=".safetensors", dir=_scratch()) as file:
                    file.write(table)
                    file.flush()
                    self._check(self._library.keepset_table_load(
                        file.name.encode(), ctypes.byref(handle)))
            yield handle
        finally:
            self._library.keepset_table_destroy(handle)

    def _identity(self, table: ctypes.c_void_p) -> TableIdentity:
        name, version, digest = (getattr(self._library, f"keepset_table_{what}")(table).decode()
                                 for what in ("name", "version", "digest"))
        document = json.loads(self._library.keepset_table_inspect(table))
        return TableIdentity(name, version, digest, document["provenance"]["source"])

    def _indices(self, result: ctypes.c_void_p, layer: int, number: int) -> np.ndarray:
        indices, count = ctypes.POINTER(ctypes.c_int32)(), ctypes.c_int64()
        self._check(self._library.keepset_result_keep_indices(
            result, ctypes.c_int64(layer), ctypes.c_int64(number), ctypes.byref(indices),
            ctypes.byref(count)))
        if not count.value:
            return np.empty(0, np.int32)
        return np.ctypeslib.as_array(indices, (count.value,)).copy()

    def _check(self, status: int) -> None:
        if status != 0:
            raise EngineError(_CODES[status] if 0 < status < len(_CODES) else "UNKNOWN",
                              self._library.keepset_last_error().decode(errors="replace"))

    def _declare(self) -> None:
        for name in ("version", "last_error", "engine_backend", "engine_policies", "result_json"):
            getattr(self._library, f"keepset_{name}").restype = ctypes.c_char_p
        self._library.keepset_engine_backend.argtypes = [_POINTER]
        self._library.keepset_engine_policies.argtypes = [_POINTER]
        self._library.keepset_result_json.argtypes = [_POINTER]
        self._library.keepset_result_num_sets.argtypes = [_POINTER]
        self._library.keepset_result_num_sets.restype = ctypes.c_int64
        self._library.keepset_report_json.argtypes = [_POINTER]
        self._library.keepset_report_json.restype = ctypes.c_char_p
        self._library.keepset_input_needs.argtypes = [_POINTER, _POINTER, _POINTER]
        self._library.keepset_operation_device_bytes.argtypes = [
            _POINTER, _POINTER, _POINTER, _POINTER]
        for name in ("name", "version", "digest", "inspect"):
            function = getattr(self._library, f"keepset_table_{name}")
            function.argtypes, function.restype = [_POINTER], ctypes.c_char_p
        for name in ("engine", "table", "operation", "report"):
            function = getattr(self._library, f"keepset_{name}_destroy")
            function.argtypes, function.restype = [_POINTER], None
        self._library.keepset_operation_observe.argtypes = [_POINTER, ctypes.c_int64, _POINTER]
        self._library.keepset_operation_begin.argtypes = [_POINTER, _POINTER, _POINTER]
        self._library.keepset_operation_finish.argtypes = [_POINTER, _POINTER]
        self._library.keepset_result_keep_indices.argtypes = [
            _POINTER, ctypes.c_int64, ctypes.c_int64, _POINTER, _POINTER]


def _scratch() -> str | None:
    """A folder in memory where there is one: candidate tables live for a millisecond."""
    return "/dev/shm" if os.access(pathlib.Path("/dev/shm"), os.W_OK) else None


def _kv_dtype(layers: Mapping[int, Layer], name: str | None) -> int:
    """keepset_dtype of the cache: what the first layer with K or V shows, else `name`."""
    for index, layer in layers.items():
        for field, kv in (("k", layer.k), ("v", layer.v)):
            if kv is not None:
                data, own = (kv.data, kv.dtype) if isinstance(kv, PagedKv) else (kv, None)
                return _abi.dtype_of(data, own or layer.dtype, f"layer {index}: {field}")
    return _abi.choice("kv_dtype", name or "float32", _abi.DTYPES)
