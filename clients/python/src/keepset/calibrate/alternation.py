"""Coupled alternation: heads against a frozen gate, the gate against frozen heads, until nothing changes."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from keepset import table_file
from keepset.calibrate import CalibrationError
from keepset.calibrate.compiler import Compiler
from keepset.calibrate.convergence import RoundChange, change
from keepset.calibrate.records import StepFile
from keepset.calibrate.rollouts import Weights

Say = Callable[[str], None]
# In rounds.json: the table of ones and most permissive gates that a run starts from.
NEUTRAL = "neutral"


class Measurer(Protocol):
    """Measures the entries of a table one by one; in this process or spread over workers."""

    def count(self, kind: str) -> int: ...

    def run(self, kind: str, frozen: Weights, paired_policy: str, file: StepFile,
            progress: Callable[[int], None]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The table in force at the end, after how many rounds, and whether its actions had settled."""

    table: bytes
    rounds: int
    settled: bool
    num_records: int
    tolerance: float
    changes: tuple[RoundChange, ...]  # of every round
    coverage: dict | None = None  # of the risk cells by the chosen prompts; None: nothing was chosen


def alternate(rollouts: Measurer, compiler: Compiler, out: pathlib.Path, neutral: Weights, *, name: str,
              version: str, max_rounds: int, tolerance: float, budgets: list[int],
              settings: Mapping[str, object], say: Say) -> Outcome:
    """Runs rounds of a head step and a gate step and writes the records of the last ones to `out`.

    A run has settled when a round changes nothing, or nothing worth more than `tolerance` nats of mean
    reward in any state (convergence.py). `budgets` ascend, as in the table.

    Beside `out` stands `<out>.steps`: settings, the records and the table of every step, and in
    rounds.json which table each `paired_policy` of a record names. Called again with the same settings
    after an interruption it goes on where the records end; other settings are refused.
    """
    steps = steps_of(out)
    steps.mkdir(parents=True, exist_ok=True)
    _check_settings(steps / "settings.json", settings)
    group_size = compiler.model.num_qo_heads // compiler.model.num_kv_heads
    policies: dict[str, str] = {}
    changes: list[RoundChange] = []
    num_records: list[int] = []

    def measure(label: str, kind: str, frozen: Weights, frozen_file: str) -> pathlib.Path:
        path = steps / f"{label}.jsonl"
        paired = f"{name}/{label.split('-')[0]}@{frozen.digest()}"
        policies[paired] = frozen_file
        with StepFile(path, paired) as file:
            progress = Progress(f"round {label}", rollouts.count(kind), len(file), say)
            rollouts.run(kind, frozen, paired, file, progress)
            progress.close(len(file))
            num_records.append(len(file))
        return path

    def compile_(label: str, head: pathlib.Path, gate: pathlib.Path) -> tuple[bytes, Weights]:
        path = steps / f"{label}.safetensors"
        compiler.compile([head, gate], path, name=name, version=version)
        data = path.read_bytes()
        return data, Weights.of(table_file.read_table(data))

    # The fit needs both kinds of record, so the gate is measured against neutral heads first.
    gate_records = measure("0-gate", "gate", neutral, NEUTRAL)
    weights, weights_file, settled, rounds = neutral, NEUTRAL, False, 0
    for rounds in range(1, max_rounds + 1):
        head_records = measure(f"{rounds}-head", "head", weights, weights_file)
        _, with_heads = compile_(f"{rounds}-head", head_records, gate_records)
        gate_records = measure(f"{rounds}-gate", "gate", with_heads, f"{rounds}-head.safetensors")
        data, compiled = compile_(f"{rounds}-gate", head_records, gate_records)
        changes.append(change(weights, compiled, (head_records, gate_records), budgets, group_size,
                              compiler.grids))
        # The first round leaves the neutral table, which no state chose.
        settled = rounds > 1 and changes[-1].within(tolerance)
        weights, weights_file = compiled, f"{rounds}-gate.safetensors"
        _say_change(changes[-1], rounds, say)
        if settled:
            break
    (steps / "rounds.json").write_text(json.dumps(
        {"rounds": [one.to_json() for one in changes], "settled": settled, "tolerance": tolerance,
         "table": weights_file, "paired_policies": policies}, indent=1) + "\n")
    with out.open("wb") as file:
        for path in (head_records, gate_records):
            with path.open("rb") as source:
                shutil.copyfileobj(source, file)
    return Outcome(data, rounds, settled, sum(num_records), tolerance, tuple(changes))


def steps_of(out: pathlib.Path) -> pathlib.Path:
    """The folder of a run's steps."""
    return out.with_name(out.name + ".steps")


def _say_change(one: RoundChange, number: int, say: Say) -> None:
    worth = "nothing" if one.largest_difference is None else f"at most {one.largest_difference:.4f} nats"
    say(f"round {number}: {one.changed_head_states + one.changed_gate_states} of {one.states} states "
        f"changed, worth {worth} each"
        + (f"; {one.unmeasured} of them not measured" if one.unmeasured else ""))


def _check_settings(path: pathlib.Path, settings: Mapping[str, object]) -> None:
    wanted = json.loads(json.dumps(dict(settings)))
    if path.exists():
        found = json.loads(path.read_text())
        if found != wanted:
            changed = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
            raise CalibrationError(f"{path.parent} holds a run with other settings ({', '.join(changed)}): "
                                   "choose another --out or remove it")
    else:
        path.write_text(json.dumps(wanted, indent=1) + "\n")


class Progress:
    """Records done and time left: a line that is rewritten on a terminal, one line at the end elsewhere."""

    def __init__(self, label: str, total: int, already: int, say: Say):
        self._label, self._total, self._already, self._say = label, total, already, say
        self._started = self._shown = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if not sys.stderr.isatty() or now - self._shown < 0.2:
            return
        self._shown = now
        left = (now - self._started) * (self._total - done) / max(1, done - self._already)
        print(f"\r{self._label}: {done}/{self._total} records, {left:.0f} s left   ", end="",
              file=sys.stderr, flush=True)

    def close(self, done: int) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        resumed = f", {self._already} of them from an earlier run" if self._already else ""
        self._say(f"{self._label}: {done} records in {time.monotonic() - self._started:.1f} s{resumed}")
