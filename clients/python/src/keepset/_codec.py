"""Python data to wire messages and back. Shapes are checked by the server, which names what is wrong."""

from __future__ import annotations

import operator

import numpy as np

from keepset import types
from keepset.errors import InvalidInput
from keepset.v1 import common_pb2, compression_pb2

_DTYPES = {
    np.dtype(np.float32): common_pb2.DTYPE_F32,
    np.dtype(np.float16): common_pb2.DTYPE_F16,
}
_SCOPES = {
    None: compression_pb2.SCOPE_UNSPECIFIED,
    "layer_elastic": compression_pb2.SCOPE_LAYER_ELASTIC,
    "layer_equal": compression_pb2.SCOPE_LAYER_EQUAL,
    "sequence": compression_pb2.SCOPE_SEQUENCE,
    "kv_head": compression_pb2.SCOPE_KV_HEAD,
}
_COLUMN_REDUCTIONS = {
    "mean": compression_pb2.COLUMN_REDUCTION_MEAN,
    "sum": compression_pb2.COLUMN_REDUCTION_SUM,
}
_LSE_BASES = {"e": compression_pb2.LSE_BASE_E, "2": compression_pb2.LSE_BASE_2}
_ATTENTION = {
    "full": compression_pb2.ATTENTION_KIND_FULL,
    "sliding_window": compression_pb2.ATTENTION_KIND_SLIDING_WINDOW,
    "mla": compression_pb2.ATTENTION_KIND_MLA,
    "linear": compression_pb2.ATTENTION_KIND_LINEAR,
}
_SCOPE_NAMES = {value: name for name, value in _SCOPES.items() if name}


def unsigned(name: str, value: int, bits: int = 64) -> int:
    """`value` as an unsigned field takes it; nothing is rounded."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 2**bits:
        raise InvalidInput("INVALID_ARGUMENT", f"{name}={value}, want an integer in 0..{2**bits - 1}")
    return number


def dtype_of(array: np.ndarray, name: str | None) -> common_pb2.DType:
    """Wire dtype of an array; bfloat16 travels as uint16 with `name` saying so."""
    if name == types.BFLOAT16:
        if array.dtype != np.uint16:
            raise TypeError(f"bfloat16 is passed as uint16 bits, got {array.dtype}")
        return common_pb2.DTYPE_BF16
    if array.dtype not in _DTYPES:
        raise TypeError(f"dtype {array.dtype}, want float32, float16 or uint16 bits named 'bfloat16'")
    return _DTYPES[array.dtype]


def dtype_named(name: str) -> common_pb2.DType:
    named = {types.BFLOAT16: common_pb2.DTYPE_BF16} | {one.name: wire for one, wire in _DTYPES.items()}
    if name not in named:
        raise TypeError(f"kv_dtype {name!r}, want one of {', '.join(named)}")
    return named[name]


def strides_of(array: np.ndarray, what: str) -> list[int]:
    """Element strides; the innermost must be 1."""
    strides = [stride // array.itemsize for stride in array.strides]
    if array.size and (array.shape[-1] > 1 and strides[-1] != 1):
        raise ValueError(f"{what}: innermost stride is {strides[-1]}, want 1")
    if any(stride < 0 for stride in strides):
        raise ValueError(f"{what}: negative strides {strides}")
    return strides


def span_bytes(array: np.ndarray) -> int:
    """Bytes from the first to the last element, gaps included."""
    if array.size == 0:
        return 0
    return sum((n - 1) * s for n, s in zip(array.shape, array.strides)) + array.itemsize


def rows_tensor(
    data: common_pb2.TensorData, array: np.ndarray, dtype: str | None, what: str
) -> common_pb2.RowsTensor:
    """[H, W, x], [H, W] or [H, T]."""
    strides = strides_of(array, what)
    return common_pb2.RowsTensor(
        data=data,
        dtype=dtype_of(array, dtype),
        head_stride=strides[0],
        row_stride=strides[1] if array.ndim == 3 else 0,
    )


def kv_tensor(
    data: common_pb2.TensorData, kv: np.ndarray | types.PagedKv, dtype: str | None, what: str
) -> common_pb2.KvTensor:
    """[Hkv, T, d], or blocks [num_blocks, block_size, Hkv, d]."""
    if isinstance(kv, types.PagedKv):
        if kv.data.ndim != 4:
            raise ValueError(f"{what}: paged data has {kv.data.ndim} dimensions, want 4")
        strides = strides_of(kv.data, what)
        return common_pb2.KvTensor(
            data=data,
            dtype=dtype_of(kv.data, kv.dtype or dtype),
            block_stride=strides[0],
            token_stride=strides[1],
            head_stride=strides[2],
            block_size=kv.data.shape[1],
            block_table=[unsigned(f"{what}: block_table", block, 31) for block in kv.block_table],
        )
    if kv.ndim != 3:
        raise ValueError(f"{what}: {kv.ndim} dimensions, want 3 [num_kv_heads, seq_len, head_dim]")
    strides = strides_of(kv, what)
    return common_pb2.KvTensor(
        data=data, dtype=dtype_of(kv, dtype), head_stride=strides[0], token_stride=strides[1]
    )


def column_reduction(name: str, what: str) -> compression_pb2.ColumnReduction:
    if name not in _COLUMN_REDUCTIONS:
        raise ValueError(f"{what}: column_reduction {name!r}, want 'mean' or 'sum'")
    return _COLUMN_REDUCTIONS[name]


def lse_base(name: str, what: str) -> compression_pb2.LseBase:
    if name not in _LSE_BASES:
        raise ValueError(f"{what}: lse_base {name!r}, want 'e' or '2'")
    return _LSE_BASES[name]


def budget_message(budget: types.Budget) -> compression_pb2.Budget:
    if budget.num_tokens is not None:
        return compression_pb2.Budget(tokens=unsigned("budget tokens", budget.num_tokens))
    if budget.kept_fraction is not None:
        return compression_pb2.Budget(kept_fraction=budget.kept_fraction)
    if budget.num_bytes is not None:
        return compression_pb2.Budget(bytes=unsigned("budget bytes", budget.num_bytes))
    return compression_pb2.Budget()


def scope_value(scope: str | None) -> compression_pb2.Scope:
    if scope not in _SCOPES:
        known = ", ".join(name for name in _SCOPES if name)
        raise ValueError(f"scope {scope!r}, want one of {known}")
    return _SCOPES[scope]


def fingerprint_message(model: types.ModelFingerprint) -> common_pb2.ModelFingerprint:
    return common_pb2.ModelFingerprint(
        architecture=model.architecture,
        num_layers=unsigned("model: num_layers", model.num_layers, 32),
        num_qo_heads=unsigned("model: num_qo_heads", model.num_qo_heads, 32),
        num_kv_heads=unsigned("model: num_kv_heads", model.num_kv_heads, 32),
        head_dim=unsigned("model: head_dim", model.head_dim, 32),
        rope_json=model.rope_json(),
        revision=model.revision,
    )


def group_message(group: types.LayerGroup) -> compression_pb2.LayerGroup:
    if group.attention not in _ATTENTION:
        raise ValueError(f"attention {group.attention!r}, want one of {', '.join(_ATTENTION)}")
    return compression_pb2.LayerGroup(
        layers=[unsigned("layer_groups: layer", layer, 32) for layer in group.layers],
        attention=_ATTENTION[group.attention], window=unsigned("layer_groups: window", group.window),
        left_out=group.left_out,
    )


def pin_message(pin: types.TablePin) -> common_pb2.TablePin:
    return common_pb2.TablePin(
        name=pin.name, version=pin.version, digest=pin.digest, alias=pin.alias
    )


def _identity(message: common_pb2.TableIdentity) -> types.TableIdentity:
    return types.TableIdentity(message.name, message.version, message.digest, message.source)


def _shadow(message: compression_pb2.ShadowResult) -> types.ShadowResult:
    if message.error:
        return types.ShadowResult(error=message.error)
    return types.ShadowResult(
        _identity(message.table), message.kept_overlap, message.would_be_bytes
    )


def _optional(message, field: str):
    return getattr(message, field) if message.HasField(field) else None


def layer_kept(message: compression_pb2.LayerResult, seq_len: int) -> types.LayerKept:
    sets = []
    for one in message.sets:
        if one.all:
            indices = np.arange(seq_len, dtype=np.int32)
        else:
            indices = np.frombuffer(one.indices, dtype="<i4")
        sets.append(types.KeepSet(indices, int(one.candidates), int(one.filled)))
    return types.LayerKept(
        sets=sets,
        tau=_optional(message, "tau"),
        entropy=_optional(message, "entropy"),
        entropy_bin=_optional(message, "entropy_bin"),
    )


def result_of(message: compression_pb2.OperationResult) -> types.Result:
    stages = message.stages
    return types.Result(
        outcome=compression_pb2.Outcome.Name(message.outcome).removeprefix("OUTCOME_").lower(),
        reason=compression_pb2.Reason.Name(message.reason).removeprefix("REASON_").lower(),
        policy=message.policy,
        scope=_SCOPE_NAMES.get(message.scope, ""),
        seq_len=message.seq_len,
        budget_tokens=message.budget_tokens,
        layers=[layer_kept(layer, message.seq_len) for layer in message.layers],
        table=_identity(message.table) if message.HasField("table") else None,
        entropy=_optional(message, "entropy"),
        ppl=_optional(message, "ppl"),
        entropy_bin=_optional(message, "entropy_bin"),
        ppl_bin=_optional(message, "ppl_bin"),
        outside_mass=_optional(message, "outside_mass"),
        predicted_miss_rate=_optional(message, "predicted_miss_rate"),
        shadow=_shadow(message.shadow) if message.HasField("shadow") else None,
        layers_left_out=tuple(message.layers_left_out),
        has_candidates=message.has_candidates,
        defaulted_inputs=list(message.defaulted_inputs),
        relaxed=list(message.relaxed),
        backend=message.backend,
        transport=message.transport,
        bytes_before=message.bytes_before,
        bytes_after=message.bytes_after,
        stage_seconds={
            "queue": stages.queue,
            "lease": stages.lease,
            "score": stages.score,
            "select": stages.select,
            "gather": stages.gather,
        },
    )


def input_needs(message: compression_pb2.GetRequirementsResponse) -> types.InputNeeds:
    layers = tuple(
        types.LayerNeeds(one.layer, one.queries, one.keys, one.values, tuple(one.qo_heads),
                         tuple(one.kv_heads), one.column_stats) for one in message.layers)
    rows = tuple(name for name in ("last_row", "observed_rows", "probe_rows")
                 if getattr(message, name))
    table = _identity(message.table) if message.HasField("table") else None
    probe = (message.probe_name, message.probe_text) if message.probe_rows else None
    return types.InputNeeds(layers, rows, message.ppl, probe, table, message.max_rows)
