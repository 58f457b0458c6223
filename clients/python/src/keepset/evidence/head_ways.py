"""Whether the way to pool and dilate should be that of the least measured loss: asked of prompts of a task that no
table was compiled on or chosen by."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from keepset import table_file
from keepset.calibrate.head_prompts import Tasks
from keepset.calibrate.observation_heads import Ways, keep, undated
from keepset.evidence.statistics import paired_difference
from keepset.in_process import Engine


def held_out_ways(folder: pathlib.Path, engine: Engine, tasks: Tasks, ways: Ways, task: str,
                  prompts: Sequence[tuple[int, int]], budgets: Sequence[int]) -> dict:
    """Loss under compression, mean over budgets, by the table that stood and by the one of the least measured loss,
    on prompts (seed, length) of a task that neither has seen. Without prompts where both are the same. What was
    measured before is read."""
    found: dict = {"task": task, "chosen": ways.chosen, "least": ways.least, "prompts": 0}
    if ways.chosen == ways.least:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    tables = [ways.tables[ways.chosen], ways.tables[ways.least]]
    identity = [table_file.digest(undated(one)) for one in tables] + [list(budgets)]
    losses = []
    for seed, length in prompts:
        path = folder / f"{task}-{length}-{seed}.json"
        if not path.exists() or json.loads(path.read_text())["of"] != identity:
            prompt = tasks.prompt(task, seed, length)
            outcomes = prompt.outcomes([keep(engine, prompt, table, budget).sets()
                                        for table in tables for budget in budgets])
            by_table = np.array([one.loss for one in outcomes]).reshape(2, len(budgets)).mean(1)
            path.write_text(json.dumps({"of": identity, "losses": by_table.tolist()}))
        losses.append(json.loads(path.read_text())["losses"])
    chosen, least = np.array(losses).T
    return found | {"prompts": len(losses), "chosen_loss": float(chosen.mean()),
                    "least_loss": float(least.mean()),
                    "least_minus_chosen": paired_difference(least, chosen),
                    "by_prompt": [[round(one, 4) for one in pair] for pair in losses]}
