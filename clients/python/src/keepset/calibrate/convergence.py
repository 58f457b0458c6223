"""When the alternation may stop: what changed between two rounds, and what the change is worth.

Flat states keep flipping: their actions measure nearly the same. So a round has settled when no state
changed, or every changed state's mean reward differs by at most a tolerance between its old and its new
action, both measured in the round's own records.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Iterable

import numpy as np

from keepset.calibrate import records
from keepset.calibrate.grids import PAPER_GRIDS, Grids
from keepset.calibrate.rollouts import Weights

# Far below half a step of any grid.
_SAME_ACTION = 1e-4

HeadState = tuple[str, int, int, int]  # "head", budget index, layer, KV head
GateState = tuple[str, int, int, int, int]  # "gate", budget index, layer, entropy bin, ppl bin


@dataclasses.dataclass(frozen=True)
class RoundChange:
    """What one round changed. largest_difference: nats of mean reward; None when nothing changed."""

    changed_head_states: int
    changed_gate_states: int
    states: int
    largest_difference: float | None
    unmeasured: int  # changed states whose old or new action has no record in this round

    def within(self, tolerance: float) -> bool:
        return self.unmeasured == 0 and (self.largest_difference is None
                                         or self.largest_difference <= tolerance)

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


def change(before: Weights, after: Weights, files: Iterable[pathlib.Path], budgets: list[int],
           group_size: int, grids: Grids = PAPER_GRIDS) -> RoundChange:
    """Compares two tables by the records of the round that made `after`.

    Gates are compared cell by cell of `after`; a `before` without cells has one value per layer.
    """
    heads = [one.head_weights[:, :, ::group_size] for one in (before, after)]
    gates = [np.broadcast_to(one.gate_thresholds, after.gate_thresholds.shape)
             for one in (before, after)]
    changed = {("head", *map(int, state)) for state in _differing(*heads)}
    changed |= {("gate", *map(int, state)) for state in _differing(*gates)}
    rewards = _mean_rewards(files, after, budgets, changed, grids)
    largest, unmeasured = None, 0
    for state in changed:
        old, new = heads if state[0] == "head" else gates
        grid = getattr(grids, state[0])
        means = [rewards.get((state, grid.index(float(one[state[1:]])))) for one in (old, new)]
        if means[0] is None or means[1] is None:
            # A state without any record was filled, not measured: its value means nothing.
            unmeasured += any(key[0] == state for key in rewards)
            continue
        largest = max(largest or 0.0, abs(means[1] - means[0]))
    return RoundChange(sum(state[0] == "head" for state in changed),
                       sum(state[0] == "gate" for state in changed),
                       heads[1].size + gates[1].size, largest, unmeasured)


def reward_of(record: dict) -> float:
    """The reward that `keepset tables compile` computes."""
    reward = record["full_loss"] - record["compressed_loss"]
    if record["kind"] == "gate":
        reward -= max(0, record["candidate_count"] - record["budget"]) / record["sequence_length"]
    return reward


def _differing(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return np.argwhere(np.abs(after - before) > _SAME_ACTION)


def _mean_rewards(files: Iterable[pathlib.Path], table: Weights, budgets: list[int],
                  wanted: set, grids: Grids) -> dict:
    """Mean reward by (state, index of the action) of the wanted states."""
    sums: dict = collections.defaultdict(lambda: [0.0, 0])
    for path in files:
        for record in records.read(path):
            state = _state_of(record, table, budgets)
            if state in wanted:
                entry = sums[state, getattr(grids, record["kind"]).index(record["action"])]
                entry[0] += reward_of(record)
                entry[1] += 1
    return {key: total / count for key, (total, count) in sums.items()}


def _state_of(record: dict, table: Weights, budgets: list[int]) -> HeadState | GateState:
    budget = budgets.index(record["budget"])
    if record["kind"] == "head":
        return "head", budget, record["layer"], record["kv_head"]
    bins = [int(np.searchsorted(edges, np.float32(record[name]), side="right"))
            for name, edges in (("entropy", table.entropy_edges), ("ppl", table.ppl_edges))]
    return "gate", budget, record["layer"], bins[0], bins[1]
