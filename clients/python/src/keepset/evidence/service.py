"""Prompts handed to a running keepsetd by shared memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

import keepset


class Observed(Protocol):
    """What one layer of any model shows."""

    @property
    def q_window(self) -> np.ndarray: ...

    @property
    def k(self) -> np.ndarray: ...

    @property
    def v(self) -> np.ndarray: ...


@contextlib.contextmanager
def shared(client: keepset.Client, observed: Sequence[Observed]) -> Iterator[list[keepset.Layer]]:
    """Layers whose tensors lie in a region of their own while the block runs."""
    size = sum(a.nbytes + 64 for one in observed for a in (one.q_window, one.k, one.v))
    region = client.shared_region(size)
    layers = [keepset.Layer(q_window=region.place(one.q_window), k=region.place(one.k),
                            v=region.place(one.v)) for one in observed]
    try:
        yield layers
    finally:
        layers.clear()
        client.retire(region)


def candidates_of(result: keepset.Result) -> list[int] | None:
    """Positions that reached the gate, per layer; None for policies without one."""
    if not result.has_candidates:
        return None
    return [layer.sets[0].candidates for layer in result.layers]


def candidates_summary(candidates: Sequence[int], budget: int) -> dict[str, float | None]:
    """Mean, and the share of decisions with fewer candidates than the budget: they keep less than they may."""
    if not candidates:
        return {"mean_candidates": None, "under_filled": None}
    values = np.asarray(candidates)
    return {"mean_candidates": float(values.mean()), "under_filled": float((values < budget).mean())}


def cells_of(result: keepset.Result) -> list[str]:
    """"entropy bin,perplexity bin" of every layer's decision; empty without a table."""
    if result.table is None:
        return []
    return [f"{result.entropy_bin if layer.entropy_bin is None else layer.entropy_bin},{result.ppl_bin}"
            for layer in result.layers]
