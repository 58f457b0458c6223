"""observation_heads from rollouts to a served table, in small."""

import dataclasses
import hashlib
import re
import subprocess
import sys

import numpy as np
import pytest

import keepset
from keepset import table_file
from keepset.calibrate import CalibrationError
from keepset.calibrate import observation_heads as heads
from keepset.calibrate.head_prompts import (
    KEY_NOVELTY,
    LAST_ROW,
    MAX_ROWS,
    PROBE_MEAN,
    ConstructedTasks,
    attention,
    candidate_scores,
)
from keepset.eval import constructed, facts, text_tasks
from keepset.evidence import head_baselines
from keepset.in_process import EngineError
from keepset.server_process import ServerProcess
from keepset.types import LayerNeeds, TableIdentity

from conftest import MODEL, SEQ_LEN, WINDOW, binary, random_layers, spec

LENGTH = 256



@pytest.mark.parametrize("task", [
    "number", "multi", "few_shot", "summary", "later_number", "later_multi", "later_few_shot",
    "later_summary"])
def test_the_full_cache_answers_and_the_need_lies_on_the_prompt(small, task):
    prompt = small.prompt(task, 3, LENGTH)
    outcome = prompt.outcome([np.arange(prompt.seq_len)] * len(prompt.layers))
    assert outcome.exact and outcome.kl == 0
    assert prompt.need.shape == (prompt.seq_len,) and prompt.need.min() >= 0 and prompt.need.max() > 0
    assert (prompt.probe is not None) == task.startswith("later_")


def test_divergence_is_that_of_the_answers_tokens(small):
    """Against one forward pass over prompt and answer, and the same after the prompt's half."""
    prompt = small.prompt("number", 3, LENGTH)
    model = small.model
    rng = np.random.default_rng([3, 0, LENGTH])
    sample = facts.make_sample(rng, small._words, LENGTH, LENGTH // 32)
    fact = sample.facts[rng.integers(len(sample.facts))]
    ids = model.tokenize(sample.prompt_with_question(fact))
    fed = np.concatenate([ids[-1:], model.tokenize(fact.answer[:1])])
    last = len(ids) - 1
    kept = [np.arange(100, len(ids))] * 2

    def logprobs(sets):
        cache = model.prefill(ids).compact(sets).before(last)
        logits = model.score(cache, fed, last).astype(np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    full, half = logprobs([np.arange(len(ids))] * 2), logprobs(kept)
    want = (np.exp(full) * (full - half)).sum(-1).mean()
    assert prompt.outcome(kept).kl == pytest.approx(want, rel=1e-4)


def test_the_same_seed_is_the_same_prompt_and_lengths_differ(small):
    first, again, longer = (small.prompt("multi", 5, length) for length in (256, 256, 512))
    assert np.array_equal(first.layers[0].k, again.layers[0].k)
    assert longer.seq_len == first.seq_len + 256 and longer.prompt_id != first.prompt_id


def test_candidates_are_every_way_of_every_head(small):
    prompt = small.prompt("later_number", 3, LENGTH)
    candidates, scores = candidate_scores(prompt)
    # 2 layers x (4 heads x (3 ways + 2 of the probe) + 2 KV heads of novelty)
    assert len(candidates) == len(set(candidates)) == 44
    assert scores.shape == (44, prompt.seq_len)
    assert (0, 1, PROBE_MEAN) in candidates and (1, 1, KEY_NOVELTY) in candidates


def test_the_engine_keeps_what_numpy_keeps(engine, small):
    prompt = small.prompt("number", 4, LENGTH)
    table = heads.heads_table(small.fingerprint, "two", [(1, 2, LAST_ROW, 1.0), (0, 3, MAX_ROWS, 0.5)])
    tile = [attention(layer.q_window, layer.k, prompt.row_positions, prompt.softmax_scale)
            for layer in prompt.layers]
    in_span = prompt.row_positions >= prompt.observe[0]
    inner = slice(prompt.protect_sink, prompt.seq_len - prompt.protect_window)
    last, largest = tile[1][2, -1], tile[0][3][in_span].max(0)
    scores = last / last[inner].max() + 0.5 * largest / largest[inner].max()
    want = head_baselines.cut(scores, 40, prompt)
    kept = heads.keep(engine, prompt, table, 40).sets()
    assert all(np.array_equal(one, want) for one in kept)


def test_only_the_layers_that_are_read_are_asked_for(engine, small):
    table = heads.heads_table(small.fingerprint, "one", [(1, 2, LAST_ROW, 1.0)])
    needs = engine.input_needs(model=small.fingerprint, policy="observation_heads", table=table)
    assert needs.layers == (LayerNeeds(1, queries=True, keys=True, values=False, qo_heads=(2,), kv_heads=(1,)),)
    assert needs.rows == ("last_row",) and needs.probe is None
    assert needs.table == TableIdentity("one", "1", f"sha256:{hashlib.sha256(table).hexdigest()}", "hand-written")


def test_a_table_of_the_probe_uses_its_rows(engine, small):
    prompt = small.prompt("later_number", 4, LENGTH)
    table = heads.heads_table(small.fingerprint, "probing", [(1, 2, PROBE_MEAN, 1.0)],
                              probe=small.PROBE)
    kept = heads.keep(engine, prompt, table, 40).sets()
    assert len(kept[0]) == 40 and kept[0][-1] < prompt.seq_len


def test_a_bad_table_is_refused(engine, small):
    prompt = small.prompt("number", 4, LENGTH)
    table = heads.heads_table(small.fingerprint, "bad", [(9, 2, LAST_ROW, 1.0)])
    with pytest.raises(EngineError, match="want a layer in 0..1"):
        heads.keep(engine, prompt, table, 40)


def test_the_compiler_finds_the_marker_head(build, engine, tmp_path):
    model = constructed.marker_model("mass", permute_heads=True, seed=5)
    tasks = ConstructedTasks(model)
    said = []
    mixture = heads.Mixture(("facts",), (512, 1024), range(2))
    found = heads.compile_heads(build, engine, tasks, mixture, tmp_path, name="marker", version="1",
                                budgets=(48,), say=said.append, max_heads=2)
    first = found.report["observations"][0]
    assert first["head"] == model.marker_heads()[0]
    assert found.report["shuffled_recall"] < found.report["held_out_recall"]
    assert set(found.report["held_out_recall_by_task_and_length"]["facts"]) == {"512", "1024"}
    assert found.report["worst_task_and_length"]["task"] == "facts"
    prompt = tasks.prompt("facts", 99, 1024)
    assert prompt.outcome(heads.keep(engine, prompt, found.table, 48).sets()).share > 0.9
    # A second run reads its records instead of the model.
    said.clear()
    again = heads.compile_heads(build, engine, tasks, mixture, tmp_path, name="marker", version="1",
                                budgets=(48,), say=said.append, max_heads=2)
    assert not said
    assert again.report["observations"] == found.report["observations"]


def test_an_interrupted_compilation_reads_no_prompt_twice(build, engine, tmp_path):
    class Counted(ConstructedTasks):
        def prompt(self, task, seed, seq_len):
            if seed == stop_at:
                raise KeyboardInterrupt
            read.append(seed)
            return super().prompt(task, seed, seq_len)

    tasks = Counted(constructed.marker_model("mass", seed=5))
    mixture = heads.Mixture(("facts",), (512,), range(3))
    settings = {"name": "marker", "version": "1", "budgets": (48,), "say": lambda _: None, "max_heads": 1}
    read, stop_at = [], 2
    with pytest.raises(KeyboardInterrupt):
        heads.compile_heads(build, engine, tasks, mixture, tmp_path, **settings)
    assert read == [0, 1]
    records = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.glob("*.safetensors"))
    read, stop_at = [], None
    heads.compile_heads(build, engine, tasks, mixture, tmp_path, **settings)
    # The third prompt's record, then the losses of the first ones.
    assert read[0] == 2
    assert set(records) <= {(path.name, path.stat().st_mtime_ns) for path in tmp_path.glob("*.safetensors")}


def test_the_compiler_tells_the_worst_task_and_the_controls(build, small, tmp_path):
    paths = []
    for length in (256, 512):
        for task in ("number", "multi"):
            paths.append(tmp_path / f"{task}-{length}.safetensors")
            heads.write_record(small.prompt(task, 1, length), paths[-1])
    done = subprocess.run(
        [str(build.keepset), "tables", "compile", "--kind", "observation_heads", *map(str, paths),
         "--name", "n", "--version", "1", "--budget", "40", "--max-heads", "1", "-o",
         str(tmp_path / "table.safetensors")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"worst task (number|multi) \d\.\d+ \(worst of its lengths and all: (number|multi) "
                     r"at (256|512) tokens", done.stdout)
    assert "shuffled" in done.stdout


def gate_points(**lost_from: float | None) -> list[dict]:
    """Points of one prompt per name TASK_SEED, lost from that allowed mass on, or never."""
    return [{"task": name.split("_")[0], "seed": int(name.split("_")[1]), "length": 256, "allowed": mass,
             "outside_mass": mass, "missed": first is not None and mass >= first}
            for name, first in lost_from.items() for mass in (0.1, 0.2, 0.3)]


def test_the_risk_curve_allows_for_few_prompts():
    curve = heads.risk_curve(gate_points(a_0=0.2, a_1=0.3, b_0=0.3, b_1=None))
    # One more prompt, lost: 1, 2 and 4 of 5; between two masses the rate of the larger one, above all 1.
    assert curve == [[0.1, 0.2], [0.1 + 1e-6, 0.4], [0.2, 0.4], [0.2 + 1e-6, 0.8], [0.3, 0.8],
                     [0.3 + 1e-6, 1.0]]


def test_the_risk_curve_tells_nothing_of_masses_that_were_not_tried():
    assert heads.risk_curve(gate_points(a_0=None, a_1=None, a_2=None, a_3=None)) == [
        [0.1, 0.2], [0.3, 0.2], [0.3 + 1e-6, 1.0]]


def gated(engine, prompt, points: list[dict], target: float):
    """Under the curve of `points`, by a head that looks everywhere: one position leaves most outside."""
    table = heads.heads_table(prompt.model, "gated", [(0, 0, KEY_NOVELTY, 1.0)])
    return heads.keep(engine, prompt, heads.with_curve(table, heads.risk_curve(points))[0], 40,
                      {"risk_target": target, "risk_max_tokens": prompt.seq_len - 1})


def test_a_calibration_that_lost_nothing_allows_no_more_than_was_tried(engine, small):
    prompt = small.prompt("number", 5, LENGTH)
    points = gate_points(a_0=None, a_1=None, a_2=None, a_3=None)
    kept = gated(engine, prompt, points, 0.2)
    assert 0.2 < kept.outside_mass <= 0.3 and kept.predicted_miss_rate == pytest.approx(0.2)
    assert len(kept.sets()[0]) > prompt.protect_sink + prompt.protect_window + 1


@pytest.mark.parametrize("lost_from", [(0.05, 0.5), (0.88, 1.0)])
def test_a_gate_set_by_the_curve_misses_no_more_than_it_was_told(engine, small, lost_from):
    """Draws calibration and test prompts alike, many times; the mean miss rate is what is guaranteed."""
    rng = np.random.default_rng(0)
    prompt = small.prompt("number", 5, LENGTH)
    missed, outside = [], []
    for _ in range(200):
        first = rng.uniform(*lost_from, 11)
        kept = gated(engine, prompt, [
            {"task": "a", "seed": seed, "length": 256, "allowed": mass, "missed": mass >= one}
            for seed, one in enumerate(first[:10]) for mass in heads._GATE_MASSES], 0.3)
        missed.append(kept.outside_mass >= first[10])
        outside.append(kept.outside_mass)
    assert np.mean(missed) <= 0.3 and max(outside) > 0.05


def test_a_task_that_is_lost_whatever_is_kept_gets_no_curve():
    assert heads.not_told(gate_points(a_0=0.3, a_1=0.2, b_0=None, b_1=0.2)) is None
    assert "of task b 1 of 2 held-out answers are lost" in heads.not_told(
        gate_points(a_0=0.3, a_1=None, b_0=None, b_1=0.1))
    # One of many is what a rate is for.
    assert heads.not_told(gate_points(a_0=0.1, a_1=None, a_2=0.3, a_3=0.2)) is None


def test_of_tables_that_lose_alike_the_one_that_serves_other_tasks_stands():
    def table(worst: float, mean: float, number: int) -> tuple[bytes, dict]:
        return b"", {"chosen": {"worst_unseen_task_recall": worst, "num_heads": number,
                                "unseen_task_recall_by_num_heads": [mean] * number}}

    tables = {"1 at 1, 0": table(0.2, 0.3, 1), "8 at 1, 12": table(0.6, 0.7, 8),
              "2 at 5, 0": table(0.9, 0.9, 2)}
    losses = {"1 at 1, 0": [0.01, 0.02, 0.03], "8 at 1, 12": [0.02, 0.01, 0.03],
              "2 at 5, 0": [0.5, 0.6, 0.7]}
    assert heads._best(losses, tables) == "8 at 1, 12"
    one_task = {name: (b"", {"chosen": {"num_heads": 1}}) for name in tables}
    assert heads._best(losses, one_task) == "1 at 1, 0"


def test_the_curve_is_learned_under_the_gate(engine, small, tmp_path):
    table = heads.heads_table(small.fingerprint, "gated", [(1, 2, LAST_ROW, 1.0)])
    mixture = heads.Mixture(("number", "summary"), (LENGTH,), range(0), range(2))
    said = []
    points = heads._risk_points(engine, small, mixture, 64, table, tmp_path / "risk.json", said.append)
    # A summary has no answer to lose.
    assert {one["task"] for one in points} == {"number"} and len(said) == 1
    loose = [one for one in points if one["allowed"] >= 0.5]
    assert loose and all(one["outside_mass"] <= one["allowed"] for one in loose)
    assert heads._risk_points(engine, small, mixture, 64, table, tmp_path / "risk.json",
                              said.append) == points
    assert len(said) == 1


@pytest.mark.parametrize(("arguments", "message"), [
    (["--model", "small", "--tasks", "nonsense"], "--tasks nonsense, want some of number"),
    (["--model", "large"], "--model large, want small, constructed or hf:DIRECTORY"),
])
def test_the_command_refuses_what_it_does_not_know(build, tmp_path, monkeypatch, capsys, arguments,
                                                   message):
    monkeypatch.setattr(sys, "argv", ["observation_heads", *arguments, "--build", str(build.root),
                                      "--out", str(tmp_path), "--table", str(tmp_path / "t")])
    assert heads.main() == 3
    assert message in capsys.readouterr().err


def test_the_reply_predicts_what_the_curve_says(engine, small):
    prompt = small.prompt("number", 5, LENGTH)
    table = heads.heads_table(small.fingerprint, "risky", [(1, 2, LAST_ROW, 1.0)])
    kept = heads.keep(engine, prompt, heads.with_curve(table, [[0.0, 0.0], [1.0, 0.5]])[0], 40)
    assert kept.predicted_miss_rate == pytest.approx(kept.outside_mass / 2)


def test_a_server_says_what_to_send_and_answers_from_it(tmp_path):
    table = heads.heads_table(MODEL, "served", [(1, 3, MAX_ROWS, 1.0), (1, 0, KEY_NOVELTY, 0.01)])
    table_file.write_atomically(tmp_path / "served.safetensors", table)
    layers = random_layers()
    with ServerProcess(binary(), tables=tmp_path) as server, keepset.Client.connect(
            server.address) as client:
        needs = client.input_needs(model=MODEL, policy="observation_heads")
        assert [one.layer for one in needs.layers] == [1]
        assert needs.layers[0].qo_heads == (3,) and needs.rows == ("observed_rows",)
        whole = client.compress(layers=layers, **spec(policy="observation_heads"))
        part = client.compress(layers={1: layers[1]}, **spec(policy="observation_heads"))
        assert len(part.layers) == MODEL.num_layers and part.scope == "sequence"
        for one, other in zip(whole.layers, part.layers):
            assert np.array_equal(one.keep_indices, other.keep_indices)
        heads_read = list(needs.layers[0].qo_heads)
        alone = dataclasses.replace(layers[1], q_window=layers[1].q_window[heads_read].copy(),
                                    qo_heads=heads_read)
        least = client.compress(layers={1: alone}, **spec(policy="observation_heads"))
        assert np.array_equal(least.layers[0].keep_indices, part.layers[0].keep_indices)
        with pytest.raises(keepset.InvalidInput, match="qo_heads has no head 3"):
            client.compress(layers={1: dataclasses.replace(alone, qo_heads=[2])},
                            **spec(policy="observation_heads"))
        observed = {"observe": f"{SEQ_LEN - WINDOW}:{SEQ_LEN - 4}"}
        chosen = client.compress(layers={1: layers[1]},
                                 **spec(policy="observation_heads", parameters=observed))
        assert not np.array_equal(chosen.layers[0].keep_indices, part.layers[0].keep_indices)
        with pytest.raises(keepset.InvalidInput, match="is not among row_positions"):
            client.compress(layers={1: layers[1]},
                            **spec(policy="observation_heads", parameters={"observe": "0:4"}))
        with pytest.raises(keepset.KeepsetError, match="layer 1: not observed"):
            client.compress(layers={0: layers[0]}, **spec(policy="observation_heads"))


def test_a_prompt_states_its_own_span(small):
    prompt = small.prompt("number", 7, LENGTH)
    assert prompt.parameters() == {"observe": f"{prompt.seq_len - 2}:{prompt.seq_len}"}
    later = small.prompt("later_number", 7, LENGTH)
    assert later.parameters(uses_probe=True)["probe"] == "recall"


@pytest.mark.parametrize("task", text_tasks.TASKS)
def test_the_answer_of_a_text_task_is_hidden_in_its_text(task):
    text = ["One of the sentences of a text that has words enough to be quoted in a task of its own.",
            "Another."]
    asked = text_tasks.ask(task, np.random.default_rng(3), text)
    again = text_tasks.ask(task, np.random.default_rng(3), text)
    assert asked == again
    if asked.answer is not None:
        given = " ".join([*asked.hidden, *text])
        assert all(part in given for part in asked.answer.split(", "))
        assert asked.answer not in asked.question


def test_records_of_other_texts_are_not_taken_for_ours(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("one")
    second.write_text("two")
    folder = tmp_path / "records"
    heads.claim_folder(folder, "hf:model", [first, second])
    heads.claim_folder(folder, "hf:model", [second, first])
    with pytest.raises(CalibrationError, match="of hf:model or of other texts"):
        heads.claim_folder(folder, "hf:model", [first])
    with pytest.raises(CalibrationError, match="want an empty folder"):
        heads.claim_folder(folder, "small", [first, second])
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "number-1024-0.safetensors").write_bytes(b"")
    with pytest.raises(CalibrationError, match="an unknown source"):
        heads.claim_folder(unknown, "small", [])
