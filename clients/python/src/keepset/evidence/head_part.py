"""One model's part of the report: gate, tables, tasks, risk. The small model and a Hugging Face model
alike."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from keepset.calibrate.__main__ import Build
from keepset.calibrate.head_prompts import KL, OutOfTime, RememberedTasks
from keepset.calibrate.observation_heads import (
    CompiledHeads,
    Mixture,
    Say,
    compile_heads,
    fit_heads,
    with_curve,
)
from keepset.evidence import head_baselines, head_methods
from keepset.evidence.head_compilerkv import COMPILED, CompilerKvSettings, compile_table
from keepset.evidence.head_measure import (
    FLOOR,
    everything,
    measure,
    risk_of,
    summarize,
    summarize_risk,
)
from keepset.evidence.head_methods import (
    NOVELTY,
    OTHERS,
    OTHERS_FIXED,
    OURS,
    SHUFFLED,
    UNCHOSEN,
    UNCHOSEN_OTHERS,
    Run,
)
from keepset.evidence.head_novelty import fit_novelty
from keepset.evidence.head_ways import held_out_ways
from keepset.in_process import Engine

AGNOSTIC = "agnostic"
_GATE_SEED, _RISK_SEED, _TEST_SEED = 900, 500, 1000
# Of the prompt that tells heads with echo and induction.
_REPEATED, _TIMES = 200, 4
# Left out of a prompt for which there is no time to measure them: the fewest that let the others stand.
_OPTIONAL = (COMPILED, UNCHOSEN, UNCHOSEN_OTHERS, NOVELTY)
_LEFT_OUT = [some for count in range(len(_OPTIONAL) + 1) for some in itertools.combinations(_OPTIONAL, count)]


@dataclasses.dataclass(frozen=True)
class Settings:
    """tasks: by column, of which AGNOSTIC asks after compression. Prompts are per task; those of the
    tests by length, failing_prompts the most of tasks that the full cache seldom answers (less than
    `floor` of their prompts), which are scored by KL alone. fit_lengths: of the prompts of the
    calibration text, some of `lengths`. fixed_heads: by column, how many observations a further table of
    the other tasks has, neither pooled nor chosen by loss, dilated by 12. compilerkv: of a compiled
    compilerkv table, which is measured on prompts of the length that it was calibrated at. untaught: tasks
    that no table learns from; they are tested by the column's. novelty_heads: of the table of AGNOSTIC that
    reads the key novelty of so many KV heads alone; 0 for none.
    """

    tasks: dict[str, tuple[str, ...]]
    lengths: tuple[int, ...]
    budgets: tuple[int, ...]
    fit_budgets: tuple[int, ...]
    prompts: tuple[int, ...]
    failing_prompts: int
    gate_prompts: int
    fit_lengths: tuple[int, ...]
    floor: float = FLOOR
    calibration_prompts: int = 4
    risk_prompts: int = 6
    max_heads: int = 16
    folds: int = 4
    fixed_heads: Mapping[str, int] = dataclasses.field(default_factory=dict)
    targets: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    compilerkv: CompilerKvSettings | None = None
    untaught: tuple[str, ...] = ()
    novelty_heads: int = 0


@dataclasses.dataclass(frozen=True)
class HeadPart:
    """calibration and test: the same tasks on two texts; no prompt of one is a prompt of the other. Where
    they are out of time the part says what it lacks, and another run goes on. source: names the model
    and the texts of the calibration."""

    build: Build
    engine: Engine
    work: pathlib.Path
    calibration: RememberedTasks
    test: RememberedTasks
    probe: tuple[str, str]
    settings: Settings
    say: Say
    source: str = ""

    def run(self) -> dict:
        settings = self.settings
        out: dict = {"lengths": list(settings.lengths), "budgets": list(settings.budgets),
                     "fit_budgets": list(settings.fit_budgets),
                     "fit_lengths": list(settings.fit_lengths), "floor": settings.floor,
                     "revision": self.test.fingerprint.revision,
                     "layers_and_heads": [self.test.fingerprint.num_layers,
                                          self.test.fingerprint.num_qo_heads],
                     "fixed_heads": dict(settings.fixed_heads),
                     "untaught": list(settings.untaught), "novelty_heads": settings.novelty_heads,
                     "calibration_prompts": settings.calibration_prompts,
                     "test_seeds": [_TEST_SEED, _TEST_SEED + max(settings.prompts)],
                     "prompts": list(settings.prompts), "columns": {}, "missing": []}
        compiled: dict[str, Run] = {}
        if settings.compilerkv:
            try:
                table, out["compilerkv"] = compile_table(
                    self.build, self.calibration, self.source, settings.compilerkv,
                    self.work / "compilerkv", self.say)
                compiled = {COMPILED: head_methods.compilerkv(self.engine, table)}
            except OutOfTime:
                self.say("compilerkv: out of time before its table")
        for column, names in settings.tasks.items():
            try:
                out["columns"][column] = self._column(column, names, compiled, out["missing"])
            except OutOfTime:
                out["missing"] += [{"column": column, "task": task, "length": length, "prompts": 0,
                                    "wanted": count} for task in names
                                   for length, count in zip(settings.lengths, settings.prompts)]
                self.say(f"{column}: out of time before its tables")
        return out

    def _column(self, column: str, names: Sequence[str], compiled: dict[str, Run],
                missing: list[dict]) -> dict:
        gate = {task: self._gate(task) for task in names}
        able = tuple(task for task in names if gate[task] >= self.settings.floor)
        self.say(f"{column}: the full cache answers {', '.join(able) or 'no task'}")
        # Without a task to learn from, the whole list is what there is.
        learn = tuple(task for task in able if task not in self.settings.untaught) or able or tuple(names)
        every = self._compile(column, learn)
        plain = self._plain(column, learn, compiled)
        tables, methods, novelty = {"all tasks": every}, {}, {}
        for task in names:
            methods[task] = plain | {OURS: head_methods.HeadsRun(self.engine, every.table)}
            others = tuple(one for one in learn if one != task)
            if others and task not in learn and task in able:
                methods[task][OTHERS] = methods[task][OURS]
            elif others and task in able:
                tables[f"without {task}"] = self._compile(f"{column}-without-{task}", others)
                methods[task] |= self._of_others(column, task, others, tables[f"without {task}"].table)
            methods[task][SHUFFLED] = head_methods.ShuffledRun(self.engine, every.table)
            methods[task][UNCHOSEN] = head_methods.HeadsRun(self.engine,
                                                            head_methods.unchosen(every.table))
            if others and task in able and column == AGNOSTIC and self.settings.novelty_heads:
                table, novelty[task] = self._novelty(others)
                methods[task][NOVELTY] = head_methods.HeadsRun(self.engine, table)
        ways = [self._held_out_ways(column, task, tables[f"without {task}"]) for task in names
                if f"without {task}" in tables]
        outcomes: dict[str, list[dict]] = {task: [] for task in names}
        risk: list[dict] = []
        for length, task in itertools.product(self.settings.lengths, names):
            found, wanted = self._outcomes(column, task, length, task in able,
                                           self._at(length, methods[task]))
            outcomes[task] += found
            if task in able and every.untold is None:
                risk += self._risk(column, task, length, every.table)
            if len(found) < wanted:
                missing.append({"column": column, "task": task, "length": length,
                                "prompts": len(found), "wanted": wanted})
            self.say(f"{column}: {task} at {length}: {len(found)} of {wanted} prompts")
        return {"tasks": {task: summarize(found, self.settings.budgets, self.settings.floor)
                          for task, found in outcomes.items() if found},
                "gate": gate, "tables": {name: describe(found) for name, found in tables.items()},
                "ways": [one for one in ways if one], "novelty_tables": novelty,
                "risk": summarize_risk(risk) | {"untold": every.untold}}

    def _of_others(self, column: str, task: str, others: tuple[str, ...], table: bytes) -> dict[str, Run]:
        """What no prompt of the task had a part in, and the heads of the same table unchosen."""
        found: dict[str, Run] = {OTHERS: head_methods.HeadsRun(self.engine, table)}
        if number := self.settings.fixed_heads.get(column):
            found[OTHERS_FIXED] = head_methods.HeadsRun(
                self.engine, self._fixed(f"{column}-without-{task}", others, number))
        return found | {UNCHOSEN_OTHERS: head_methods.HeadsRun(self.engine, head_methods.unchosen(table))}

    def _novelty(self, names: tuple[str, ...]) -> tuple[bytes, dict]:
        return fit_novelty(self.build, self._records(names), self.work / "novelty",
                           "novelty-of-" + "-".join(names), self.settings.novelty_heads,
                           self.settings.fit_budgets, self.say)

    def _held_out_ways(self, column: str, task: str, table: CompiledHeads) -> dict | None:
        """On the calibration prompts of the task that the table was compiled without."""
        prompts = [(seed, length) for _, seed, length in
                   self._mixture((task,)).prompts(range(self.settings.calibration_prompts))]
        with contextlib.suppress(OutOfTime):
            return held_out_ways(self.work / "ways" / column, self.engine, self.calibration, table.ways, task,
                                 prompts, self.settings.fit_budgets)
        return None

    def _at(self, length: int, methods: dict[str, Run]) -> dict[str, Run]:
        """Those that are measured at a length."""
        settings = self.settings.compilerkv
        return {name: run for name, run in methods.items()
                if name != COMPILED or (settings and settings.length == length)}

    def _plain(self, column: str, learn: tuple[str, ...], compiled: dict[str, Run]) -> dict[str, Run]:
        """What is compared; heads that retrieve are told by the records of `learn`."""
        plain = head_methods.plain_methods(self.engine, self.calibration, compiled)
        if column == AGNOSTIC:
            plain |= head_methods.agnostic_methods(self.engine, self.calibration, self.probe)
        retrieval = head_baselines.retrieval_scores(self._records(learn), self.test.fingerprint)
        repeating = head_baselines.echo_and_induction(
            self.calibration.repetition(_REPEATED, _TIMES), _REPEATED)
        return plain | {
            "budgets by head": head_baselines.HeadBudgets(retrieval),
            "retrieval heads full, others streaming (DuoAttention-like)":
                head_baselines.StreamingHeads(retrieval),
            "echo and induction heads full, others streaming (RazorAttention-like)":
                head_baselines.StreamingHeads(repeating)}

    def _gate(self, task: str) -> float:
        """Share of prompts of the calibration text that the full cache answers; 1 where none is due."""
        folder = self.work / "gate"
        folder.mkdir(parents=True, exist_ok=True)
        shares = []
        for length, seed in itertools.product(self.settings.fit_lengths, range(
                _GATE_SEED, _GATE_SEED + self.settings.gate_prompts)):
            path = folder / f"{task}-{length}-{seed}.json"
            if not path.exists():
                prompt = self.calibration.prompt(task, seed, length)
                share = None if prompt.scored == KL else prompt.outcome(everything(prompt)).share
                path.write_text(json.dumps(share))
            shares.append(json.loads(path.read_text()))
            if shares[-1] is None:
                return 1.0
        return float(np.mean(shares))

    def _compile(self, name: str, names: tuple[str, ...]) -> CompiledHeads:
        mixture = self._mixture(names, with_risk="without" not in name)
        return compile_heads(self.build, self.engine, self.calibration, mixture, self.work / "records",
                             name=name, version="1", budgets=self.settings.fit_budgets, say=self.say,
                             max_heads=self.settings.max_heads, folds=self.settings.folds)

    def _fixed(self, name: str, names: tuple[str, ...], number: int) -> bytes:
        return fit_heads(self.build, self._records(names),
                         self.work / "records" / f"{name}.fixed.safetensors", name=name, version="1",
                         budgets=self.settings.fit_budgets, max_heads=number, num_heads=number,
                         pool_kernel=1, dilate=12, folds=2, say=self.say)[0]

    def _records(self, names: tuple[str, ...]) -> list[pathlib.Path]:
        return [self.work / "records" / f"{task}-{length}-{seed}.safetensors" for task, seed, length in
                self._mixture(names).prompts(range(self.settings.calibration_prompts))]

    def _mixture(self, names: tuple[str, ...], with_risk: bool = False) -> Mixture:
        return Mixture(names, self.settings.fit_lengths, range(self.settings.calibration_prompts),
                       range(_RISK_SEED, _RISK_SEED + self.settings.risk_prompts * with_risk),
                       max(self.settings.budgets))

    def _seeds(self, length: int) -> range:
        count = self.settings.prompts[self.settings.lengths.index(length)]
        return range(_TEST_SEED, _TEST_SEED + count)

    def _outcomes(self, column: str, task: str, length: int, able: bool, methods: dict[str, Run]
                  ) -> tuple[list[dict], int]:
        """Of as many prompts as there is time for, and how many there should be."""
        seeds = self._seeds(length)
        if not able:
            seeds = seeds[: self.settings.failing_prompts]
        found = []
        for seed in seeds:
            for left_out in _LEFT_OUT:
                chosen = {name: run for name, run in methods.items() if name not in left_out}
                with contextlib.suppress(OutOfTime):
                    found.append(measure(self.work / "outcomes" / column, self.test, task, seed, length,
                                         chosen, self.settings.budgets))
                    break
        return found, len(seeds)

    def _risk(self, column: str, task: str, length: int, table: bytes) -> list[dict]:
        settings, found = self.settings, []
        for seed in self._seeds(length):
            with contextlib.suppress(OutOfTime):
                found.append(risk_of(self.work / "risk" / column, self.engine, self.test, table, task,
                                     seed, length, settings.budgets, settings.targets,
                                     max(settings.budgets)))
        return found


def describe(found: CompiledHeads) -> dict:
    """What the report says of a table."""
    report = found.report
    return {name: report[name] for name in (
        "observations", "held_out_recall", "held_out_recall_by_task",
        "held_out_recall_by_task_and_length", "worst_task", "worst_task_recall",
        "worst_task_and_length", "uniform_recall", "shuffled_recall", "oracle_recall")} | {
            "unseen_task_recall": report["unseen_task_recall"] or {},
            "measured_losses": found.measured_losses, "loss_errors": found.loss_errors, "risk_points": len(found.risk),
            "settings": with_curve(found.table, None)[1]["observation_heads"]}
