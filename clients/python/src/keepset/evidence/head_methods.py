"""What is compared: every policy we have, tables that treat all heads alike, relatives in numpy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import numpy as np
import safetensors.numpy

from keepset import table_file
from keepset.calibrate.head_prompts import (
    KEY_NOVELTY,
    LAST_ROW,
    MAX_ROWS,
    MEAN_ROWS,
    PROBE_MEAN,
    HeadPrompt,
    Tasks,
)
from keepset.calibrate.observation_heads import heads_table, keep, keeps_by, with_curve
from keepset.evidence import head_baselines
from keepset.in_process import Engine

PLAIN = ("streaming_llm", "random", "knorm", "tova", "snapkv")
OURS, OTHERS, SHUFFLED = "observation_heads", "observation_heads, other tasks", "shuffled"
# As many observations as asked for, chosen by recall alone.
OTHERS_FIXED = "observation_heads, other tasks, fixed number"
# Tells what the choice of heads gives apart from that of rows, pooling and dilation.
UNCHOSEN = "all heads, pooled and dilated as the table"
UNCHOSEN_OTHERS = "all heads, pooled and dilated as the other tasks' table"
# The query-agnostic form that reads the keys of a few KV heads alone.
NOVELTY = "key novelty of a few KV heads, other tasks"
UNIFORM = "compilerkv uniform"
# Methods of ours: not what ours is compared with.
OWN = (OURS, OTHERS, OTHERS_FIXED, SHUFFLED, UNCHOSEN, UNCHOSEN_OTHERS, NOVELTY)

# One with an attribute `identity` is measured again when that changes.
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


def unchosen(table: bytes) -> bytes:
    """Every head of the model alike, by each of the rows that the table has; all else is the table's."""
    tensors = safetensors.numpy.load(table)
    document = with_curve(table, None, name="unchosen")[1]
    model = document["model"]
    every = [(layer, head, way) for way in sorted(set(map(int, tensors["rows"])))
             for layer in range(model["num_layers"])
             for head in range(model["num_kv_heads" if way == KEY_NOVELTY else "num_qo_heads"])]
    document["provenance"] = {"source": "hand-written"}
    document["observation_heads"].pop("risk", None)
    layers, heads, ways = np.array(every, np.int32).T
    tensors |= {"heads": np.stack([layers, heads], 1), "rows": ways.copy(),
                "weights": np.ones(len(every), np.float32)}
    return safetensors.numpy.save(tensors, metadata={"keepset": json.dumps(document)})


def engine_run(engine: Engine, policy: str, scope: str | None = None, table: bytes | None = None,
               parameters: dict | None = None) -> Run:
    """A policy that observes with the last `window` rows of the prompt."""
    def run(prompt: HeadPrompt, budget: int) -> list:
        rows = np.asarray(prompt.row_positions)
        used = (rows < prompt.seq_len) & (rows >= prompt.seq_len - prompt.window)
        layers = {index: type(layer)(np.ascontiguousarray(layer.q_window[:, used]), layer.k, layer.v)
                  for index, layer in enumerate(prompt.layers)}
        return engine.keep(
            model=prompt.model, policy=policy, layers=layers, seq_len=prompt.seq_len,
            budget_tokens=budget, softmax_scale=prompt.softmax_scale, scope=scope, table=table,
            row_positions=rows[used], parameters=parameters, protect_sink=prompt.protect_sink,
            protect_window=prompt.protect_window, ppl=prompt.ppl).sets()
    return run


def compilerkv(engine: Engine, table: bytes) -> Run:
    """With a table of its own weight per head; at each budget the rows of the nearest that it was compiled
    at."""
    run = engine_run(engine, "compilerkv", None, table,
                     {"alpha_scope": "head", "table_budget": "nearest"})
    run.identity = table_file.digest(table)
    return run


class HeadsRun:
    """What a table keeps."""

    def __init__(self, engine: Engine, table: bytes):
        self._engine, self._table = engine, table
        self.identity = keeps_by(table)

    def __call__(self, prompt: HeadPrompt, budget: int) -> list:
        return keep(self._engine, prompt, self._table, budget).sets()


class ShuffledRun:
    """Another draw for every seed's prompt, so that no lucky one stands for all."""

    def __init__(self, engine: Engine, table: bytes):
        self._draws = [HeadsRun(engine, shuffled(table, seed)) for seed in range(8)]
        self.identity = keeps_by(table)

    def __call__(self, prompt: HeadPrompt, budget: int) -> list:
        seed = int(prompt.prompt_id.rsplit("-", 1)[1])
        return self._draws[seed % len(self._draws)](prompt, budget)


def plain_methods(engine: Engine, tasks: Tasks, compiled: Mapping[str, Run] | None = None
                  ) -> dict[str, Run]:
    """What needs no table of ours, with tables that treat all heads alike among it. compiled: further
    ones, which stand beside the uniform compilerkv."""
    model = tasks.fingerprint
    methods = {policy: engine_run(engine, policy) for policy in PLAIN}
    methods["snapkv, one set"] = engine_run(engine, "snapkv", "sequence")
    methods[UNIFORM] = engine_run(
        engine, "compilerkv", None, table_file.uniform_table(model, name="uniform", version="1"),
        {"alpha_scope": "head"})
    methods |= compiled or {}
    # GemFilter's layer, 13 of 32, in proportion; the last of two.
    at = max(1, model.num_layers * 13 // 32)
    one = range(at, at + 1)
    methods |= {name: HeadsRun(engine, table) for name, table in {
        "all heads, last row": all_heads(tasks, (LAST_ROW,), "all-last"),
        "all heads, max of question": all_heads(tasks, (MAX_ROWS,), "all-max"),
        "all heads, mean of question": all_heads(tasks, (MEAN_ROWS,), "all-mean"),
        "one layer's last row": all_heads(tasks, (LAST_ROW,), "one-layer", one),
        "one layer's question": all_heads(tasks, (MEAN_ROWS,), "one-layer-question", one),
        "key novelty, one set": all_heads(tasks, (KEY_NOVELTY,), "all-novelty", pool_kernel=5),
    }.items()}
    methods["keydiff, per head"] = head_baselines.keydiff
    return methods


def agnostic_methods(engine: Engine, tasks: Tasks, probe: tuple[str, str]) -> dict[str, Run]:
    """Beside plain_methods, for prompts whose question is asked later and that bring rows of `probe`."""
    probing = all_heads(tasks, (PROBE_MEAN,), "all-probe", probe=probe)
    return {"all heads, probe": HeadsRun(engine, probing),
            "expected attention, per head": head_baselines.expected_attention}
