"""Compiles an observation_heads table: rollouts, fit, choice by measured loss, risk curve.

Every prompt is read once and written as one observation record; `keepset tables compile --kind
observation_heads` chooses heads, rows and weights by the needed mass they find. Of the sizes it is asked
for, the one with the least measured loss under compression stands. An interrupted run goes on where it
stopped when it is started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import safetensors.numpy

from keepset import ModelFingerprint, table_file
from keepset.calibrate import CalibrationError
from keepset.calibrate.__main__ import Build
from keepset.calibrate.head_prompts import (
    ConstructedTasks,
    HeadPrompt,
    SmallModelTasks,
    candidate_scores,
)
from keepset.eval import constructed
from keepset.eval.small_model import SmallModel
from keepset.in_process import Engine, Kept

Say = Callable[[str], None]
_SIZES = (1, 2, 4, 8, 16)
# An answer counts as lost when the full cache gets it and the kept set does not.
_UNIT_CURVE = [[0.0, 0.0], [1.0, 1.0]]


class Tasks(Protocol):
    """A model with prompts made from seeds: the same task and seed is the same prompt."""

    fingerprint: ModelFingerprint

    def prompt(self, task: str, seed: int) -> HeadPrompt: ...


@dataclasses.dataclass(frozen=True)
class CompiledHeads:
    """The table's bytes, the compiler's report, and measured loss by number of observations."""

    table: bytes
    report: dict
    loss_by_size: dict[str, float]
    risk: list[dict]


def write_record(prompt: HeadPrompt, path: pathlib.Path) -> None:
    """One observation record; f16 holds scores to about 3 digits, which ranks positions well enough."""
    candidates, scores = candidate_scores(prompt)
    protected = [[0, prompt.protect_sink]] if prompt.protect_sink else []
    if prompt.protect_window:
        protected.append([prompt.seq_len - prompt.protect_window, prompt.seq_len])
    document = {
        "format": "keepset.observations", "format_version": 1, "model": prompt.model.to_json(),
        "prompt_id": prompt.prompt_id, "task": prompt.task, "seq_len": prompt.seq_len,
        "protected": protected,
    }  # fmt: skip
    if prompt.probe is not None:
        document["probe"] = {"name": prompt.probe[0], "text": prompt.probe[1]}
    table_file.write_atomically(path, safetensors.numpy.save({
        "heads": np.array([one[:2] for one in candidates], np.int32),
        "rows": np.array([one[2] for one in candidates], np.int32),
        "scores": scores.astype(np.float16), "need": prompt.need.astype(np.float32),
    }, metadata={"keepset": json.dumps(document)}))  # fmt: skip


def keep(engine: Engine, prompt: HeadPrompt, table: bytes, budget: int,
         parameters: dict[str, object] | None = None) -> Kept:
    """What observation_heads keeps of a prompt; sends the layers that the table reads alone."""
    document = with_curve(table, None)[1]
    uses_probe = "probe" in document["observation_heads"]
    chosen: dict[str, object] = {**prompt.parameters(uses_probe), **(parameters or {})}
    needs = engine.input_needs(model=prompt.model, policy="observation_heads", table=table,
                               parameters=chosen)
    read = {one["layer"]: prompt.layers[one["layer"]] for one in needs["layers"]}
    rows = np.asarray(prompt.row_positions)
    if not uses_probe and (rows >= prompt.seq_len).any():
        used = rows < prompt.seq_len
        rows = rows[used]
        read = {index: dataclasses.replace(layer, q_window=np.ascontiguousarray(
            layer.q_window[:, used])) for index, layer in read.items()}
    return engine.keep(model=prompt.model, policy="observation_heads", layers=read,
                       seq_len=prompt.seq_len, budget_tokens=budget,
                       softmax_scale=prompt.softmax_scale, row_positions=rows, table=table,
                       parameters=chosen, protect_sink=prompt.protect_sink,
                       protect_window=prompt.protect_window)


def heads_table(model: ModelFingerprint, name: str, observations: Sequence[tuple[int, int, int, float]],
                *, source: str = "hand-written", pool_kernel: int = 1, dilate: int = 0,
                merge: str = "sum", normalization: str = "max",
                probe: tuple[str, str] | None = None) -> bytes:
    """The bytes of an observation_heads table; observations are (layer, head, rows, weight)."""
    settings: dict = {"pool_kernel": pool_kernel, "dilate": dilate, "merge": merge,
                      "normalization": normalization}
    if probe is not None:
        settings["probe"] = {"name": probe[0], "text": probe[1]}
    document = {
        "format": "keepset.table", "format_version": 1, "kind": "observation_heads", "name": name,
        "version": "1", "model": model.to_json(), "algorithm": {"name": name},
        "provenance": {"source": source}, "observation_heads": settings,
    }  # fmt: skip
    return safetensors.numpy.save({
        "heads": np.array([one[:2] for one in observations], np.int32),
        "rows": np.array([one[2] for one in observations], np.int32),
        "weights": np.array([one[3] for one in observations], np.float32),
    }, metadata={"keepset": json.dumps(document)})  # fmt: skip


def with_curve(table: bytes, curve: list[list[float]] | None, **keys: object) -> tuple[bytes, dict]:
    """The table with another risk curve (None: as it is) and top-level keys; and its JSON document."""
    size = int.from_bytes(table[:8], "little")
    document = json.loads(json.loads(table[8 : 8 + size])["__metadata__"]["keepset"])
    if curve is None and not keys:
        return table, document
    if curve is not None:
        document["observation_heads"]["risk"] = {"curve": curve}
    document |= keys
    return safetensors.numpy.save(safetensors.numpy.load(table),
                                  metadata={"keepset": json.dumps(document)}), document


def risk_curve(points: Sequence[tuple[float, bool]]) -> list[list[float]]:
    """Isotonic regression of misses on outside mass, at most 16 steps: [[outside_mass, miss_rate], ..].

    Pools neighbours until rates never fall; every pool stands at its mean mass.
    """
    pools: list[list[float]] = []  # sum of mass, misses, count
    for mass, missed in sorted(points):
        pools.append([mass, float(missed), 1.0])
        while len(pools) > 1 and pools[-2][1] / pools[-2][2] >= pools[-1][1] / pools[-1][2]:
            last = pools.pop()
            pools[-1] = [a + b for a, b in zip(pools[-1], last)]
    curve: list[list[float]] = []
    for mass, missed, count in pools:
        point = [round(mass / count, 6), round(missed / count, 6)]
        if not curve or point[0] > curve[-1][0]:
            curve.append(point)
    return curve


def compile_heads(build: Build, engine: Engine, tasks: Tasks, names: Sequence[str], seeds: range,
                  work: pathlib.Path, *, name: str, version: str, budgets: Sequence[int], say: Say,
                  risk_seeds: range = range(0), max_heads: int = 16) -> CompiledHeads:
    """From prompts of `names` x `seeds` to a table; `risk_seeds` are held out for the risk curve."""
    work.mkdir(parents=True, exist_ok=True)
    wanted = [(task, seed) for task in names for seed in seeds]
    records = []
    for done, (task, seed) in enumerate(wanted):
        path = work / f"{task}-{seed}.safetensors"
        if not path.exists():
            write_record(tasks.prompt(task, seed), path)
            say(f"{name}: record {done + 1} of {len(wanted)}")
        records.append(path)
    tables: dict[str, tuple[bytes, dict]] = {}
    validated = _fit(build, records, work / f"{name}.safetensors", name=name, version=version,
                     budgets=budgets, max_heads=max_heads)
    tables[str(len(validated[1]["observations"]))] = validated
    # The other sizes pool and dilate as was validated.
    for size in (one for one in _SIZES if one <= max_heads and str(one) not in tables):
        found = _fit(build, records, work / f"{name}.safetensors", name=name, version=version,
                     budgets=budgets, max_heads=size, like=validated[1]["chosen"], num_heads=size)
        tables.setdefault(str(len(found[1]["observations"])), found)
    losses = _losses(engine, tasks, names, seeds, budgets, tables, work / f"{name}.losses.json", say)
    best = min(tables, key=lambda size: (round(losses[size], 3), int(size)))
    table, report = tables[best]
    points = _risk_points(engine, tasks, names, risk_seeds, budgets, table,
                          work / f"{name}.risk.json", say)
    if points:
        curve = risk_curve([(one["outside_mass"], one["missed"]) for one in points])
        table = with_curve(table, curve)[0]
    return CompiledHeads(table, report, losses, points)


def _fit(build: Build, records: Sequence[pathlib.Path], table: pathlib.Path, *, name: str,
         version: str, budgets: Sequence[int], max_heads: int, num_heads: int = 0,
         like: dict | None = None) -> tuple[bytes, dict]:
    command = [str(build.keepset), "tables", "compile", "--kind", "observation_heads",
               *map(str, records), "--name", name, "--version", version, "-o", str(table),
               "--max-heads", str(max_heads), "--num-heads", str(num_heads), "--json"]
    for budget in budgets:
        command += ["--budget", str(budget)]
    if like is not None:
        command += ["--pool-kernel", str(like["pool_kernel"]), "--dilate", str(like["dilate"]),
                    "--folds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CalibrationError(f"keepset tables compile: {done.stderr.strip()}")
    return table.read_bytes(), json.loads(done.stdout.splitlines()[0])["report"]


def _losses(engine: Engine, tasks: Tasks, names: Sequence[str], seeds: range, budgets: Sequence[int],
            tables: dict[str, tuple[bytes, dict]], cache: pathlib.Path, say: Say) -> dict[str, float]:
    """Mean loss under compression of every table, on at most 4 prompts per task; kept for a restart."""
    key = {size: table_file.digest(table) for size, (table, _) in tables.items()}
    if cache.exists():
        kept = json.loads(cache.read_text())
        if list(kept["losses"]) == list(key):
            return kept["losses"]
    losses: dict[str, list[float]] = {size: [] for size in tables}
    for task in names:
        for seed in list(seeds)[:4]:
            prompt = tasks.prompt(task, seed)
            for size, (table, _) in tables.items():
                for budget in budgets:
                    sets = keep(engine, prompt, table, budget).sets()
                    losses[size].append(prompt.outcome(sets).loss)
    means = {size: float(np.mean(values)) for size, values in losses.items()}
    say("measured loss by number of observations: "
        + ", ".join(f"{size}: {value:.3f}" for size, value in means.items()))
    cache.write_text(json.dumps({"losses": means}))
    return means


def _risk_points(engine: Engine, tasks: Tasks, names: Sequence[str], seeds: range,
                 budgets: Sequence[int], table: bytes, cache: pathlib.Path, say: Say) -> list[dict]:
    """Outside mass and whether the answer is lost, of held-out prompts at every budget."""
    if not len(seeds):
        return []
    if cache.exists():
        return json.loads(cache.read_text())
    probing = with_curve(table, _UNIT_CURVE)[0]
    points = []
    for task in names:
        for seed in seeds:
            prompt = tasks.prompt(task, seed)
            everything = [np.arange(prompt.seq_len)] * len(prompt.layers)
            if not prompt.outcome(everything).exact:
                continue
            for budget in budgets:
                kept = keep(engine, prompt, probing, budget)
                points.append({"task": task, "seed": seed, "budget": budget,
                               "outside_mass": kept.outside_mass,
                               "missed": not prompt.outcome(kept.sets()).exact})
    say(f"risk: {sum(one['missed'] for one in points)} of {len(points)} held-out answers lost")
    cache.write_text(json.dumps(points))
    return points


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m keepset.calibrate.observation_heads",
                                     description=__doc__)
    parser.add_argument("--model", choices=("small", "constructed"), required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the records; kept")
    parser.add_argument("--table", type=pathlib.Path, required=True, help="where the table goes")
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build/release"))
    parser.add_argument("--tasks", nargs="+", help="default: all of the model")
    parser.add_argument("--prompts", type=int, default=8, help="of every task")
    parser.add_argument("--risk-prompts", type=int, default=8,
                        help="held out for the risk curve; 0: none")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--max-heads", type=int, default=16)
    parser.add_argument("--name", default="heads")
    parser.add_argument("--version", default="1")
    options = parser.parse_args()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    tasks: SmallModelTasks | ConstructedTasks
    if options.model == "small":
        tasks = SmallModelTasks(SmallModel.load())
    else:
        tasks = ConstructedTasks(constructed.marker_model("mass", permute_heads=True, seed=5))
    names = options.tasks or list(tasks.TASKS)
    build = Build(options.build)
    try:
        with Engine(build.library) as engine:
            found = compile_heads(
                build, engine, tasks, names, range(options.prompts), options.out,
                name=options.name, version=options.version, budgets=options.budgets, say=say,
                risk_seeds=range(500, 500 + options.risk_prompts), max_heads=options.max_heads)
    except CalibrationError as error:
        say(f"keepset.calibrate.observation_heads: {error}")
        return 3
    except KeyboardInterrupt:
        say(f"\ninterrupted; the same command goes on from {options.out}")
        return 130
    table_file.write_atomically(options.table, found.table)
    say(f"table {table_file.digest(found.table)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
