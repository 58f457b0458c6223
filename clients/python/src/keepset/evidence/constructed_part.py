"""Constructed models: compile on one range of seeds, serve, test on another."""

from __future__ import annotations

import collections
import dataclasses
import pathlib

import numpy as np

import keepset
from keepset import table_file
from keepset.calibrate.__main__ import Build, calibrate
from keepset.calibrate.alternation import Say
from keepset.calibrate.prompts import ConstructedAdapter
from keepset.eval import constructed
from keepset.evidence import tables, transfer
from keepset.evidence.service import candidates_of, candidates_summary, cells_of, shared
from keepset.evidence.statistics import bootstrap_interval, paired_difference
from keepset.server_process import ServerProcess

BUDGET = 96
ACTION_STEP = 4  # head weights 0.8, 0.9 .. 1.5
BINS = (4, 2)  # of entropy and of perplexity
TEST_SEEDS = range(1000, 1012)
# Calibration and test prompts of each half, four ranges without a seed in common.
HALVES = ((range(100, 106), range(2000, 2006)), (range(200, 206), range(3000, 3006)))
MAX_UNIFORM, MIN_COMPILED = 0.20, 0.95


@dataclasses.dataclass(frozen=True)
class Case:
    """One model and how it is compressed. `proves`: the pass rule holds for it."""

    title: str
    model: constructed.ConstructedModel
    alpha_scope: str = "global"
    proves: bool = True
    transfer: bool = False  # also calibrated on two disjoint halves
    calibration_pool: range = range(16)
    calibration_prompts: int = 8
    max_rounds: int = 4


def quick_cases() -> list[Case]:
    model = constructed.marker_model(permute_heads=True, seed=1)
    return [Case("norm contrast, heads permuted", model, calibration_pool=range(6),
                 calibration_prompts=4, max_rounds=2)]


def all_cases() -> list[Case]:
    make = constructed.marker_model
    return [
        Case("norm contrast", make()),
        Case("norm contrast, heads permuted", make(permute_heads=True, seed=1), transfer=True),
        Case("norm contrast, attention noise 1.0", make(noise=1.0, permute_heads=True, seed=2)),
        Case("norm contrast, 2 query heads per KV head",
             make(group_size=2, permute_heads=True, seed=6)),
        Case("norm contrast, 4 query heads per KV head",
             make(group_size=4, permute_heads=True, seed=3)),
        Case("norm contrast, 3 layers", make(num_layers=3, group_size=2, permute_heads=True, seed=4),
             max_rounds=5),
        Case("norm contrast", make(permute_heads=True, seed=1), alpha_scope="head"),
        Case("mass contrast", make("mass", permute_heads=True, seed=5), alpha_scope="head",
             transfer=True),
        Case("mass contrast", make("mass", permute_heads=True, seed=5), proves=False, max_rounds=2),
    ]


def run_case(case: Case, build: Build, work: pathlib.Path, say: Say) -> dict:
    """Calibrates, compiles, serves and tests one case; returns its entry of the report."""
    adapter = ConstructedAdapter(case.model)
    model = adapter.fingerprint()
    work.mkdir(parents=True, exist_ok=True)
    outcome = calibrate(build, adapter, work / "records.jsonl", seeds=case.calibration_pool,
                        num_prompts=case.calibration_prompts, budgets=[BUDGET],
                        alpha_scope=case.alpha_scope,
                        action_step=ACTION_STEP, max_rounds=case.max_rounds, name="compiled",
                        version="1", say=say, bins=BINS)
    files = {"uniform": tables.uniform(model, "uniform", [BUDGET]), "compiled": outcome.table,
             "shuffled": tables.shuffled(model, outcome.table, "shuffled", seed=0),
             "heads only": tables.heads_only(model, outcome.table, "heads-only"),
             "gate only": tables.gate_only(model, outcome.table, "gate-only")}
    folder = work / "tables"
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        table_file.write_atomically(folder / f"{name.replace(' ', '-')}.safetensors", data)
    with ServerProcess(build.keepsetd, tables=folder) as server, keepset.Client.connect(
            server.address) as client:
        rows = _measure(client, case, adapter, files)
    gain = paired_difference(rows["compiled"]["accuracy_by_prompt"],
                             rows["uniform"]["accuracy_by_prompt"])
    found = _marker_found(case.model, files["compiled"])
    passed = (rows["uniform"]["accuracy"] <= MAX_UNIFORM and gain["low"] > 0.5
              and rows["compiled"]["accuracy"] >= MIN_COMPILED and all(found)
              and rows["shuffled"]["accuracy"] <= MAX_UNIFORM)
    weights = table_file.read_table(files["compiled"]).head_weights[0]
    entry = {
        "title": case.title, "alpha_scope": case.alpha_scope, "layers": case.model.num_layers,
        "query_heads_per_kv_head": case.model.group_size, "seq_len": adapter.seq_len,
        "facts": adapter.num_facts, "budget": BUDGET, "expected_to_pass": case.proves,
        "passed": bool(passed), "rows": rows, "gain_compiled_over_uniform": gain,
        "roles": case.model.roles, "marker_has_largest_weight": found,
        "compiled_head_weights": np.round(weights[:, :: case.model.group_size], 3).tolist(),
        "calibration": {"pool": [case.calibration_pool.start, case.calibration_pool.stop],
                        "prompts": case.calibration_prompts, "records": outcome.num_records,
                        "rounds": outcome.rounds, "settled": outcome.settled,
                        "tolerance": outcome.tolerance,
                        "changes": [one.to_json() for one in outcome.changes],
                        "coverage": outcome.coverage},
        "test_seeds": [TEST_SEEDS.start, TEST_SEEDS.stop],
        "digests": {name: table_file.digest(data) for name, data in files.items()},
    }  # fmt: skip
    if case.transfer:
        entry["transfer"] = transfer.measure(
            build, [transfer.Half(adapter, *seeds) for seeds in HALVES], work / "transfer",
            budgets=[BUDGET], alpha_scope=case.alpha_scope, parameters={}, action_step=ACTION_STEP,
            max_rounds=case.max_rounds, bins=BINS, protect_window=0, say=say)
    return entry


def _measure(client: keepset.Client, case: Case, adapter: ConstructedAdapter,
             files: dict[str, bytes]) -> dict[str, dict]:
    accuracy: dict[str, list[float]] = {name: [] for name in (*files, "random")}
    answers: dict[str, list[str]] = {name: [] for name in accuracy}
    kept: dict[str, list[float]] = {name: [] for name in accuracy}
    above: dict[str, list[int]] = {name: [] for name in accuracy}
    cells: dict[str, collections.Counter] = {name: collections.Counter() for name in accuracy}
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
                cells[name].update(cells_of(result))
                result.release()
    return {
        name: {"accuracy": float(np.mean(values)), "interval": bootstrap_interval(values),
               "accuracy_by_prompt": values, "correct_by_prompt": answers[name],
               "mean_kept": float(np.mean(kept[name])), **candidates_summary(above[name], BUDGET),
               "hits_by_entropy_and_ppl_bin": dict(sorted(cells[name].items()))}
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
