"""Compiles an observation_heads table: rollouts, fit, choice by measured loss, risk curve.

Every prompt is read once and written as one observation record; `keepset tables compile --kind
observation_heads` chooses heads, rows and weights by the needed mass they find. Of the ways to pool and
dilate and the numbers of heads that it is asked for, those with the least measured loss under compression
stand, and of equals the one that finds most in tasks it was not chosen on. An interrupted run goes on
where it stopped when it is started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import safetensors.numpy

from keepset import ModelFingerprint, table_file
from keepset.calibrate import CalibrationError
from keepset.calibrate.__main__ import Build
from keepset.calibrate.head_prompts import (
    EXACT,
    ConstructedTasks,
    HeadPrompt,
    Tasks,
    candidate_scores,
)
from keepset.calibrate.small_head_tasks import SmallModelTasks
from keepset.eval import constructed
from keepset.eval.small_model import SmallModel
from keepset.in_process import Engine, Kept

Say = Callable[[str], None]
_SIZES = (1, 4, 16)
_FOLDS = 4
_POOL_KERNELS = (1, 5)
_DILATIONS = (0, 4, 12)
# An answer counts as lost when the full cache gets it and the kept set does not.
_UNIT_CURVE = [[0.0, 0.0], [1.0, 1.0]]
# Outside masses at which the gate is tried, so that misses have a curve.
_GATE_MASSES = (0.002, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
# A task that loses more of its answers at the least of these masses is not told by the mass.
_UNTOLD = 0.25
# Width of a step of the curve, which the engine reads by linear interpolation.
_STEP = 1e-6


@dataclasses.dataclass(frozen=True)
class Ways:
    """A table of each way to pool and dilate, by "NUMBER at POOLING, DILATION": `chosen` stood, `least` has the
    least measured loss. Before the number of observations was chosen."""

    tables: dict[str, bytes]
    chosen: str
    least: str


@dataclasses.dataclass(frozen=True)
class CompiledHeads:
    """The table's bytes, the compiler's report, and measured losses by "NUMBER at POOLING, DILATION".

    loss_errors: by the same names the standard error of the mean difference from the least of them, paired
    over the prompts. untold: why the table has no risk curve, or None.
    """

    table: bytes
    report: dict
    measured_losses: dict[str, float]
    risk: list[dict]
    untold: str | None = None
    loss_errors: dict[str, float] = dataclasses.field(default_factory=dict)
    ways: Ways | None = None


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
    read = {one.layer: prompt.layers[one.layer] for one in needs.layers}
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


def risk_curve(points: Sequence[dict]) -> list[list[float]]:
    """[[outside_mass, miss_rate], ..] of the gate's points at several allowed masses.

    Conformal risk control (arXiv:2208.02814): a prompt counts as lost at a mass when it is lost there or at
    a smaller one, and (lost + 1) of (prompts + 1) is the rate. A gate that is set where the curve is at most
    a target misses at most so many of prompts that are drawn like these, few as they may be. The curve is a
    step function: between two masses it stands at the rate of the larger one, and above the largest one at
    1, for nothing is known of what was not tried.
    """
    lost_from = _lost_from(points)
    curve: list[list[float]] = []
    for mass in sorted({one["allowed"] for one in points}):
        lost = sum(one <= mass for one in lost_from.values())
        rate = round((lost + 1) / (len(lost_from) + 1), 6)
        if not curve:
            curve.append([mass, rate])
        elif rate > curve[-1][1]:
            curve += [[before, curve[-1][1]], [before + _STEP, rate]] if before > curve[-1][0] else [
                [before + _STEP, rate]]
        before = mass
    if curve[-1][1] < 1 and before + _STEP <= 1:
        curve += ([[before, curve[-1][1]]] if before > curve[-1][0] else []) + [[before + _STEP, 1.0]]
    return curve


def not_told(points: Sequence[dict]) -> str | None:
    """Why no miss rate may be read off the outside mass: a task whose answers are lost however little is left
    outside. Mixed with other tasks it would look like a small rate for all."""
    least = min(one["allowed"] for one in points)
    lost_from = _lost_from(points)
    for task in sorted({one["task"] for one in points}):
        first = [mass for (name, *_), mass in lost_from.items() if name == task]
        lost = sum(one <= least for one in first)
        if lost > _UNTOLD * len(first):
            return (f"of task {task} {lost} of {len(first)} held-out answers are lost where as little mass "
                    "as the gate can is left outside")
    return None


def _lost_from(points: Sequence[dict]) -> dict[tuple[str, int, int], float]:
    """By (task, seed, length): the smallest allowed mass at which the answer is lost, infinity for none."""
    found: dict[tuple[str, int, int], float] = {}
    for one in points:
        prompt = one["task"], one["seed"], one["length"]
        found[prompt] = min(found.get(prompt, math.inf), one["allowed"] if one["missed"] else math.inf)
    return found


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The prompts that a table is compiled from: every task at every length from every seed.

    risk_seeds: held out, for the risk curve; risk_budget: the most that its gate may keep, or else the
    largest budget of the fit.
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    seeds: range
    risk_seeds: range = range(0)
    risk_budget: int = 0

    def prompts(self, seeds: Sequence[int]) -> Iterator[tuple[str, int, int]]:
        """(task, seed, length)"""
        return itertools.product(self.names, seeds, self.lengths)


def compile_heads(build: Build, engine: Engine, tasks: Tasks, mixture: Mixture, work: pathlib.Path, *,
                  name: str, version: str, budgets: Sequence[int], say: Say, max_heads: int = 16,
                  folds: int = _FOLDS) -> CompiledHeads:
    """From the mixture's prompts to a table. Records stay in `work`, for other mixtures too.

    folds: of the validation that says how many observations a way to pool and dilate has.
    """
    work.mkdir(parents=True, exist_ok=True)
    wanted = list(mixture.prompts(mixture.seeds))
    records = []
    for done, (task, seed, length) in enumerate(wanted):
        path = work / f"{task}-{length}-{seed}.safetensors"
        if not path.exists():
            write_record(tasks.prompt(task, seed, length), path)
            say(f"{name}: record {done + 1} of {len(wanted)}")
        records.append(path)

    def fit(number: int, pool_kernel: int, dilate: int) -> tuple[str, tuple[bytes, dict]]:
        table = fit_heads(
            build, records, work / f"{name}.{number}-{pool_kernel}-{dilate}.safetensors", name=name,
            version=version, budgets=budgets, max_heads=number or max_heads, num_heads=number,
            pool_kernel=pool_kernel, dilate=dilate, folds=2 if number else folds, say=say)
        return f"{len(table[1]['observations'])} at {pool_kernel}, {dilate}", table

    # Every way to pool and dilate finds its number of observations without a run of the model; by measured
    # loss one of them stands, and then one of the other numbers.
    tables = dict(fit(0, *way) for way in itertools.product(_POOL_KERNELS, _DILATIONS))
    losses = _losses(engine, tasks, mixture, budgets, tables, work / f"{name}.ways.json", say)
    stood = _best(losses, tables)
    ways = Ways({one: table for one, (table, _) in tables.items()}, stood,
                min(losses, key=lambda one: float(np.mean(losses[one]))))
    chosen = tables[stood][1]["chosen"]
    way = chosen["pool_kernel"], chosen["dilate"]
    sized = {stood: tables[stood]}
    sized = dict(fit(size, *way) for size in _SIZES if size <= max_heads) | sized
    losses |= _losses(engine, tasks, mixture, budgets, sized, work / f"{name}.losses.json", say)
    table, report = (tables | sized)[_best(losses, tables | sized)]
    points = _risk_points(engine, tasks, mixture, mixture.risk_budget or max(budgets), table,
                          work / f"{name}.risk.json", say)
    untold = not_told(points) if points else None
    if untold is not None:
        say(f"{name}: no risk curve: {untold}")
        document = with_curve(table, None)[1]
        table = with_curve(table, None, provenance=document["provenance"] | {"no_risk_curve": untold})[0]
    elif points:
        table = with_curve(table, risk_curve(points))[0]
    means = {size: float(np.mean(values)) for size, values in losses.items()}
    least = losses[min(means, key=lambda one: means[one])]
    errors = {size: _difference(values, least)[1] for size, values in losses.items()}
    return CompiledHeads(table, report, means, points, untold, errors, ways)


def _best(losses: dict[str, list[float]], tables: dict[str, tuple[bytes, dict]]) -> str:
    """Of the tables that lose as little as the best does, as far as these prompts tell (the mean difference,
    paired, is within its standard error), the one with the largest recall of the worst unseen task, then the
    largest mean over unseen tasks, then the most observations. With one task there is no unseen one: the
    least loss to three digits, with the fewest observations."""
    means = {one: float(np.mean(values)) for one, values in losses.items()}
    if any("worst_unseen_task_recall" not in tables[one][1]["chosen"] for one in losses):
        return min(means, key=lambda one: (round(means[one], 3), int(one.split()[0])))
    best = min(means, key=lambda one: means[one])

    def is_equal(one: str) -> bool:
        more, error = _difference(losses[one], losses[best])
        return more <= error

    def transfer(one: str) -> tuple[float, float, int]:
        chosen = tables[one][1]["chosen"]
        return (chosen["worst_unseen_task_recall"],
                chosen["unseen_task_recall_by_num_heads"][chosen["num_heads"] - 1], int(one.split()[0]))

    return max(filter(is_equal, losses), key=transfer)


def _difference(losses: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Mean of the paired differences and its standard error."""
    more = np.subtract(losses, base)
    return float(more.mean()), float(more.std()) / math.sqrt(len(more))


def fit_heads(build: Build, records: Sequence[pathlib.Path], table: pathlib.Path, *, name: str,
              version: str, budgets: Sequence[int], max_heads: int, num_heads: int, pool_kernel: int,
              dilate: int, folds: int, say: Say) -> tuple[bytes, dict]:
    """By recall alone: the bytes of a table, which go to `table`, and the compiler's report.

    num_heads: 0 for the validated number. What the same build made of the same records and settings before
    stands.
    """
    command = [str(build.keepset), "tables", "compile", "--kind", "observation_heads",
               *map(str, records), "--name", name, "--version", version, "-o", str(table),
               "--max-heads", str(max_heads), "--num-heads", str(num_heads), "--json",
               "--pool-kernel", str(pool_kernel), "--dilate", str(dilate), "--folds", str(folds)]
    for budget in budgets:
        command += ["--budget", str(budget)]
    # Another build may choose otherwise.
    asked = [hashlib.sha256(build.keepset.read_bytes()).hexdigest(), command[1:],
             [record.stat().st_mtime_ns for record in records]]
    told = table.with_suffix(".json")
    if told.exists() and (known := json.loads(told.read_text()))["asked"] == asked:
        return table.read_bytes(), known["report"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CalibrationError(f"keepset tables compile: {done.stderr.strip()}")
    report = json.loads(done.stdout.splitlines()[0])["report"]
    told.write_text(json.dumps({"asked": asked, "report": report}))
    say(f"{name}: {num_heads or 'any number'} at {pool_kernel}, {dilate} fitted")
    return table.read_bytes(), report


def _losses(engine: Engine, tasks: Tasks, mixture: Mixture, budgets: Sequence[int],
            tables: dict[str, tuple[bytes, dict]], cache: pathlib.Path, say: Say
            ) -> dict[str, list[float]]:
    """Loss under compression of every table, mean over budgets, on each of at most 4 prompts per task and
    length; kept for a restart."""
    key = {size: table_file.digest(undated(table)) for size, (table, _) in tables.items()}
    if cache.exists():
        kept = json.loads(cache.read_text())
        if kept["tables"] == key and "by_prompt" in kept:
            return kept["by_prompt"]
    losses: dict[str, list[float]] = {size: [] for size in tables}
    for task, seed, length in mixture.prompts(mixture.seeds[:4]):
        prompt = tasks.prompt(task, seed, length)
        asked = list(itertools.product(tables, budgets))
        found = prompt.outcomes([keep(engine, prompt, tables[size][0], budget).sets()
                                 for size, budget in asked])
        for size in tables:
            losses[size].append(float(np.mean([outcome.loss for (one, _), outcome in zip(asked, found)
                                               if one == size])))
    say("measured loss of observations at pooling, dilation: "
        + ", ".join(f"{size}: {np.mean(values):.3f}" for size, values in losses.items()))
    cache.write_text(json.dumps({"tables": key, "by_prompt": losses}))
    return losses


def keeps_by(table: bytes) -> str:
    """Digest of what decides which positions the table keeps of a budget."""
    return table_file.digest(with_curve(table, [], provenance={}, evaluation={})[0])


def undated(table: bytes) -> bytes:
    """The table without its provenance, which says when it was made."""
    return with_curve(table, None, provenance={})[0]


def _risk_points(engine: Engine, tasks: Tasks, mixture: Mixture, most: int, table: bytes,
                 cache: pathlib.Path, say: Say) -> list[dict]:
    """Outside mass and whether the answer is lost, of held-out prompts under the gate itself: as few
    positions as leave at most each of some masses outside, at most `most`. Fixed budgets would not do:
    at the same mass a prompt that was given many positions loses less."""
    if not len(mixture.risk_seeds):
        return []
    key = f"{table_file.digest(undated(table))} {most}"
    if cache.exists():
        kept = json.loads(cache.read_text())
        if kept["table"] == key:
            return kept["points"]
    probing = with_curve(table, _UNIT_CURVE)[0]
    points = []
    for task, seed, length in mixture.prompts(mixture.risk_seeds):
        prompt = tasks.prompt(task, seed, length)
        budget = min(most, prompt.seq_len - 1)
        everything = [np.arange(prompt.seq_len)] * len(prompt.layers)
        if (budget <= prompt.protect_sink + prompt.protect_window or prompt.scored != EXACT
                or not prompt.outcome(everything).exact):
            continue
        found = [keep(engine, prompt, probing, budget, {"risk_target": mass}) for mass in _GATE_MASSES]
        for mass, kept, outcome in zip(_GATE_MASSES, found,
                                       prompt.outcomes([one.sets() for one in found])):
            points.append({"task": task, "seed": seed, "length": length, "allowed": mass,
                           "outside_mass": kept.outside_mass, "missed": not outcome.exact})
    say(f"risk: {sum(one['missed'] for one in points)} of {len(points)} held-out answers lost")
    cache.write_text(json.dumps({"table": key, "points": points}))
    return points


def claim_folder(folder: pathlib.Path, model: str, texts: Sequence[pathlib.Path]) -> None:
    """Says in the folder of records what they are made of. CalibrationError where they are of another model
    or of other texts: records are found again by task, length and seed alone."""
    try:
        source = {"model": model, "texts": sorted(hashlib.sha256(path.read_bytes()).hexdigest()
                                                  for path in texts)}
    except OSError as error:
        raise CalibrationError(f"--text {error.filename}: {error.strerror}") from error
    folder.mkdir(parents=True, exist_ok=True)
    claim = folder / "source.json"
    if claim.exists():
        found = json.loads(claim.read_text())
    else:
        found = source if not any(folder.glob("*.safetensors")) else None
        if found:
            claim.write_text(json.dumps(source))
    if found != source:
        said = found["model"] if found else "an unknown source"
        raise CalibrationError(f"--out {folder}: its records are of {said} or of other texts, want an empty "
                               "folder, or the model and texts they are made of")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m keepset.calibrate.observation_heads",
                                     description=__doc__)
    parser.add_argument("--model", required=True,
                        help="small, constructed, or hf:DIRECTORY of a Hugging Face model (extra `hf`)")
    parser.add_argument("--text", type=pathlib.Path, nargs="+", default=[],
                        help="with hf: text files that the prompts are made of")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the records; kept")
    parser.add_argument("--table", type=pathlib.Path, required=True, help="where the table goes")
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build/release"))
    parser.add_argument("--tasks", nargs="+", help="default: number and multi; constructed: facts")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024],
                        help="tokens of the prompts; every task at every length")
    parser.add_argument("--prompts", type=int, default=8, help="of every task and length")
    parser.add_argument("--risk-prompts", type=int, default=8,
                        help="held out for the risk curve; 0: none")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--max-heads", type=int, default=16)
    parser.add_argument("--name", default="heads")
    parser.add_argument("--version", default="1")
    options = parser.parse_args()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    build = Build(options.build)
    try:
        tasks = _tasks(options.model, tuple(options.text))
        known = tasks.TASKS
        names = tuple(options.tasks or [one for one in ("number", "multi", "facts") if one in known])
        for one in names:
            if one not in known:
                raise CalibrationError(f"--tasks {one}, want some of {', '.join(known)}")
        mixture = Mixture(names, tuple(options.lengths), range(options.prompts),
                          range(500, 500 + options.risk_prompts))
        claim_folder(options.out, options.model, options.text)
        with Engine(build.library) as engine:
            found = compile_heads(build, engine, tasks, mixture, options.out, name=options.name,
                                  version=options.version, budgets=options.budgets, say=say,
                                  max_heads=options.max_heads)
    except CalibrationError as error:
        say(f"keepset.calibrate.observation_heads: {error}")
        return 3
    except KeyboardInterrupt:
        say(f"\ninterrupted; the same command goes on from {options.out}")
        return 130
    table_file.write_atomically(options.table, found.table)
    worst = found.report["worst_task_and_length"]
    say(f"recall held out {found.report['held_out_recall']:.3f}, shuffled "
        f"{found.report['shuffled_recall']:.3f}, worst {worst['task']} at {worst['length']} tokens "
        f"{worst['recall']:.3f}; table {table_file.digest(found.table)}")
    return 0


def _tasks(model: str, texts: tuple[pathlib.Path, ...]):
    if model == "small":
        return SmallModelTasks(SmallModel.load())
    if model == "constructed":
        return ConstructedTasks(constructed.marker_model("mass", permute_heads=True, seed=5))
    if not model.startswith("hf:"):
        raise CalibrationError(f"--model {model}, want small, constructed or hf:DIRECTORY")
    # Only here: the extra `hf` is not needed otherwise.
    from keepset.calibrate.hf_head_tasks import HfTasks

    return HfTasks.load(pathlib.Path(model.removeprefix("hf:")), texts)


if __name__ == "__main__":
    sys.exit(main())
