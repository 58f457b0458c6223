"""The tables a compiled one is compared with: uniform, shuffled, and halves of itself."""

from __future__ import annotations

import numpy as np

from keepset import ModelFingerprint, table_file


def uniform(model: ModelFingerprint, name: str, budgets: list[int]) -> bytes:
    """All head weights 1, all gates at the most permissive threshold."""
    return table_file.compilerkv_table(
        model, name=name, version="1",
        head_weights=np.ones((len(budgets), model.num_layers, model.num_qo_heads)),
        gate_thresholds=np.full((len(budgets), model.num_layers, 1, 1), 0.8), entropy_edges=[],
        ppl_edges=[], budgets=budgets, algorithm={"name": "uniform", "head_weight": 1.0, "gate": 0.8},
        source="uniform")


def shuffled(model: ModelFingerprint, compiled: bytes, name: str, seed: int) -> bytes:
    """The same numbers at wrong places: no KV head of a layer and no gate of a row keeps its own.

    KV heads are turned around a random ring, gates too; the layer stays.
    """
    table = table_file.read_table(compiled)
    rng = np.random.default_rng(seed)
    group = model.num_qo_heads // model.num_kv_heads
    heads = table.head_weights.reshape(table.num_budgets, model.num_layers, model.num_kv_heads, group)
    heads, gates = heads.copy(), table.gate_thresholds.copy()
    for layer in range(model.num_layers):
        heads[:, layer] = heads[:, layer][:, _no_fixed_point(rng, model.num_kv_heads)]
        flat = gates[:, layer].reshape(table.num_budgets, -1)
        gates[:, layer] = flat[:, _no_fixed_point(rng, flat.shape[1])].reshape(gates[:, layer].shape)
    return _derived(model, compiled, name, heads.reshape(table.head_weights.shape), gates)


def heads_only(model: ModelFingerprint, compiled: bytes, name: str) -> bytes:
    """The compiled head weights with the most permissive gate everywhere."""
    table = table_file.read_table(compiled)
    return _derived(model, compiled, name, table.head_weights,
                    np.full_like(table.gate_thresholds, 0.8))


def gate_only(model: ModelFingerprint, compiled: bytes, name: str) -> bytes:
    """The compiled gates with all head weights 1."""
    table = table_file.read_table(compiled)
    return _derived(model, compiled, name, np.ones_like(table.head_weights), table.gate_thresholds)


def _derived(model: ModelFingerprint, compiled: bytes, name: str, heads: np.ndarray,
             gates: np.ndarray) -> bytes:
    table = table_file.read_table(compiled)
    return table_file.compilerkv_table(
        model, name=name, version="1", head_weights=heads, gate_thresholds=gates,
        entropy_edges=table.entropy_edges, ppl_edges=table.ppl_edges, budgets=table.budgets,
        source="hand-written", algorithm={"name": "derived", "of": table_file.digest(compiled)})


def _no_fixed_point(rng: np.random.Generator, count: int) -> np.ndarray:
    """A random cyclic order of 0..count-1: nothing stays where it was, unless it is alone."""
    ring = rng.permutation(count)
    out = np.empty(count, np.int64)
    out[ring] = np.roll(ring, 1)
    return out
