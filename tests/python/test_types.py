"""Budgets, dtypes and messages of the Python client."""

import numpy as np
import pytest

import keepset
from keepset import _codec
from keepset.v1 import common_pb2, compression_pb2


def test_compression_ratio_converts_as_kvpress_does():
    assert keepset.kept_tokens_of_compression_ratio(0.9, 1000) == 99
    assert keepset.Budget.compression_ratio(0.5, 2000) == keepset.Budget.tokens(1000)


@pytest.mark.parametrize(
    ("budget", "capacity"),
    [
        (keepset.Budget.tokens(64), 64),
        (keepset.Budget.tokens(4096), 1000),
        (keepset.Budget.fraction(0.25), 250),
        (keepset.Budget.fraction(0.0001), 1),
        (keepset.Budget.bytes(1024), 16),
        (keepset.Budget.table_default(), 1000),
    ],
)
def test_capacity_of_a_destination(budget, capacity):
    assert budget.capacity(1000, 64) == capacity


def test_bfloat16_travels_as_uint16_bits():
    assert _codec.dtype_of(np.zeros(1, np.uint16), "bfloat16") == common_pb2.DTYPE_BF16
    with pytest.raises(TypeError, match="uint16"):
        _codec.dtype_of(np.zeros(1, np.float32), "bfloat16")
    with pytest.raises(TypeError, match="float64"):
        _codec.dtype_of(np.zeros(1, np.float64), None)


def test_strides_of_nhd_and_paged_kv():
    data = common_pb2.TensorData(inline=b"")
    nhd = np.zeros((10, 2, 4), np.float16).transpose(1, 0, 2)
    tensor = _codec.kv_tensor(data, nhd, None, "k")
    assert (tensor.head_stride, tensor.token_stride, tensor.block_size) == (4, 8, 0)
    paged = keepset.PagedKv(np.zeros((5, 16, 2, 4), np.float16), [3, 1])
    tensor = _codec.kv_tensor(data, paged, None, "k")
    assert (tensor.block_stride, tensor.token_stride, tensor.head_stride) == (128, 8, 4)
    assert list(tensor.block_table) == [3, 1]


def test_innermost_stride_must_be_one():
    with pytest.raises(ValueError, match="innermost stride"):
        _codec.strides_of(np.zeros((2, 3, 8), np.float32)[..., ::2], "k")


def test_unknown_scope_lists_the_known_ones():
    with pytest.raises(ValueError, match="layer_equal"):
        _codec.scope_value("layers")


def test_result_of_a_kept_full_reply_lists_all_positions():
    message = compression_pb2.OperationResult(
        outcome=compression_pb2.OUTCOME_KEPT_FULL,
        reason=compression_pb2.REASON_BELOW_BUDGET,
        seq_len=4,
        layers=[compression_pb2.LayerResult(sets=[compression_pb2.KeepSet(all=True, kept=4)])],
    )
    result = _codec.result_of(message)
    assert (result.outcome, result.reason) == ("kept_full", "below_budget")
    assert result.layers[0].keep_indices.tolist() == [0, 1, 2, 3]
    assert result.table is None and result.entropy is None
