"""Do two calibrations on disjoint halves of a text agree, and what does the wrong one cost?"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from keepset import table_file
from keepset.calibrate import records
from keepset.calibrate.__main__ import Build, calibrate
from keepset.calibrate.alternation import Say
from keepset.calibrate.prompts import Adapter
from keepset.calibrate.rollouts import Rollouts, Weights
from keepset.evidence import tables
from keepset.in_process import Engine


# Nats between the best and the worst action of a state that counts as steep.
STEEP = 0.1


def rankdata(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[inverse]


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Rank correlation; None when one side ranks nothing."""
    a, b = rankdata(first), rankdata(second)
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def mean_rewards(path: pathlib.Path) -> dict[tuple[int, int, int], dict[float, float]]:
    """Mean reward of every action by head state (budget, layer, KV head)."""
    sums: dict = collections.defaultdict(lambda: collections.defaultdict(list))
    for record in records.read(path):
        if record["kind"] == "head":
            state = (record["budget"], record["layer"], record["kv_head"])
            sums[state][record["action"]].append(record["full_loss"] - record["compressed_loss"])
    return {state: {action: float(np.mean(all_)) for action, all_ in actions.items()}
            for state, actions in sums.items()}


def ranking_agreement(first: pathlib.Path, second: pathlib.Path) -> dict:
    """Spearman correlation of the action rankings of two record files, state by state."""
    one, two = mean_rewards(first), mean_rewards(second)
    by_state = {}
    for state in sorted(one.keys() & two.keys()):
        actions = sorted(one[state].keys() & two[state].keys())
        by_state[",".join(map(str, state))] = spearman(
            np.array([one[state][a] for a in actions]), np.array([two[state][a] for a in actions]))
    ranked = [value for value in by_state.values() if value is not None]
    # States in which the best action is worth something: elsewhere rankings are noise by nature.
    steep = [by_state[",".join(map(str, state))] for state in one.keys() & two.keys()
             if min(_spread(one[state]), _spread(two[state])) > STEEP]
    steep = [value for value in steep if value is not None]
    return {"by_budget_layer_kv_head": by_state, "mean": float(np.mean(ranked)) if ranked else None,
            "ranked_states": len(ranked), "states": len(by_state), "steep_states": len(steep),
            "mean_of_steep_states": float(np.mean(steep)) if steep else None, "steep": STEEP}


def _spread(rewards: Mapping[float, float]) -> float:
    return max(rewards.values()) - min(rewards.values())


def mean_losses(rollouts: Rollouts, num_prompts: int, table: bytes) -> list[float]:
    """Mean loss over the prompts under a table, by budget."""
    weights = Weights.of(table_file.read_table(table))
    return [float(np.mean([rollouts.evaluate(prompt, weights, budget)[1]
                           for prompt in range(num_prompts)]))
            for budget in range(len(weights.head_weights))]


@dataclasses.dataclass(frozen=True)
class Half:
    """Prompts to calibrate on and other prompts to test on; two halves share none."""

    adapter: Adapter
    seeds: range
    test_seeds: range


def measure(build: Build, halves: Sequence[Half], work: pathlib.Path, *, budgets: list[int],
            alpha_scope: str, parameters: Mapping[str, object], action_step: int,
            max_rounds: int, bins: tuple[int, int], protect_window: int, say: Say) -> dict:
    """Calibrates on each of two halves and tests both tables, and the uniform one, on both."""
    outcomes = []
    for index, half in enumerate(halves):
        folder = work / f"half-{index}"
        folder.mkdir(parents=True, exist_ok=True)
        say(f"transfer, half {index + 1} of {len(halves)}")
        outcomes.append(calibrate(
            build, half.adapter, folder / "records.jsonl", seeds=half.seeds, budgets=budgets,
            alpha_scope=alpha_scope, parameters=parameters,
            action_step=action_step, max_rounds=max_rounds,
            name=f"half-{index}", version="1", say=say, bins=bins, protect_window=protect_window))
    losses = []
    with Engine(build.library) as engine:
        for index, half in enumerate(halves):
            model = half.adapter.fingerprint()
            prompts = list(half.adapter.prompts(half.test_seeds))
            rollouts = Rollouts(engine, model, prompts, budgets, seed=0,
                                parameters={"alpha_scope": alpha_scope, **parameters},
                                protect_window=protect_window)
            candidates = {"own": outcomes[index].table, "other": outcomes[1 - index].table,
                          "uniform": tables.uniform(model, "uniform", budgets)}
            losses.append({name: mean_losses(rollouts, len(prompts), data)
                           for name, data in candidates.items()}
                          | {"full": float(np.mean([one.full_loss for one in prompts]))})
    return {
        "alpha_scope": alpha_scope, "parameters": dict(parameters), "budgets": budgets,
        "calibration_prompts": [len(half.seeds) for half in halves],
        "test_prompts": [len(half.test_seeds) for half in halves],
        "digests": [table_file.digest(one.table) for one in outcomes],
        "rank_correlation": ranking_agreement(*(work / f"half-{i}" / "records.jsonl"
                                                for i in range(2))),
        "loss_by_half": losses,
    }  # fmt: skip
