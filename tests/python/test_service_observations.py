"""What the Python client may send in the place of a tile: column statistics, log-sum-exps."""

import numpy as np
import pytest
from conftest import MODEL, SEQ_LEN, WINDOW, random_layers, sets_of, spec

import keepset


@pytest.mark.parametrize("policy", ["compilerkv", "snapkv"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_column_statistics_decide_like_their_tile(client, policy, reduction):
    rng = np.random.default_rng(3)
    tiles, columns = [], []
    for layer in random_layers():
        tile = rng.integers(0, 16, (MODEL.num_qo_heads, WINDOW, SEQ_LEN)) / np.float32(64)
        tile = np.tril(tile, SEQ_LEN - WINDOW).astype(np.float32)
        stats = tile.sum(axis=1) if reduction == "sum" else tile.mean(axis=1)
        tiles.append(keepset.Layer(attn_tile=tile, k=layer.k, v=layer.v))
        columns.append(keepset.Layer(column_stats=stats, column_reduction=reduction, v=layer.v))
    wanted = client.compress(layers=tiles, **spec(policy=policy))
    result = client.compress(layers=columns, num_rows=WINDOW, **spec(policy=policy))
    assert result.outcome == "compressed"
    assert sets_of(result) == sets_of(wanted)


def with_log_sum_exp(layers: list[keepset.Layer], base: str) -> list[keepset.Layer]:
    """The layers with what each query row's attention sums to, as a kernel of that base returns it."""
    heads_of_one = MODEL.num_qo_heads // MODEL.num_kv_heads
    unseen = np.triu(np.full((WINDOW, SEQ_LEN), -np.inf), SEQ_LEN - WINDOW + 1)
    for layer in layers:
        keys = np.repeat(layer.k.astype(np.float64), heads_of_one, axis=0)
        logits = layer.q_window @ keys.transpose(0, 2, 1) * MODEL.head_dim**-0.5 + unseen
        lse = np.log(np.exp(logits).sum(axis=2))
        layer.window_lse = (lse / np.log(2) if base == "2" else lse).astype(np.float32)
        layer.lse_base = base
    return layers


@pytest.mark.parametrize("base", ["e", "2"])
def test_log_sum_exp_of_either_base_decides_like_none(client, base):
    wanted = client.compress(layers=random_layers(), **spec(policy="compilerkv"))
    layers = with_log_sum_exp(random_layers(), base)
    assert sets_of(client.compress(layers=layers, **spec(policy="compilerkv"))) == sets_of(wanted)


def test_log_sum_exp_of_the_other_base_is_refused(client):
    layers = with_log_sum_exp(random_layers(), "2")
    for layer in layers:
        layer.lse_base = "e"
    with pytest.raises(keepset.KeepsetError, match="window_lse"):
        client.compress(layers=layers, **spec(policy="compilerkv"))


def test_log_sum_exp_of_no_known_base_is_refused_at_home(client):
    layers = with_log_sum_exp(random_layers(), "e")
    layers[1].lse_base = "10"
    with pytest.raises(ValueError, match="layer 1: lse_base '10', want 'e' or '2'"):
        client.compress(layers=layers, **spec(policy="compilerkv"))


def test_requirements_say_who_takes_column_statistics(client):
    needs = {policy: client.input_needs(model=MODEL, policy=policy)
             for policy in ("compilerkv", "snapkv", "tova", "knorm")}
    assert needs["compilerkv"].layers[0].columns and needs["compilerkv"].max_rows == 64
    assert needs["snapkv"].layers[0].columns and needs["snapkv"].max_rows == 0
    assert needs["tova"].max_rows == 1
    assert not needs["knorm"].layers[0].columns


def test_unknown_column_reduction_is_refused(client):
    stats = np.ones((MODEL.num_qo_heads, SEQ_LEN), np.float32)
    layers = [keepset.Layer(column_stats=stats, column_reduction="max", v=layer.v)
              for layer in random_layers()]
    with pytest.raises(ValueError, match="column_reduction 'max', want 'mean' or 'sum'"):
        client.compress(layers=layers, num_rows=WINDOW, **spec())
