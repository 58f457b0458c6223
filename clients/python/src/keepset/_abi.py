"""The structures of engine/keepset.h and how arrays become views of them.

A structure holds addresses: what it was made of has to outlive the call that takes it.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence

import numpy as np

from keepset.types import BFLOAT16, Layer, PagedKv

POINTER = ctypes.c_void_p
F32 = 1
DTYPES = {"float32": F32, "float16": 2, BFLOAT16: 3}
_COLUMN_REDUCTIONS = {"mean": 1, "sum": 2}
_LSE_BASES = {"e": 0, "2": 1}


class KvView(ctypes.Structure):
    _fields_ = [
        ("data", POINTER), ("size_bytes", ctypes.c_int64), ("dtype", ctypes.c_int32),
        ("reserved", ctypes.c_int32), ("num_kv_heads", ctypes.c_int64), ("seq_len", ctypes.c_int64),
        ("head_dim", ctypes.c_int64), ("head_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64), ("block_size", ctypes.c_int64),
        ("block_stride", ctypes.c_int64), ("block_table", POINTER), ("num_blocks", ctypes.c_int64),
    ]  # fmt: skip


class RowsView(ctypes.Structure):
    _fields_ = [
        ("data", POINTER), ("size_bytes", ctypes.c_int64), ("dtype", ctypes.c_int32),
        ("reserved", ctypes.c_int32), ("num_qo_heads", ctypes.c_int64),
        ("num_rows", ctypes.c_int64), ("last_dim", ctypes.c_int64),
        ("head_stride", ctypes.c_int64), ("row_stride", ctypes.c_int64),
    ]  # fmt: skip


class LayerObservation(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t), ("q_window", RowsView), ("window_lse", RowsView),
        ("attn_tile", RowsView), ("k", KvView), ("v", KvView), ("column_stats", RowsView),
        ("column_reduction", ctypes.c_int32), ("lse_base", ctypes.c_int32), ("qo_heads", POINTER),
    ]  # fmt: skip


class Parameter(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("value", ctypes.c_char_p)]


class EngineOptions(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("backend", ctypes.c_char_p),
                ("num_threads", ctypes.c_int32), ("window_kernels", ctypes.c_char_p),
                ("device_memory_bytes", ctypes.c_int64), ("device_memory", POINTER)]  # fmt: skip


class DeviceBytesOptions(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("handover", ctypes.c_int32),
                ("row_move", ctypes.c_int32), ("layer", POINTER)]  # fmt: skip


class OperationSpec(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t), ("model_json", ctypes.c_char_p),
        ("seq_len", ctypes.c_int64), ("num_rows", ctypes.c_int64), ("row_positions", POINTER),
        ("softmax_scale", ctypes.c_float), ("kv_dtype", ctypes.c_int32),
        ("value_head_dim", ctypes.c_int64), ("policy", ctypes.c_char_p),
        ("parameters", ctypes.POINTER(Parameter)), ("num_parameters", ctypes.c_size_t),
        ("budget_kind", ctypes.c_int32), ("budget", ctypes.c_int64),
        ("kept_fraction", ctypes.c_double), ("scope", ctypes.c_char_p),
        ("protect_sink", ctypes.c_int64), ("protect_window", ctypes.c_int64),
        ("protect_spans", POINTER), ("num_protect_spans", ctypes.c_size_t),
        ("ppl", ctypes.c_double), ("window_logprobs", POINTER),
        ("num_window_logprobs", ctypes.c_size_t), ("table", POINTER), ("shadow", ctypes.c_int32),
        ("cuda_stream", POINTER), ("keep_full_on_short_memory", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]  # fmt: skip


class Observation:
    """What one layer shows, for the duration of a call; holds all that its `structure` points to."""

    def __init__(self, index: int, layer: Layer, seq_len: int):
        where = f"layer {index}"
        self._held: list[object] = [layer]
        self.structure = LayerObservation(struct_size=ctypes.sizeof(LayerObservation))
        for name, axes in (("q_window", 3), ("window_lse", 2), ("attn_tile", 3), ("column_stats", 2)):
            array = getattr(layer, name)
            if array is not None:
                setattr(self.structure, name, _rows_view(array, layer.dtype, axes, f"{where}: {name}",
                                                         one_row=name == "column_stats"))
        for name in ("k", "v"):
            kv = getattr(layer, name)
            if kv is not None:
                setattr(self.structure, name, self._kv_view(kv, layer.dtype, seq_len, f"{where}: {name}"))
        self.structure.column_reduction = choice("column_reduction", layer.column_reduction,
                                                 _COLUMN_REDUCTIONS)
        self.structure.lse_base = choice("lse_base", layer.lse_base, _LSE_BASES)
        if layer.qo_heads is not None:
            heads = integers(layer.qo_heads, np.int64, f"{where}: qo_heads")
            if not len(heads):
                raise ValueError(f"{where}: qo_heads=[], want None (all) or at least one head")
            self.structure.qo_heads = self._address(heads)

    def _address(self, array: np.ndarray) -> int:
        self._held.append(array)
        return array.ctypes.data

    def _kv_view(self, kv: np.ndarray | PagedKv, name: str | None, seq_len: int, what: str) -> KvView:
        if not isinstance(kv, PagedKv):
            strides = _strides(kv, 3, what)
            heads, tokens, dim = kv.shape
            return KvView(data=kv.ctypes.data, size_bytes=_span_bytes(kv), dtype=dtype_of(kv, name, what),
                          num_kv_heads=heads, seq_len=tokens, head_dim=dim, head_stride=strides[0],
                          token_stride=strides[1])
        strides = _strides(kv.data, 4, what)
        _, block_size, heads, dim = kv.data.shape
        table = integers(kv.block_table, np.int32, f"{what}: block_table")
        return KvView(data=kv.data.ctypes.data, size_bytes=_span_bytes(kv.data),
                      dtype=dtype_of(kv.data, kv.dtype or name, what), num_kv_heads=heads,
                      seq_len=seq_len, head_dim=dim, block_stride=strides[0], token_stride=strides[1],
                      head_stride=strides[2], block_size=block_size, block_table=self._address(table),
                      num_blocks=len(table))


def dtype_of(array: np.ndarray, name: str | None, what: str) -> int:
    """keepset_dtype of an array; `name` says what uint16 numbers are the bits of."""
    found = name if array.dtype == np.uint16 else array.dtype.name
    if found not in DTYPES or not array.dtype.isnative:
        raise ValueError(f"{what}: dtype {array.dtype}, want float32, float16 or uint16 bits named "
                         f"'{BFLOAT16}'")
    return DTYPES[found]


def choice(name: str, value: str, numbers: dict[str, int]) -> int:
    if value not in numbers:
        raise ValueError(f"{name}={value!r}, want one of {', '.join(numbers)}")
    return numbers[value]


def count(name: str, value: int, least: int = -(2**63), most: int = 2**63 - 1) -> int:
    """`value` as an integer field takes it: ctypes would cut off what does not fit."""
    number = operator.index(value)
    if not least <= number <= most:
        raise ValueError(f"{name}={number}, want {least}..{most}")
    return number


def integers(values: Sequence[int] | np.ndarray, dtype: type, what: str) -> np.ndarray:
    """A contiguous vector of its own; nothing is rounded or cut off."""
    array = np.asarray(values)
    limits = np.iinfo(dtype)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{what}: {array.dtype} {list(array.shape)}, want a vector of integers")
    if array.size and not limits.min <= int(array.min()) <= int(array.max()) <= limits.max:
        raise ValueError(f"{what}: {int(array.min())}..{int(array.max())}, want "
                         f"{limits.min}..{limits.max}")
    return np.array(array, dtype, order="C")


def text(value: object, what: str) -> bytes:
    """C reads up to the first NUL, which would make another word of this one."""
    encoded = str(value).encode()
    if b"\0" in encoded:
        raise ValueError(f"{what}={value!r}, want text without NUL")
    return encoded


def _rows_view(array: np.ndarray, name: str | None, axes: int, what: str, *, one_row: bool) -> RowsView:
    """[H, W, x], [H, W], or with one_row [H, T]."""
    strides = _strides(array, axes, what)
    if one_row:
        shape = (array.shape[0], 1, array.shape[1])
        strides = [strides[0], array.shape[1]]
    else:
        shape = (*array.shape, 1)[:3]
    return RowsView(data=array.ctypes.data, size_bytes=_span_bytes(array),
                    dtype=dtype_of(array, name, what), num_qo_heads=shape[0], num_rows=shape[1],
                    last_dim=shape[2], head_stride=strides[0], row_stride=strides[1])


def _strides(array: np.ndarray, axes: int, what: str) -> list[int]:
    """In elements; the innermost is 1."""
    if array.ndim != axes:
        raise ValueError(f"{what}: {list(array.shape)}, want {axes} axes")
    strides = [stride // array.itemsize for stride in array.strides]
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        raise ValueError(f"{what}: strides of {list(array.strides)} bytes, want multiples of "
                         f"{array.itemsize}, none negative")
    if array.size and array.shape[-1] > 1 and strides[-1] != 1:
        raise ValueError(f"{what}: innermost stride is {strides[-1]}, want 1")
    return strides


def _span_bytes(array: np.ndarray) -> int:
    """From the first to the last element, gaps included."""
    if not array.size:
        return 0
    return sum((n - 1) * s for n, s in zip(array.shape, array.strides)) + array.itemsize
