"""Constructed models: compile on one range of seeds, serve, test on another."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

import keepset
from keepset import table_file
from keepset.calibrate.__main__ import Build, calibrate
from keepset.calibrate.alternation import Say
from keepset.calibrate.prompts import ConstructedAdapter
from keepset.eval import constructed
from keepset.evidence import tables
from keepset.evidence.service import candidates_of, shared
from keepset.evidence.statistics import bootstrap_interval, paired_difference
from keepset.server_process import ServerProcess

BUDGET = 96
TEST_SEEDS = range(1000, 1012)
MAX_UNIFORM, MIN_COMPILED = 0.20, 0.95


@dataclasses.dataclass(frozen=True)
class Case:
    """One model and how it is compressed. `proves`: the pass rule holds for it."""

    title: str
    model: constructed.ConstructedModel
    alpha_scope: str = "global"
    proves: bool = True
    calibration_seeds: range = range(6)
    max_rounds: int = 3


def quick_cases() -> list[Case]:
    model = constructed.marker_model(permute_heads=True, seed=1)
    return [Case("norm contrast, heads permuted", model, calibration_seeds=range(4), max_rounds=2)]


def all_cases() -> list[Case]:
    make = constructed.marker_model
    return [
        Case("norm contrast", make()),
        Case("norm contrast, heads permuted", make(permute_heads=True, seed=1)),
        Case("norm contrast, attention noise 1.0", make(noise=1.0, permute_heads=True, seed=2)),
        Case("norm contrast, 4 query heads per KV head",
             make(group_size=4, permute_heads=True, seed=3)),
        Case("norm contrast, 3 layers", make(num_layers=3, group_size=2, permute_heads=True, seed=4),
             max_rounds=4),
        Case("norm contrast", make(permute_heads=True, seed=1), alpha_scope="head"),
        Case("mass contrast", make("mass", permute_heads=True, seed=5), alpha_scope="head"),
        Case("mass contrast", make("mass", permute_heads=True, seed=5), proves=False, max_rounds=2),
    ]


def run_case(case: Case, build: Build, work: pathlib.Path, say: Say) -> dict:
    """Calibrates, compiles, serves and tests one case; returns its entry of the report."""
    adapter = ConstructedAdapter(case.model)
    model = adapter.fingerprint()
    work.mkdir(parents=True, exist_ok=True)
    outcome = calibrate(build, adapter, work / "records.jsonl", seeds=case.calibration_seeds,
                        budgets=[BUDGET], alpha_scope=case.alpha_scope, actions=29,
                        max_rounds=case.max_rounds, name="compiled", version="1", say=say)
    files = {"uniform": tables.uniform(model, "uniform", [BUDGET]), "compiled": outcome.table,
             "shuffled": tables.shuffled(model, outcome.table, "shuffled", seed=0)}
    folder = work / "tables"
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        table_file.write_atomically(folder / f"{name}.safetensors", data)
    with ServerProcess(build.keepsetd, tables=folder) as server, keepset.Client.connect(
            server.address) as client:
        rows = _measure(client, case, adapter, files)
    gain = paired_difference(rows["compiled"]["accuracy_by_prompt"],
                             rows["uniform"]["accuracy_by_prompt"])
    found = _marker_found(case.model, files["compiled"])
    passed = (rows["uniform"]["accuracy"] <= MAX_UNIFORM and gain["low"] > 0.5
              and rows["compiled"]["accuracy"] >= MIN_COMPILED and all(found))
    weights = table_file.read_table(files["compiled"]).head_weights[0]
    return {
        "title": case.title, "alpha_scope": case.alpha_scope, "layers": case.model.num_layers,
        "query_heads_per_kv_head": case.model.group_size, "seq_len": adapter.seq_len,
        "facts": adapter.num_facts, "budget": BUDGET, "expected_to_pass": case.proves,
        "passed": bool(passed), "rows": rows, "gain_compiled_over_uniform": gain,
        "roles": case.model.roles, "marker_has_largest_weight": found,
        "compiled_head_weights": np.round(weights[:, :: case.model.group_size], 3).tolist(),
        "calibration": {"seeds": [case.calibration_seeds.start, case.calibration_seeds.stop],
                        "records": outcome.num_records, "rounds": outcome.rounds,
                        "actions_settled": outcome.settled},
        "test_seeds": [TEST_SEEDS.start, TEST_SEEDS.stop],
        "digests": {name: table_file.digest(data) for name, data in files.items()},
    }  # fmt: skip


def _measure(client: keepset.Client, case: Case, adapter: ConstructedAdapter,
             files: dict[str, bytes]) -> dict[str, dict]:
    accuracy: dict[str, list[float]] = {name: [] for name in (*files, "random")}
    answers: dict[str, list[str]] = {name: [] for name in accuracy}
    kept: dict[str, list[float]] = {name: [] for name in accuracy}
    above: dict[str, list[int]] = {name: [] for name in accuracy}
    for seed in TEST_SEEDS:
        prefill = case.model.prefill(
            case.model.make_facts(seed, adapter.seq_len, adapter.num_facts))
        with shared(client, prefill.layers) as layers:
            for name in accuracy:
                spec: dict = {"policy": "random"}
                if name != "random":
                    spec = {"policy": "compilerkv", "ppl": prefill.ppl,
                            "parameters": {"alpha_scope": case.alpha_scope},
                            "table": keepset.TablePin(digest=table_file.digest(files[name]))}
                result = client.compress(
                    model=adapter.fingerprint(), seq_len=prefill.seq_len, layers=layers, gather=True,
                    softmax_scale=case.model.softmax_scale, budget=keepset.Budget.tokens(BUDGET),
                    **spec)
                correct = case.model.answer(prefill.facts, _cache(case.model, result)).correct
                accuracy[name].append(float(correct.mean()))
                answers[name].append("".join("01"[int(one)] for one in correct))
                kept[name].append(np.mean([len(one.keep_indices) for one in result.layers]))
                above[name] += candidates_of(result) or []
                result.release()
    return {
        name: {"accuracy": float(np.mean(values)), "interval": bootstrap_interval(values),
               "accuracy_by_prompt": values, "correct_by_prompt": answers[name],
               "mean_kept": float(np.mean(kept[name])),
               "mean_candidates": float(np.mean(above[name])) if above[name] else None}
        for name, values in accuracy.items()
    }  # fmt: skip


def _cache(model: constructed.ConstructedModel, result: keepset.Result):
    """The retrieval heads' rows, from the bytes that the service gathered."""
    cache = []
    for layer, one in enumerate(result.layers):
        assert isinstance(one.k, np.ndarray) and isinstance(one.v, np.ndarray)
        head = model.retrieval_head(layer)
        cache.append((one.k[head], one.v[head]))
    return cache


def _marker_found(model: constructed.ConstructedModel, compiled: bytes) -> list[bool]:
    weights = table_file.read_table(compiled).head_weights[0].reshape(
        model.num_layers, model.num_kv_heads, -1).max(-1)
    return [bool(weights[layer, head] > np.delete(weights[layer], head).max())
            for layer, head in enumerate(model.marker_heads())]
