"""libkeepset in this process through its C ABI (engine/keepset.h): decides keep sets, moves no K or V.

For calibration, where one prompt is decided with many candidate tables: no socket, no table directory,
the same engine as keepsetd's.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np

from keepset.types import ModelFingerprint

_ABI_VERSION = 1
_F32 = 1
_DTYPES = {"float32": _F32, "float16": 2, "bfloat16": 3}
_HANDOVERS = {"together": 0, "one_by_one": 1}
_ROW_MOVES = {"gathered": 0, "in_place": 1, "stay": 2}
_BUDGET_TOKENS = 1
_POINTER = ctypes.c_void_p


class _KvView(ctypes.Structure):
    _fields_ = [
        ("data", _POINTER), ("size_bytes", ctypes.c_int64), ("dtype", ctypes.c_int32),
        ("reserved", ctypes.c_int32), ("num_kv_heads", ctypes.c_int64), ("seq_len", ctypes.c_int64),
        ("head_dim", ctypes.c_int64), ("head_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64), ("block_size", ctypes.c_int64),
        ("block_stride", ctypes.c_int64), ("block_table", _POINTER), ("num_blocks", ctypes.c_int64),
    ]  # fmt: skip


class _RowsView(ctypes.Structure):
    _fields_ = [
        ("data", _POINTER), ("size_bytes", ctypes.c_int64), ("dtype", ctypes.c_int32),
        ("reserved", ctypes.c_int32), ("num_qo_heads", ctypes.c_int64),
        ("num_rows", ctypes.c_int64), ("last_dim", ctypes.c_int64),
        ("head_stride", ctypes.c_int64), ("row_stride", ctypes.c_int64),
    ]  # fmt: skip


class _LayerObservation(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t), ("q_window", _RowsView), ("window_lse", _RowsView),
        ("attn_tile", _RowsView), ("k", _KvView), ("v", _KvView),
    ]  # fmt: skip


class _Parameter(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("value", ctypes.c_char_p)]


class _EngineOptions(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("backend", ctypes.c_char_p),
                ("num_threads", ctypes.c_int32), ("window_kernels", ctypes.c_char_p),
                ("device_memory_bytes", ctypes.c_int64), ("device_memory", _POINTER)]  # fmt: skip


class _DeviceBytesOptions(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("handover", ctypes.c_int32),
                ("row_move", ctypes.c_int32), ("layer", _POINTER)]  # fmt: skip


class _OperationSpec(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t), ("model_json", ctypes.c_char_p),
        ("seq_len", ctypes.c_int64), ("num_rows", ctypes.c_int64), ("row_positions", _POINTER),
        ("softmax_scale", ctypes.c_float), ("kv_dtype", ctypes.c_int32),
        ("value_head_dim", ctypes.c_int64), ("policy", ctypes.c_char_p),
        ("parameters", ctypes.POINTER(_Parameter)), ("num_parameters", ctypes.c_size_t),
        ("budget_kind", ctypes.c_int32), ("budget", ctypes.c_int64),
        ("kept_fraction", ctypes.c_double), ("scope", ctypes.c_char_p),
        ("protect_sink", ctypes.c_int64), ("protect_window", ctypes.c_int64),
        ("protect_spans", _POINTER), ("num_protect_spans", ctypes.c_size_t),
        ("ppl", ctypes.c_double), ("window_logprobs", _POINTER),
        ("num_window_logprobs", ctypes.c_size_t), ("table", _POINTER), ("shadow", ctypes.c_int32),
        ("cuda_stream", _POINTER),
    ]  # fmt: skip


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
class QueryLayer:
    """Queries of the observed rows [num_qo_heads, W, d], keys and values [num_kv_heads, T, d], fp32."""

    q_window: np.ndarray
    k: np.ndarray
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
        self._library = ctypes.CDLL(str(library))
        self._declare()
        if self._library.keepset_abi_version() != _ABI_VERSION:
            raise EngineError("FAILED_PRECONDITION",
                              f"{library}: ABI {self._library.keepset_abi_version()}, "
                              f"want {_ABI_VERSION}")
        options = _EngineOptions(ctypes.sizeof(_EngineOptions), backend.encode(), num_threads,
                                 window_kernels.encode(), device_memory_bytes)
        self._engine = _POINTER()
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
        return self._library.keepset_engine_backend(self._engine).decode()

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of all policies."""
        return tuple(self._library.keepset_engine_policies(self._engine).decode().split())

    def decide(self, *, model: ModelFingerprint, layers: Sequence[TileLayer], table: bytes,
               budget_tokens: int, ppl: float, parameters: Mapping[str, object] | None = None,
               protect_sink: int = 0, protect_window: int = 0) -> Decision:
        """Runs compilerkv with a table given as the bytes of its file."""
        seq_len = layers[0].attn_tile.shape[2]
        listed = [(str(k).encode(), str(v).encode()) for k, v in (parameters or {}).items()]
        spec = _OperationSpec(
            struct_size=ctypes.sizeof(_OperationSpec),
            model_json=json.dumps(model.to_json()).encode(), seq_len=seq_len,
            num_rows=layers[0].attn_tile.shape[1], softmax_scale=1.0, kv_dtype=_F32,
            value_head_dim=layers[0].v.shape[2], policy=b"compilerkv",
            parameters=(_Parameter * len(listed))(*listed), num_parameters=len(listed),
            budget_kind=_BUDGET_TOKENS, budget=budget_tokens,
            protect_sink=protect_sink, protect_window=protect_window, ppl=ppl)
        handle, operation = self._load(table), _POINTER()
        try:
            spec.table = handle
            self._check(self._library.keepset_operation_begin(
                self._engine, ctypes.byref(spec), ctypes.byref(operation)))
            for index, layer in enumerate(layers):
                observation = _LayerObservation(struct_size=ctypes.sizeof(_LayerObservation),
                                                attn_tile=_rows_view(layer.attn_tile),
                                                v=_kv_view(layer.v))
                self._check(self._library.keepset_operation_observe(
                    operation, index, ctypes.byref(observation)))
            return self._finish(operation, len(layers))
        finally:
            if operation:
                self._library.keepset_operation_destroy(operation)
            self._library.keepset_table_destroy(handle)

    def keep(self, *, model: ModelFingerprint, policy: str, layers: Mapping[int, QueryLayer],
             seq_len: int, budget_tokens: int, softmax_scale: float,
             row_positions: Sequence[int] | np.ndarray, table: bytes | None = None,
             parameters: Mapping[str, object] | None = None, scope: str | None = None,
             protect_sink: int = 0, protect_window: int = 0, ppl: float = float("nan"),
             cuda_stream: int | None = None) -> Kept:
        """Runs any policy; `layers` by index, those that the policy reads (`input_needs`).

        cuda_stream: a cudaStream_t for the operation's kernels (backend cuda); 0 is the default stream, as in
        `torch.cuda.current_stream().cuda_stream`. None: the engine's own, which waits for no other.
        """
        rows = np.ascontiguousarray(row_positions, np.int64)
        spec = self._spec(model, policy, parameters)
        spec.seq_len, spec.num_rows, spec.row_positions = seq_len, len(rows), rows.ctypes.data
        spec.softmax_scale, spec.kv_dtype = softmax_scale, _F32
        spec.budget_kind, spec.budget = _BUDGET_TOKENS, budget_tokens
        spec.scope = None if scope is None else scope.encode()
        spec.protect_sink, spec.protect_window, spec.ppl = protect_sink, protect_window, ppl
        spec.cuda_stream = _LEGACY_STREAM if cuda_stream == 0 else cuda_stream
        handle, operation = _POINTER(), _POINTER()
        try:
            if table is not None:
                handle = self._load(table)
                spec.table = handle
            self._check(self._library.keepset_operation_begin(
                self._engine, ctypes.byref(spec), ctypes.byref(operation)))
            for index, layer in sorted(layers.items()):
                observation = _LayerObservation(
                    struct_size=ctypes.sizeof(_LayerObservation),
                    q_window=_rows_view(layer.q_window), k=_kv_view(layer.k), v=_kv_view(layer.v))
                self._check(self._library.keepset_operation_observe(
                    operation, index, ctypes.byref(observation)))
            result = _POINTER()
            self._check(self._library.keepset_operation_finish(operation, ctypes.byref(result)))
            document = json.loads(self._library.keepset_result_json(result))
            num_sets = self._library.keepset_result_num_sets(result)
            kept = [[self._indices(result, layer, number) for number in range(num_sets)]
                    for layer in range(model.num_layers)]
            return Kept(kept, document.get("outside_mass"), document.get("predicted_miss_rate"),
                        document)
        finally:
            if operation:
                self._library.keepset_operation_destroy(operation)
            self._library.keepset_table_destroy(handle)

    def input_needs(self, *, model: ModelFingerprint, policy: str, table: bytes | None = None,
                    parameters: Mapping[str, object] | None = None) -> dict:
        """What a worker has to send for such an operation: layers with heads, rows, probe."""
        spec = self._spec(model, policy, parameters)
        spec.kv_dtype = _F32
        handle, report = _POINTER(), _POINTER()
        try:
            if table is not None:
                handle = self._load(table)
                spec.table = handle
            self._check(self._library.keepset_input_needs(
                self._engine, ctypes.byref(spec), ctypes.byref(report)))
            return json.loads(self._library.keepset_report_json(report))
        finally:
            if report:
                self._library.keepset_report_destroy(report)
            self._library.keepset_table_destroy(handle)

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
        spec.seq_len, spec.num_rows, spec.softmax_scale = seq_len, num_rows, 1.0
        spec.kv_dtype = _choice("kv_dtype", kv_dtype, _DTYPES)
        spec.budget_kind, spec.budget, spec.ppl = _BUDGET_TOKENS, budget_tokens, 1.0
        spec.scope = None if scope is None else scope.encode()
        options = _DeviceBytesOptions(
            ctypes.sizeof(_DeviceBytesOptions), _choice("handover", handover, _HANDOVERS),
            _choice("row_move", row_move, _ROW_MOVES))
        handle, found = _POINTER(), ctypes.c_int64()
        try:
            if table is not None:
                handle = self._load(table)
                spec.table = handle
            self._check(self._library.keepset_operation_device_bytes(
                self._engine, ctypes.byref(spec), ctypes.byref(options), ctypes.byref(found)))
            return found.value
        finally:
            self._library.keepset_table_destroy(handle)

    def _spec(self, model: ModelFingerprint, policy: str,
              parameters: Mapping[str, object] | None) -> _OperationSpec:
        listed = [(str(k).encode(), str(v).encode()) for k, v in (parameters or {}).items()]
        return _OperationSpec(
            struct_size=ctypes.sizeof(_OperationSpec),
            model_json=json.dumps(model.to_json()).encode(), policy=policy.encode(),
            parameters=(_Parameter * len(listed))(*listed), num_parameters=len(listed),
            ppl=float("nan"))

    def _load(self, table: bytes) -> ctypes.c_void_p:
        """The library takes tables from files only: every table passes the same strict reader."""
        handle = _POINTER()
        with tempfile.NamedTemporaryFile(suffix=".safetensors", dir=_scratch()) as file:
            file.write(table)
            file.flush()
            self._check(self._library.keepset_table_load(file.name.encode(), ctypes.byref(handle)))
        return handle

    def _indices(self, result: ctypes.c_void_p, layer: int, number: int) -> np.ndarray:
        indices, count = ctypes.POINTER(ctypes.c_int32)(), ctypes.c_int64()
        self._check(self._library.keepset_result_keep_indices(
            result, ctypes.c_int64(layer), ctypes.c_int64(number), ctypes.byref(indices),
            ctypes.byref(count)))
        return np.ctypeslib.as_array(indices, (count.value,)).copy()

    def _finish(self, operation: ctypes.c_void_p, num_layers: int) -> Decision:
        result = _POINTER()
        self._check(self._library.keepset_operation_finish(operation, ctypes.byref(result)))
        document = json.loads(self._library.keepset_result_json(result))
        keep_indices = [self._indices(result, layer, 0) for layer in range(num_layers)]
        entropy = [layer.get("entropy") if layer.get("entropy") is not None
                   else document["entropy"] for layer in document["layers"]]
        return Decision(keep_indices, [layer["candidates"] for layer in document["layers"]],
                        entropy, document["ppl"])

    def _check(self, status: int) -> None:
        if status != 0:
            raise EngineError(_CODES[status] if 0 < status < len(_CODES) else "UNKNOWN",
                              self._library.keepset_last_error().decode())

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


def _choice(name: str, value: str, numbers: Mapping[str, int]) -> int:
    if value not in numbers:
        raise ValueError(f"{name}={value!r}, want one of {', '.join(numbers)}")
    return numbers[value]


def _require_f32(array: np.ndarray) -> None:
    if array.dtype != np.float32 or not array.flags.c_contiguous or array.ndim != 3:
        raise ValueError(f"array {list(array.shape)} {array.dtype}, want contiguous float32 of 3 axes")


def _rows_view(array: np.ndarray) -> _RowsView:
    _require_f32(array)
    heads, rows, last = array.shape
    return _RowsView(data=array.ctypes.data, size_bytes=array.nbytes, dtype=_F32,
                     num_qo_heads=heads, num_rows=rows, last_dim=last, head_stride=rows * last,
                     row_stride=last)


def _kv_view(array: np.ndarray) -> _KvView:
    _require_f32(array)
    heads, tokens, dim = array.shape
    return _KvView(data=array.ctypes.data, size_bytes=array.nbytes, dtype=_F32, num_kv_heads=heads,
                   seq_len=tokens, head_dim=dim, head_stride=tokens * dim, token_stride=dim)
