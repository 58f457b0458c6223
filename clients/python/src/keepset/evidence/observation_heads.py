"""Measures observation_heads against every other policy and writes observation_heads.{json,md}.

Constructed models and the shipped small model. Tables are compiled on one text, tested on another; every
prompt's raw outcome is kept in the work folder, so an interrupted run goes on there.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import sys
import time
from collections.abc import Callable

import numpy as np
import safetensors.numpy

from keepset import table_file
from keepset.calibrate.__main__ import Build
from keepset.calibrate.head_prompts import (
    KEY_NOVELTY,
    LAST_ROW,
    MAX_ROWS,
    MEAN_ROWS,
    ConstructedTasks,
    HeadPrompt,
    SmallModelTasks,
)
from keepset.calibrate.observation_heads import (
    CompiledHeads,
    Say,
    Tasks,
    compile_heads,
    heads_table,
    keep,
    with_curve,
)
from keepset.eval import constructed
from keepset.eval.small_model import SmallModel
from keepset.evidence import head_baselines, head_gate
from keepset.evidence.observation_heads_report import markdown
from keepset.evidence.statistics import bootstrap_interval, paired_difference
from keepset.in_process import Engine

CALIBRATION_TEXT, TEST_TEXT = "Apache-2.0", "MPL-2.0"
BUDGETS = (32, 64, 128, 256)
FIT_BUDGETS = (64, 128)
PLAIN = ("streaming_llm", "random", "knorm", "tova", "snapkv")
OURS, OTHERS = "observation_heads", "observation_heads, other tasks"

Run = Callable[[HeadPrompt, int], list]


def all_heads(tasks: Tasks, ways: tuple[int, ...], name: str, layers: range | None = None,
              **settings) -> bytes:
    """Every head alike; of key novelty every KV head."""
    model = tasks.fingerprint
    heads = model.num_kv_heads if ways == (KEY_NOVELTY,) else model.num_qo_heads
    return heads_table(model, name, [(layer, head, way, 1.0) for way in ways
                                     for layer in layers or range(model.num_layers)
                                     for head in range(heads)], **settings)


def shuffled(table: bytes, seed: int = 0) -> bytes:
    """The same weights on heads that the table does not use that way, drawn at random while there are any."""
    tensors = safetensors.numpy.load(table)
    document = with_curve(table, None, name="shuffled")[1]
    model = document["model"]
    rng = np.random.default_rng(seed)
    own = {(int(layer), int(head), int(way))
           for (layer, head), way in zip(tensors["heads"], tensors["rows"])}
    taken: set[tuple[int, int, int]] = set()
    rows = tensors["rows"].copy()
    heads = tensors["heads"].copy()
    for index, way in enumerate(rows):
        most = model["num_kv_heads"] if way == KEY_NOVELTY else model["num_qo_heads"]
        places = [(layer, head) for layer in range(model["num_layers"]) for head in range(most)
                  if (layer, head, int(way)) not in taken]
        free = [one for one in places if (*one, int(way)) not in own] or places
        chosen = free[rng.integers(len(free))]
        taken.add((*chosen, int(way)))
        heads[index] = chosen
    document["provenance"] = {"source": "hand-written"}
    document["observation_heads"].pop("risk", None)
    tensors["heads"] = heads
    return safetensors.numpy.save(tensors, metadata={"keepset": json.dumps(document)})


def engine_run(engine: Engine, policy: str, scope: str | None = None, table: bytes | None = None,
               parameters: dict | None = None) -> Run:
    def run(prompt: HeadPrompt, budget: int) -> list:
        used = np.asarray(prompt.row_positions) < prompt.seq_len
        layers = {index: type(layer)(np.ascontiguousarray(layer.q_window[:, used]), layer.k, layer.v)
                  for index, layer in enumerate(prompt.layers)}
        return engine.keep(
            model=prompt.model, policy=policy, layers=layers, seq_len=prompt.seq_len,
            budget_tokens=budget, softmax_scale=prompt.softmax_scale, scope=scope, table=table,
            row_positions=np.asarray(prompt.row_positions)[used], parameters=parameters,
            protect_sink=prompt.protect_sink, protect_window=prompt.protect_window,
            ppl=prompt.ppl).sets()
    return run


def heads_run(engine: Engine, table: bytes) -> Run:
    return lambda prompt, budget: keep(engine, prompt, table, budget).sets()


def plain_methods(engine: Engine, tasks: Tasks) -> dict[str, Run]:
    """What needs no compiled table, with tables that treat all heads alike among it."""
    model = tasks.fingerprint
    methods = {policy: engine_run(engine, policy) for policy in PLAIN}
    methods["snapkv, one set"] = engine_run(engine, "snapkv", "sequence")
    methods["compilerkv uniform"] = engine_run(
        engine, "compilerkv", None, table_file.uniform_table(model, name="uniform", version="1"),
        {"alpha_scope": "head"})
    last = range(model.num_layers - 1, model.num_layers)
    methods |= {name: heads_run(engine, table) for name, table in {
        "all heads, last row": all_heads(tasks, (LAST_ROW,), "all-last"),
        "all heads, max of question": all_heads(tasks, (MAX_ROWS,), "all-max"),
        "all heads, mean of question": all_heads(tasks, (MEAN_ROWS,), "all-mean"),
        "one layer's last row": all_heads(tasks, (LAST_ROW,), "one-layer", last),
        "key novelty, one set": all_heads(tasks, (KEY_NOVELTY,), "all-novelty", pool_kernel=5),
    }.items()}
    methods["keydiff, per head"] = head_baselines.keydiff
    return methods


class SmallModelPart:
    """The shipped model: tasks, tables, tests."""

    def __init__(self, build: Build, engine: Engine, work: pathlib.Path, prompts: int, say: Say):
        self._build, self._engine, self._work, self._say = build, engine, work, say
        self._model = SmallModel.load()
        self._calibration = SmallModelTasks(self._model, text=CALIBRATION_TEXT)
        self._test = SmallModelTasks(self._model, text=TEST_TEXT)
        self._seeds = range(1000, 1000 + prompts)

    def run(self) -> dict:
        compiled = {key: self._compile("-".join(names), names) for key, names in {
            "inside": ("number", "multi"), "number": ("number",), "multi": ("multi",),
            "later": ("later",)}.items()}
        ours = {"number": ("inside", "multi"), "multi": ("inside", "number"),
                "later": ("later", "inside")}
        rows = {}
        for task, (own, other) in ours.items():
            methods = plain_methods(self._engine, self._calibration)
            methods[OURS] = heads_run(self._engine, compiled[own].table)
            methods[OTHERS] = heads_run(self._engine, compiled[other].table)
            methods["shuffled"] = heads_run(self._engine, shuffled(compiled[own].table))
            if task == "later":
                methods["expected attention, per head"] = self._expected_attention
            outcomes = []
            for seed in self._seeds:
                outcomes.append(measure(self._work / "outcomes", self._test, task, seed, methods,
                                        BUDGETS))
            self._say(f"small model: {task}, {len(self._seeds)} prompts")
            rows[task] = summarize(outcomes, BUDGETS)
        return {"revision": self._model.revision, "tasks": rows,
                "calibration_text": CALIBRATION_TEXT, "test_text": TEST_TEXT,
                "test_seeds": [self._seeds.start, self._seeds.stop],
                "full_cache_on_further_tasks": head_gate.full_cache_accuracy(
                    self._model, TEST_TEXT, min(12, len(self._seeds))),
                "tables": {key: describe(found) for key, found in compiled.items()},
                "risk": self._risk(compiled)}

    def _compile(self, name: str, names: tuple[str, ...]) -> CompiledHeads:
        return compile_heads(self._build, self._engine, self._calibration, names, range(8),
                             self._work / "records", name=name, version="1", budgets=FIT_BUDGETS,
                             say=self._say, risk_seeds=range(500, 512))

    def _expected_attention(self, prompt: HeadPrompt, budget: int) -> list:
        seed = int(prompt.prompt_id.rsplit("-", 1)[1])
        if getattr(self, "_all_rows", (None, None))[0] != seed:
            self._all_rows = (seed, self._queries(seed))
        return head_baselines.expected_attention(
            prompt, self._all_rows[1], self._model.config.rope_theta, budget)

    def _queries(self, seed: int) -> list[np.ndarray]:
        return [layer.q_window for layer in self._test.whole_prefill("later", seed).layers]

    def _risk(self, compiled: dict[str, CompiledHeads]) -> list[dict]:
        """Predicted against measured miss rates on test prompts, in five bins of equal size."""
        points = []
        for task, key in (("number", "inside"), ("multi", "inside"), ("later", "later")):
            for seed in self._seeds:
                path = self._work / "risk" / f"{task}-{seed}.json"
                if not path.exists():
                    prompt = self._test.prompt(task, seed)
                    found = []
                    for budget in BUDGETS:
                        kept = keep(self._engine, prompt, compiled[key].table, budget)
                        found.append({"task": task, "budget": budget,
                                      "predicted": kept.predicted_miss_rate,
                                      "missed": not prompt.outcome(kept.sets()).exact})
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(found))
                points += json.loads(path.read_text())
        points = [one for one in points if one["predicted"] is not None]
        points.sort(key=lambda one: one["predicted"])
        return [{"prompts": len(part),
                 "predicted": float(np.mean([one["predicted"] for one in part])),
                 "measured": float(np.mean([one["missed"] for one in part]))}
                for part in np.array_split(np.asarray(points, object), 5) if len(part)]


def constructed_part(build: Build, engine: Engine, work: pathlib.Path, prompts: int, say: Say
                     ) -> list[dict]:
    """Models whose needed positions are known."""
    out = []
    for title, model in (
            ("mass contrast", constructed.marker_model("mass", permute_heads=True, seed=5)),
            ("mass contrast, 4 query heads per KV head, 3 layers",
             constructed.marker_model("mass", num_layers=3, group_size=4, permute_heads=True, seed=6)),
            ("norm contrast", constructed.marker_model("norm", permute_heads=True, seed=1))):
        tasks = ConstructedTasks(model)
        folder = work / title.replace(" ", "-").replace(",", "")
        found = compile_heads(build, engine, tasks, ("facts",), range(6), folder / "records",
                              name="constructed", version="1", budgets=(96,), say=say)
        methods = {policy: engine_run(engine, policy) for policy in ("random", "snapkv")}
        methods["compilerkv uniform"] = engine_run(
            engine, "compilerkv", None,
            table_file.uniform_table(tasks.fingerprint, name="uniform", version="1"),
            {"alpha_scope": "head"})
        methods["all heads, mean"] = heads_run(engine, all_heads(tasks, (MEAN_ROWS,), "all-mean"))
        methods["keydiff, per head"] = head_baselines.keydiff
        methods[OURS] = heads_run(engine, found.table)
        methods["shuffled"] = heads_run(engine, shuffled(found.table))
        budget = 96 * model.num_layers
        outcomes = [measure(folder / "outcomes", tasks, "facts", seed, methods, (budget,))
                    for seed in range(1000, 1000 + prompts)]
        say(f"constructed: {title}")
        out.append({"title": title, "budget": budget, "table": describe(found),
                    "roles": [list(one) for one in model.roles],
                    "rows": summarize(outcomes, (budget,))})
    return out


def measure(folder: pathlib.Path, tasks: Tasks, task: str, seed: int, methods: dict[str, Run],
            budgets: tuple[int, ...]) -> dict:
    """Raw outcomes of one prompt: {"full": .., method: {budget: ..}}; written once, read afterwards."""
    path = folder / f"{task}-{seed}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if set(methods) <= set(known):
        return known
    prompt = tasks.prompt(task, seed)
    everything = [np.arange(prompt.seq_len)] * len(prompt.layers)
    full = prompt.outcome(everything)
    known["full"] = {"share": full.share, "loss": full.loss, "predicted": full.predicted}
    for name, run in methods.items():
        if name in known:
            continue
        known[name] = {}
        for budget in budgets:
            sets = run(prompt, budget)
            outcome = prompt.outcome(sets)
            known[name][str(budget)] = {
                "share": outcome.share, "loss": round(outcome.loss, 4),
                "predicted": outcome.predicted, "kept": _mean_kept(sets)}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known))
    return known


def _mean_kept(sets: list) -> float:
    counts = [len(one) if isinstance(one, np.ndarray) else float(np.mean([len(g) for g in one]))
              for one in sets]
    return float(np.mean(counts))


def summarize(outcomes: list[dict], budgets: tuple[int, ...]) -> dict:
    """Prompts that the full cache answers; share exact per method and budget, against ours paired."""
    good = [one for one in outcomes if one["full"]["share"] > 0.5]
    rows: dict = {"prompts": len(outcomes), "answered_by_full_cache": len(good),
                  "full": float(np.mean([one["full"]["share"] for one in outcomes])), "methods": {}}
    if not good:
        return rows
    for name in good[0]:
        if name == "full":
            continue
        rows["methods"][name] = {}
        for budget in budgets:
            key = str(budget)
            shares = [one[name][key]["share"] for one in good]
            ours = [one[OURS][key]["share"] for one in good]
            rows["methods"][name][key] = {
                "exact": float(np.mean(shares)), "interval": bootstrap_interval(shares),
                "loss": float(np.mean([one[name][key]["loss"] for one in good])),
                "kept": float(np.mean([one[name][key]["kept"] for one in good])),
                "ours_minus_this": paired_difference(ours, shares),
                "by_prompt": shares, "predicted": [one[name][key]["predicted"] for one in good]}
    return rows


def describe(found: CompiledHeads) -> dict:
    document = with_curve(found.table, None)[1]
    return {"observations": found.report["observations"],
            "held_out_recall": found.report["held_out_recall"],
            "worst_task": found.report["worst_task"],
            "worst_task_recall": found.report["worst_task_recall"],
            "uniform_recall": found.report["uniform_recall"],
            "shuffled_recall": found.report["shuffled_recall"],
            "oracle_recall": found.report["oracle_recall"],
            "measured_loss_by_size": found.loss_by_size, "risk_points": len(found.risk),
            "settings": document["observation_heads"], "digest": table_file.digest(found.table)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m keepset.evidence.observation_heads",
                                     description=__doc__)
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build/release"))
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the two files")
    parser.add_argument("--work", type=pathlib.Path, required=True,
                        help="records, tables and raw outcomes; an interrupted run goes on there")
    parser.add_argument("--prompts", type=int, default=24, help="test prompts of every task")
    options = parser.parse_args()
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {line}", file=sys.stderr, flush=True)

    build = Build(options.build)
    with Engine(build.library) as engine:
        found = {
            "command": f"python -m keepset.evidence.observation_heads --prompts {options.prompts}",
            "versions": {"keepset": engine.version, "backend": engine.backend,
                         "numpy": np.__version__, "python": platform.python_version()},
            "budgets": list(BUDGETS),
            "constructed": constructed_part(build, engine, options.work / "constructed",
                                            min(12, options.prompts), say),
            "small_model": SmallModelPart(build, engine, options.work / "small", options.prompts,
                                          say).run(),
        }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "observation_heads.json").write_text(
        json.dumps(found, separators=(",", ":")) + "\n")
    (options.out / "observation_heads.md").write_text(markdown(found))
    say(f"wrote {options.out / 'observation_heads.json'} and .md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
