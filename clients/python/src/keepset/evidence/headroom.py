"""How much any table could gain on the small model, and what a compiled one takes of it.

A table of a model with two KV heads per layer and an ungated budget decides by one number per layer, the
ratio of its two weights. So the space of tables can be searched: the best ratios, chosen in hindsight on
the test prompts themselves, show what there is to learn. Searched within the paper's grid of weights and
far beyond it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from keepset import table_file
from keepset.calibrate.grids import HEAD_GRID
from keepset.calibrate.prompts import Prompt, SmallModelAdapter
from keepset.calibrate.rollouts import Rollouts, Weights
from keepset.evidence import tables
from keepset.in_process import Engine

# Weight of the second KV head over the first, the same grid on both layers.
_LARGEST_ON_GRID = HEAD_GRID.actions()[-1] / HEAD_GRID.actions()[0]
RATIOS = {
    "grid": tuple(_LARGEST_ON_GRID ** (step / 3) for step in range(-3, 4)),
    "wide": (1 / 20, 1 / 4, 1.0, 4.0, 20.0),
}
# Far below any score: the budget alone decides.
_OPEN_GATE = 1e-3
_WIDE_RANGES = {"head": [1e-3, 1e3], "gate": [0.0, 1.0]}


def search(engine: Engine, adapter: SmallModelAdapter, prompts: Sequence[Prompt],
           budgets: Sequence[int], parameters: Mapping[str, object], protect_window: int,
           compiled: bytes) -> list[dict]:
    """Mean losses by column and budget: full cache, uniform table, the same with its gate open, compiled
    table, best ratios on the grid and beyond it."""
    model = adapter.fingerprint()
    if model.num_kv_heads != 2:
        raise ValueError(f"num_kv_heads={model.num_kv_heads}, want 2: the search covers one ratio a layer")
    rollouts = Rollouts(engine, model, prompts, budgets, seed=0, parameters=parameters,
                        protect_window=protect_window, ranges=_WIDE_RANGES)
    learned = Weights.of(table_file.read_table(compiled))
    uniform = Weights.of(table_file.read_table(tables.uniform(model, "uniform", list(budgets))))
    columns = {name: [i for i, one in enumerate(prompts) if f"-{name}-" in one.prompt_id]
               for name in ("inside", "later")}
    ones = (1.0,) * model.num_layers
    rows = []
    for budget_index, budget in enumerate(budgets):
        candidates = {(kind, *ratios): _by_ratio(uniform, ratios)
                      for kind, grid in RATIOS.items()
                      for ratios in itertools.product(grid, repeat=model.num_layers)}
        for column, indices in columns.items():
            def loss(weights: Weights, indices=indices, budget_index=budget_index) -> float:
                return float(np.mean([rollouts.evaluate(i, weights, budget_index)[1]
                                      for i in indices]))

            losses = {key: loss(weights) for key, weights in candidates.items()}
            best = {kind: min((value, key[1:]) for key, value in losses.items() if key[0] == kind)
                    for kind in RATIOS}
            found = {"uniform": loss(uniform), "compiled": loss(learned)}
            # Both are tables on the grid.
            on_grid = min(best["grid"][0], *found.values())
            rows.append({
                "column": column, "budget": budget, "prompts": len(indices),
                "full": float(np.mean([prompts[i].full_loss for i in indices])),
                **found, "uniform_open": losses["grid", *ones],
                "best_on_grid": on_grid, "ratios_on_grid": list(best["grid"][1]),
                "best_beyond_grid": min(on_grid, best["wide"][0]),
                "worst": max(losses.values()),
            })  # fmt: skip
    return rows


def _by_ratio(like: Weights, ratios: Sequence[float]) -> Weights:
    """One ratio per layer; the gate is open. The size of the weights means nothing then."""
    heads = np.ones_like(like.head_weights)
    half = heads.shape[2] // 2
    for layer, ratio in enumerate(ratios):
        heads[:, layer, :half] = 1 / np.sqrt(ratio)
        heads[:, layer, half:] = np.sqrt(ratio)
    return Weights(heads, np.full_like(like.gate_thresholds, _OPEN_GATE), like.entropy_edges,
                   like.ppl_edges)


# Below this share of what there is to lose, nats are noise for a reader.
_SMALL_SHARE = 0.1


def reason(row: Mapping[str, float]) -> str:
    """Why a table gains what it gains in one row, by the search's numbers alone.

    Measured from the uniform table with its gate open: what an open gate lets in, no ratio brings.

    ceiling: that table loses almost nothing against the full cache;
    no signal: no table beyond the grid gains a tenth of what the uniform one loses;
    grid: tables beyond the grid gain that, tables on it do not;
    learned / not learned: tables on the grid gain that, and the compiled one takes half of it / does not.
    """
    lost = row["uniform_open"] - row["full"]
    if lost < _SMALL_SHARE:
        return "ceiling"
    on_grid, beyond = (row["uniform_open"] - row[key] for key in ("best_on_grid", "best_beyond_grid"))
    if beyond < _SMALL_SHARE * lost:
        return "no signal"
    if on_grid < _SMALL_SHARE * lost:
        return "grid"
    return "learned" if row["uniform_open"] - row["compiled"] >= 0.5 * on_grid else "not learned"
