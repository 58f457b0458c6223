"""Chooses calibration prompts so that the cells of entropy x perplexity are covered, not by chance."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from keepset.calibrate import CalibrationError
from keepset.calibrate.prompts import Adapter, Prompt


@dataclasses.dataclass(frozen=True)
class Signals:
    """Where a prompt stands: entropy in nats of its attention mass over all layers and heads."""

    seed: int
    prompt_id: str
    entropy: float
    ppl: float


@dataclasses.dataclass(frozen=True)
class Stratified:
    """The chosen prompts and how they cover the cells, [entropy bins][perplexity bins] of counts."""

    signals: tuple[Signals, ...]
    entropy_edges: tuple[float, ...]
    ppl_edges: tuple[float, ...]
    pool_per_cell: tuple[tuple[int, ...], ...]
    chosen_per_cell: tuple[tuple[int, ...], ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(one.seed for one in self.signals)

    @property
    def num_cells(self) -> int:
        return (len(self.entropy_edges) + 1) * (len(self.ppl_edges) + 1)

    @property
    def covered_cells(self) -> int:
        return sum(count > 0 for row in self.chosen_per_cell for count in row)

    @property
    def reachable_cells(self) -> int:
        """Cells that hold a prompt of the pool."""
        return sum(count > 0 for row in self.pool_per_cell for count in row)

    def coverage(self) -> dict:
        return {
            "pool": sum(map(sum, self.pool_per_cell)), "chosen": len(self.signals),
            "cells": self.num_cells, "reachable_cells": self.reachable_cells,
            "covered_cells": self.covered_cells, "entropy_edges": list(self.entropy_edges),
            "ppl_edges": list(self.ppl_edges),
            "pool_per_cell": [list(row) for row in self.pool_per_cell],
            "chosen_per_cell": [list(row) for row in self.chosen_per_cell],
        }  # fmt: skip


def signals_of(prompt: Prompt) -> Signals:
    """The signals by which compilerkv chooses the gate's cell (alpha_scope global)."""
    tiles = [layer.attn_tile for layer in prompt.layers]
    mass = np.mean([tile.mean((0, 1), dtype=np.float64) for tile in tiles], 0)
    mass /= mass.sum()
    entropy = -(mass * np.log(np.maximum(mass, 1e-8))).sum()
    return Signals(prompt.seed, prompt.prompt_id, float(entropy), prompt.ppl)


def choose(pool: Sequence[Signals], count: int, bins: tuple[int, int]) -> Stratified:
    """`count` prompts of the pool, cell by cell in turn; bins of entropy and of perplexity.

    Edges are quantiles of the pool. The same pool gives the same choice, in order of seeds.
    """
    if not 1 <= count <= len(pool):
        raise CalibrationError(f"{count} prompts of a pool of {len(pool)}, want 1..{len(pool)}")
    ordered = sorted(pool, key=lambda one: one.seed)
    edges = [_quantiles([getattr(one, name) for one in ordered], number)
             for name, number in zip(("entropy", "ppl"), bins)]
    cells: dict[tuple[int, int], list[Signals]] = {}
    for one in ordered:
        cells.setdefault((_bin(edges[0], one.entropy), _bin(edges[1], one.ppl)), []).append(one)
    # A random order of the cells: with fewer prompts than cells the choice is not the first cells.
    turns = [sorted(cells)[i] for i in np.random.default_rng(0).permutation(len(cells))]
    chosen: list[Signals] = []
    per_cell = np.zeros(bins, int)
    rank = 0
    while len(chosen) < count:
        for cell in turns:
            if rank < len(cells[cell]) and len(chosen) < count:
                chosen.append(cells[cell][rank])
                per_cell[cell] += 1
        rank += 1
    in_pool = np.zeros(bins, int)
    for cell, members in cells.items():
        in_pool[cell] = len(members)
    return Stratified(tuple(sorted(chosen, key=lambda one: one.seed)), tuple(edges[0].tolist()),
                      tuple(edges[1].tolist()), _rows(in_pool), _rows(per_cell))


def stratified_seeds(adapter: Adapter, pool: range, count: int, bins: tuple[int, int],
                     cache: pathlib.Path, say: Callable[[str], None]) -> Stratified:
    """Reads every prompt of the pool once and chooses; `cache` saves the reading for a second run.

    The cache belongs to one adapter and pool; of others it is refused.
    """
    asked = {"adapter": adapter.name, "model": adapter.fingerprint().to_json(),
             "pool": [pool.start, pool.stop, pool.step]}
    if cache.exists():
        found = json.loads(cache.read_text())
        if found["asked"] != json.loads(json.dumps(asked)):
            raise CalibrationError(f"{cache} holds another pool of prompts: choose another --out or "
                                   "remove it")
        signals = [Signals(**one) for one in found["signals"]]
    else:
        signals = [signals_of(prompt) for prompt in adapter.prompts(pool)]
        cache.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cache.with_name(cache.name + ".part")
        unfinished.write_text(json.dumps(
            {"asked": asked, "signals": [dataclasses.asdict(one) for one in signals]}) + "\n")
        unfinished.rename(cache)
    made = choose(signals, count, bins)
    say(f"{count} of {len(signals)} prompts; {made.covered_cells} of {made.num_cells} risk cells "
        f"covered, {made.reachable_cells} reachable from this pool")
    return made


def _quantiles(values: Sequence[float], bins: int) -> np.ndarray:
    return np.quantile(np.asarray(values, np.float64), np.arange(1, bins) / bins).astype(np.float32)


def _bin(edges: np.ndarray, value: float) -> int:
    return int(np.searchsorted(edges, np.float32(value), side="right"))


def _rows(counts: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(one) for one in row) for row in counts)
