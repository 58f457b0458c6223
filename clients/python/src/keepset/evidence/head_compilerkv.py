"""A compilerkv table of the tasks of the report, compiled from rollouts as keepset.calibrate compiles it."""

from __future__ import annotations

import dataclasses
import json
import pathlib

from keepset.calibrate.__main__ import Build, calibrate
from keepset.calibrate.alternation import Say
from keepset.calibrate.head_prompts import RememberedTasks
from keepset.calibrate.task_prompts import TaskAdapter

COMPILED = "compilerkv compiled"


@dataclasses.dataclass(frozen=True)
class CompilerKvSettings:
    """tasks: calibrated on, `prompts` of each at `length` tokens; measured on prompts of that length.

    action_step: every so many-th head weight and gate of the paper's grids is measured, each on every
    prompt, so that they are compared on the same ones. rounds: of heads and gate at most; one entropy and
    one perplexity bin, which is what so few prompts have records for.
    """

    tasks: tuple[str, ...]
    length: int
    budgets: tuple[int, ...]
    prompts: int = 1
    action_step: int = 14
    rounds: int = 1


def compile_table(build: Build, tasks: RememberedTasks, source: str, settings: CompilerKvSettings,
                  work: pathlib.Path, say: Say) -> tuple[bytes, dict]:
    """The table's bytes and what the report says of it. A finished table of the same settings is read from
    `work`; records of an interrupted run are gone on from. OutOfTime where `tasks` has no more time."""
    work.mkdir(parents=True, exist_ok=True)
    table, told = work / "compilerkv.safetensors", work / "compilerkv.json"
    asked = {"source": source, **dataclasses.asdict(settings)}
    asked = json.loads(json.dumps(asked))
    if told.exists() and (known := json.loads(told.read_text()))["asked"] == asked:
        return table.read_bytes(), known["report"]
    adapter = TaskAdapter(tasks, settings.tasks, settings.length, source)
    outcome = calibrate(build, adapter, work / "records.jsonl",
                        seeds=range(settings.prompts * len(settings.tasks)),
                        budgets=list(settings.budgets), alpha_scope="head", max_rounds=settings.rounds,
                        name="compilerkv", version="1", say=say, bins=(1, 1),
                        action_step=settings.action_step)
    report = {**asked, "rounds_asked": settings.rounds, "rounds": outcome.rounds,
              "records": outcome.num_records,
              "settled": outcome.settled,
              "changed_states": [[one.changed_head_states, one.changed_gate_states, one.states]
                                 for one in outcome.changes]}
    table.write_bytes(outcome.table)
    told.write_text(json.dumps({"asked": asked, "report": report}))
    return outcome.table, report
