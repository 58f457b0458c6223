"""Rollouts and their records; the fit itself is tested where it lives."""

import json

import numpy as np
import pytest
from conftest import binary

import keepset
from keepset import table_file
from keepset.calibrate.__main__ import Build
from keepset.calibrate.prompts import ConstructedAdapter, Prompt, SmallModelAdapter
from keepset.calibrate.records import StepFile, read
from keepset.calibrate.rollouts import GATE_ACTIONS, HEAD_ACTIONS, Rollouts, Weights
from keepset.eval import constructed
from keepset.eval.small_model import SmallModel
from keepset.in_process import Engine, EngineError, TileLayer
from keepset.server_process import ServerProcess

BUDGET = 48
REQUIRED = {"kind", "prompt_id", "layer", "budget", "action", "full_loss", "compressed_loss",
            "sequence_length", "paired_policy"}


@pytest.fixture(scope="module")
def adapter():
    return ConstructedAdapter(constructed.marker_model(group_size=2), seq_len=640, num_facts=16)


@pytest.fixture(scope="module")
def prompts(adapter):
    return list(adapter.prompts(range(3)))


@pytest.fixture(scope="module")
def engine():
    with Engine(Build(binary().parent.parent).library) as running:
        yield running


def rollouts(engine, adapter, prompts, actions=29):
    return Rollouts(engine, adapter.fingerprint(), prompts, [BUDGET], parameters={},
                    actions_per_state=actions, seed=0)


def run(rollouts, adapter, kind, path):
    with StepFile(path, "t/1@0") as file:
        rollouts.run(kind, Weights.neutral(adapter.fingerprint(), 1), "t/1@0", file, lambda done: None)
    return list(read(path))


def test_records_carry_what_the_fit_asks_for(engine, adapter, prompts, tmp_path):
    measured = rollouts(engine, adapter, prompts[:1], actions=3)
    heads = run(measured, adapter, "head", tmp_path / "h.jsonl")
    gates = run(measured, adapter, "gate", tmp_path / "g.jsonl")
    assert len(heads) == measured.count("head") == 8 * 3
    assert len(gates) == measured.count("gate") == 3
    assert all(REQUIRED | {"kv_head", "seed"} <= record.keys() for record in heads)
    assert all(REQUIRED | {"entropy", "ppl", "candidate_count"} <= record.keys() for record in gates)
    assert {record["kv_head"] for record in heads} == set(range(8))


def test_every_action_is_logged_equally_often(engine, adapter, prompts):
    measured = rollouts(engine, adapter, prompts * 29, actions=2)
    entries = [entry for index in range(len(prompts) * 29) for entry in measured.head_entries(index)]
    of_state = [entry.action for entry in entries if entry.kv_head == 5]
    assert [of_state.count(action) for action in HEAD_ACTIONS] == [6] * len(HEAD_ACTIONS)
    gates = [entry.action for index in range(21) for entry in measured.gate_entries(index)]
    assert [gates.count(action) for action in GATE_ACTIONS] == [2] * len(GATE_ACTIONS)


def test_interrupted_step_goes_on_without_counting_twice(engine, adapter, prompts, tmp_path):
    measured = rollouts(engine, adapter, prompts[:1], actions=2)
    path = tmp_path / "h.jsonl"
    whole = run(measured, adapter, "head", path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    assert run(measured, adapter, "head", path) == whole


def test_records_against_another_table_are_not_taken_up(engine, adapter, prompts, tmp_path):
    path = tmp_path / "g.jsonl"
    run(rollouts(engine, adapter, prompts[:1], actions=2), adapter, "gate", path)
    with pytest.raises(ValueError, match="paired_policy=t/1@0, want t/2@1"):
        StepFile(path, "t/2@1")


def test_raising_the_marker_alone_lowers_the_loss(engine, adapter, prompts):
    measured = rollouts(engine, adapter, prompts)
    neutral = Weights.neutral(adapter.fingerprint(), 1)
    marker = adapter.model.marker_heads()[0]
    raised = neutral.head_weights.copy()
    raised[:, 0, 2 * marker : 2 * marker + 2] = 1.5
    better = Weights(raised, *(getattr(neutral, name) for name in
                               ("gate_thresholds", "entropy_edges", "ppl_edges")))
    for index in range(len(prompts)):
        assert measured.evaluate(index, better, 0)[1] < 0.1
        assert measured.evaluate(index, neutral, 0)[1] > 1


def test_reduced_observation_decides_as_the_service_does(engine, adapter, tmp_path):
    model = adapter.fingerprint()
    rng = np.random.default_rng(0)
    table = table_file.compilerkv_table(
        model, name="t", version="1", head_weights=rng.choice(HEAD_ACTIONS, (1, 16)),
        gate_thresholds=np.full((1, 1, 1), 0.9), entropy_edges=[], ppl_edges=[],
        algorithm={"name": "test"}, source="hand-written")
    (tmp_path / "t.safetensors").write_bytes(table)
    prompt: Prompt = next(adapter.prompts(range(7, 8)))
    decided = engine.decide(model=model, layers=prompt.layers, table=table, budget_tokens=BUDGET,
                            ppl=prompt.ppl)
    prefill = adapter.model.prefill(adapter.model.make_facts(7, 640, 16))
    with ServerProcess(binary(), tables=tmp_path) as server, keepset.Client.connect(
            server.address) as client:
        served = client.compress(
            model=model, seq_len=640, softmax_scale=1.0, policy="compilerkv", ppl=prefill.ppl,
            budget=keepset.Budget.tokens(BUDGET),
            layers=[keepset.Layer(q_window=one.q_window, k=one.k, v=one.v) for one in prefill.layers])
    assert np.array_equal(decided.keep_indices[0], served.layers[0].keep_indices)
    assert decided.candidates[0] == served.layers[0].sets[0].candidates
    assert decided.entropy[0] == pytest.approx(served.entropy, abs=1e-5)


def test_small_model_prompts_lose_nothing_when_all_is_kept():
    adapter = SmallModelAdapter(SmallModel.load(), seq_len=200, num_facts=8, num_questions=4)
    later, inside = adapter.prompts(range(2))
    for prompt in (later, inside):
        everything = [np.arange(prompt.seq_len)] * 2
        assert prompt.loss(everything) == prompt.full_loss
        # The second number is a guess when only the last tokens are left.
        assert prompt.loss([np.arange(prompt.seq_len - 4, prompt.seq_len)] * 2) > prompt.full_loss + 1


def test_small_model_scores_many_continuations_as_one_by_one():
    model = SmallModel.load()
    rng = np.random.default_rng(1)
    prefill = model.prefill(rng.integers(4, 1000, 120), 8)
    keeps = [[np.sort(rng.choice(120, 30 + head, replace=False)) for head in range(2)]
             for _ in range(2)]
    cache, fed = prefill.compact(keeps), rng.integers(4, 1000, (3, 4))
    many = model.score_many(cache, fed, 120)
    for ids, scores in zip(fed, many):
        np.testing.assert_allclose(scores, model.score(cache, ids, 120), rtol=1e-3, atol=1e-3)


def test_engine_names_what_is_wrong_with_a_table(engine, adapter, prompts):
    model = adapter.fingerprint()
    table = table_file.uniform_table(
        keepset.ModelFingerprint(**{**model.to_json(), "num_layers": 2}), name="t", version="1")
    with pytest.raises(EngineError, match="num_layers"):
        engine.decide(model=model, layers=prompts[0].layers, table=table, budget_tokens=8, ppl=1.0)
    double = TileLayer(*(array.astype(np.float64) for array in
                         (prompts[0].layers[0].attn_tile, prompts[0].layers[0].v)))
    fitting = table_file.uniform_table(model, name="t", version="1")
    with pytest.raises(ValueError, match="float32"):
        engine.decide(model=model, layers=[double], table=fitting, budget_tokens=8, ppl=1.0)


def test_table_reads_back_as_written(adapter):
    model = adapter.fingerprint()
    heads = np.linspace(0.8, 1.5, 32).reshape(2, 1, 16)
    data = table_file.compilerkv_table(
        model, name="t", version="2", head_weights=heads, gate_thresholds=np.full((2, 1, 2, 3), 0.9),
        entropy_edges=[1.5], ppl_edges=[2, 4], algorithm={"name": "x"}, source="hand-written",
        budgets=[64, 96])
    found = table_file.read_table(data)
    np.testing.assert_array_equal(found.head_weights, heads.astype(np.float32))
    assert (found.budgets, found.document["version"]) == ([64, 96], "2")
    assert json.loads(json.dumps(found.document["model"])) == model.to_json()
