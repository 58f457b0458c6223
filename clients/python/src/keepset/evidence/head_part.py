"""One model's part of the report: gate, tables, tasks, risk. The small model and a Hugging Face model
alike."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from keepset.calibrate.__main__ import Build
from keepset.calibrate.head_prompts import KL, Tasks
from keepset.calibrate.observation_heads import (
    CompiledHeads,
    Mixture,
    Say,
    compile_heads,
    with_curve,
)
from keepset.evidence import head_baselines, head_methods
from keepset.evidence.head_measure import (
    FLOOR,
    everything,
    measure,
    risk_of,
    summarize,
    summarize_risk,
)
from keepset.evidence.head_methods import OTHERS, OURS, SHUFFLED, Run
from keepset.in_process import Engine

COLUMNS = ("inside", "agnostic")
_GATE_SEEDS = range(900, 908)
_RISK_SEED, _TEST_SEED = 500, 1000


@dataclasses.dataclass(frozen=True)
class Settings:
    """tasks: by column. Prompts are per task and length; failing_prompts those of tasks that the full
    cache seldom answers, which are scored by KL alone."""

    tasks: dict[str, tuple[str, ...]]
    lengths: tuple[int, ...]
    budgets: tuple[int, ...]
    fit_budgets: tuple[int, ...]
    prompts: int
    failing_prompts: int
    calibration_prompts: int = 4
    risk_prompts: int = 6
    max_heads: int = 16
    targets: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)


@dataclasses.dataclass(frozen=True)
class HeadPart:
    """calibration and test: the same tasks on two texts; no prompt of one is a prompt of the other."""

    build: Build
    engine: Engine
    work: pathlib.Path
    calibration: Tasks
    test: Tasks
    probe: tuple[str, str]
    settings: Settings
    say: Say

    def run(self) -> dict:
        out: dict = {"lengths": list(self.settings.lengths), "budgets": list(self.settings.budgets),
                     "fit_budgets": list(self.settings.fit_budgets), "floor": FLOOR,
                     "revision": self.test.fingerprint.revision,
                     "layers_and_heads": [self.test.fingerprint.num_layers,
                                          self.test.fingerprint.num_qo_heads],
                     "calibration_prompts": self.settings.calibration_prompts,
                     "test_seeds": [_TEST_SEED, _TEST_SEED + self.settings.prompts], "columns": {}}
        for column in COLUMNS:
            out["columns"][column] = self._column(column, self.settings.tasks[column])
        return out

    def _column(self, column: str, names: Sequence[str]) -> dict:
        gate = {task: self._gate(task) for task in names}
        able = tuple(task for task in names if gate[task] >= FLOOR)
        self.say(f"{column}: the full cache answers {', '.join(able) or 'no task'}")
        # Without a task to learn from, the whole list is what there is.
        learn = able or tuple(names)
        plain = head_methods.plain_methods(self.engine, self.calibration)
        if column == "agnostic":
            plain |= head_methods.agnostic_methods(self.engine, self.calibration, self.probe)
        every = self._compile(column, learn)
        plain["budgets by head"] = head_baselines.HeadBudgets(head_baselines.retrieval_scores(
            [self.work / "records" / f"{task}-{length}-{seed}.safetensors" for task, seed, length in
             self._mixture(learn).prompts(range(self.settings.calibration_prompts))],
            self.test.fingerprint))
        tables, tasks, risk = {"all tasks": every}, {}, []
        for task in names:
            methods = dict(plain)
            methods[OURS] = head_methods.heads_run(self.engine, every.table)
            others = tuple(one for one in learn if one != task)
            if others and task in able:
                tables[f"without {task}"] = self._compile(f"{column}-without-{task}", others)
                methods[OTHERS] = head_methods.heads_run(self.engine,
                                                         tables[f"without {task}"].table)
            methods[SHUFFLED] = self._shuffled(every.table)
            tasks[task] = summarize(self._outcomes(column, task, task in able, methods),
                                    self.settings.budgets)
            if task in able:
                risk += self._risk(column, task, every.table)
            self.say(f"{column}: {task} measured")
        return {"tasks": tasks, "gate": gate,
                "tables": {name: describe(found) for name, found in tables.items()},
                "risk": summarize_risk(risk)}

    def _gate(self, task: str) -> float:
        """Share of prompts of the calibration text that the full cache answers; 1 where none is due."""
        shares = []
        for length in self.settings.lengths:
            for seed in _GATE_SEEDS[: max(1, self.settings.failing_prompts)]:
                prompt = self.calibration.prompt(task, seed, length)
                if prompt.scored == KL:
                    return 1.0
                shares.append(prompt.outcome(everything(prompt)).share)
        return float(np.mean(shares))

    def _compile(self, name: str, names: tuple[str, ...]) -> CompiledHeads:
        mixture = self._mixture(names, with_risk="without" not in name)
        return compile_heads(self.build, self.engine, self.calibration, mixture, self.work / "records",
                             name=name, version="1", budgets=self.settings.fit_budgets, say=self.say,
                             max_heads=self.settings.max_heads)

    def _mixture(self, names: tuple[str, ...], with_risk: bool = False) -> Mixture:
        return Mixture(names, self.settings.lengths, range(self.settings.calibration_prompts),
                       range(_RISK_SEED, _RISK_SEED + self.settings.risk_prompts * with_risk),
                       max(self.settings.budgets))

    def _shuffled(self, table: bytes) -> Run:
        """Another draw for every seed's prompt, so that no lucky one stands for all."""
        draws = [head_methods.heads_run(self.engine, head_methods.shuffled(table, seed))
                 for seed in range(8)]
        return lambda prompt, budget: draws[int(prompt.prompt_id.rsplit("-", 1)[1]) % len(draws)](
            prompt, budget)

    def _outcomes(self, column: str, task: str, able: bool, methods: dict[str, Run]) -> list[dict]:
        count = self.settings.prompts if able else self.settings.failing_prompts
        return [measure(self.work / "outcomes" / column, self.test, task, seed, length, methods,
                        self.settings.budgets)
                for length in self.settings.lengths for seed in range(_TEST_SEED, _TEST_SEED + count)]

    def _risk(self, column: str, task: str, table: bytes) -> list[dict]:
        settings = self.settings
        return [risk_of(self.work / "risk" / column, self.engine, self.test, table, task, seed, length,
                        settings.budgets, settings.targets, max(settings.budgets))
                for length in settings.lengths
                for seed in range(_TEST_SEED, _TEST_SEED + settings.prompts)]


def describe(found: CompiledHeads) -> dict:
    """What the report says of a table."""
    report = found.report
    return {name: report[name] for name in (
        "observations", "held_out_recall", "held_out_recall_by_task",
        "held_out_recall_by_task_and_length", "worst_task", "worst_task_recall",
        "worst_task_and_length", "uniform_recall", "shuffled_recall", "oracle_recall")} | {
            "measured_losses": found.measured_losses, "risk_points": len(found.risk),
            "settings": with_curve(found.table, None)[1]["observation_heads"]}
