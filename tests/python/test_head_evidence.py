"""What is measured of observation_heads tables and of methods beside them, and the report."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from keepset.calibrate import observation_heads as heads
from keepset.calibrate.head_prompts import (
    KEY_NOVELTY,
    LAST_ROW,
    MAX_ROWS,
    OutOfTime,
    RememberedTasks,
)
from keepset.calibrate.small_head_tasks import SmallModelTasks
from keepset.evidence import head_baselines
from keepset.evidence import observation_heads as evidence_command
from keepset.evidence.earlier_run import keep_earlier, read_results
from keepset.evidence.head_measure import measure, risk_of, summarize, summarize_risk
from keepset.evidence.head_methods import (
    NOVELTY,
    OTHERS,
    OURS,
    UNCHOSEN,
    UNCHOSEN_OTHERS,
    HeadsRun,
    agnostic_methods,
    plain_methods,
    shuffled,
    unchosen,
)
from keepset.evidence.head_novelty import fit_novelty
from keepset.evidence.head_novelty_report import novelty_section
from keepset.evidence.head_part import HeadPart, Settings
from keepset.evidence.head_ways import held_out_ways
from keepset.evidence.head_ways_report import ways_section
from keepset.evidence.observation_heads_report import markdown


LENGTH = 256


def test_shuffled_weights_sit_on_other_heads(small):
    table = heads.heads_table(small.fingerprint, "two", [(1, 2, LAST_ROW, 1.0), (0, 3, MAX_ROWS, 0.5)])
    assert shuffled(table) != table
    assert shuffled(table) == shuffled(table)


def test_raw_outcomes_are_kept_and_summarized(small, tmp_path):
    methods = {"observation_heads": lambda prompt, budget: [np.arange(prompt.seq_len)] * 2,
               "nothing": lambda prompt, budget: [np.arange(4)] * 2}
    outcomes = [measure(tmp_path, small, "number", seed, length, methods, (20, 40))
                for seed in range(2) for length in (256, 512)]
    assert json.loads((tmp_path / "number-256-0.json").read_text()) == outcomes[0]
    assert outcomes[0]["methods"]["nothing"]["40"]["predicted"] is not None
    rows = summarize(outcomes, (20, 40))
    # The protected positions, 4 and 16, fill the smaller budget.
    assert set(rows["methods"]["nothing"]) == {"40"}
    assert rows["methods"]["observation_heads"]["40"]["value"] == 1.0
    assert rows["methods"]["nothing"]["40"]["ours_minus_this"]["mean"] == 1.0
    assert rows["methods"]["nothing"]["40"]["by_length"] == {"256": 0.0, "512": 0.0}


def test_an_interrupted_measurement_goes_on(small, tmp_path):
    asked = []

    def method(prompt, budget):
        asked.append(budget)
        return [np.arange(prompt.seq_len)] * 2

    measure(tmp_path, small, "number", 0, 256, {"observation_heads": method}, (40,))
    more = {"observation_heads": method, "other": method}
    measure(tmp_path, small, "number", 0, 256, more, (40,))
    assert asked == [40, 40]
    found = measure(tmp_path, small, "number", 0, 256, more, (40, 50))
    assert asked == [40, 40, 50, 50]
    assert measure(tmp_path, small, "number", 0, 256, more, (40, 50)) == found and len(asked) == 4


def test_another_table_is_measured_again(engine, small, tmp_path):
    def of(head: int) -> HeadsRun:
        return HeadsRun(engine, heads.heads_table(small.fingerprint, "one", [(1, head, LAST_ROW, 1.0)]))

    first, again, other = (measure(tmp_path, small, "number", 0, 256, {"observation_heads": one}, (40,))
                           for one in (of(2), of(2), of(0)))
    assert first == again
    assert first["identities"] != other["identities"] and first["methods"] != other["methods"]


def test_prompts_are_read_once_while_they_fit_and_not_after_the_time_is_up(small):
    kept = RememberedTasks(small)
    assert kept.prompt("number", 0, 256) is kept.prompt("number", 0, 256)
    none = RememberedTasks(small, max_bytes=1)
    first = none.prompt("number", 0, 256)
    none.prompt("number", 1, 256)
    assert none.prompt("number", 0, 256) is not first
    with pytest.raises(OutOfTime):
        RememberedTasks(small, until=0.0).prompt("number", 0, 256)


def test_what_the_full_cache_seldom_answers_is_compared_by_divergence(small, tmp_path):
    methods = {"observation_heads": lambda prompt, budget: [np.arange(prompt.seq_len)] * 2}
    for task in ("code", "summary"):
        rows = summarize([measure(tmp_path, small, task, 0, 256, methods, (40,))], (40,))
        assert rows["value"] == "kl" and rows["methods"]["observation_heads"]["40"]["value"] == 0.0


@pytest.mark.parametrize("task", ["number", "code"])
def test_what_was_predicted_is_kept_of_every_prompt(small, tmp_path, task):
    """Of tasks scored by divergence, too; None is what the full cache predicts, which stands beside it."""
    def method(prompt, budget):
        return [np.arange(prompt.seq_len - budget, prompt.seq_len)] * 2

    found = [measure(tmp_path, small, task, seed, 256, {"observation_heads": method}, (40,))
             for seed in range(2)]
    rows = summarize(found, (40,))
    full = [small.prompt(task, seed, 256).outcome([np.arange(one["tokens"])] * 2)
            for seed, one in enumerate(found)]
    assert rows["full_of_prompts"] == [{"exact": one.share, "predicted": one.predicted} for one in full]
    cut = [small.prompt(task, seed, 256).outcome(method(small.prompt(task, seed, 256), 40)).predicted
           for seed in range(2)]
    told = rows["methods"]["observation_heads"]["40"]["predicted"]
    assert [one or beside.predicted for one, beside in zip(told, full)] == cut
    assert any(told)


def test_replies_predict_and_targets_are_followed(engine, small, tmp_path):
    table = heads.with_curve(heads.heads_table(small.fingerprint, "risky", [(1, 2, LAST_ROW, 1.0)]),
                             [[0.0, 0.0], [1.0, 1.0]])[0]
    found = [risk_of(tmp_path, engine, small, table, "number", seed, LENGTH, (40, 64), (0.01, 0.5), 200)
             for seed in range(2)]
    assert json.loads((tmp_path / "number-256-1.json").read_text()) == found[1]
    summary = summarize_risk(found, bins=2)
    assert sum(one["prompts"] for one in summary["bins"]) == 4
    strict, loose = summary["targets"]
    assert strict["predicted"] <= loose["predicted"] and strict["kept"] >= loose["kept"]


def test_heads_that_retrieve_get_more(small, tmp_path):
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for seed, path in enumerate(paths):
        heads.write_record(small.prompt("number", seed, LENGTH), path)
    scores = head_baselines.retrieval_scores(paths, small.fingerprint)
    assert scores.shape == (2, 2) and scores.sum() == pytest.approx(1)
    counts = np.array([[len(head) for head in layer] for layer in head_baselines.HeadBudgets(scores)(
        small.prompt("number", 5, LENGTH), 40)])
    # The last layer retrieves; half of what is not protected is every head's own.
    assert counts[1].min() > counts[0].max() >= 20 + 10 and 40 - 2 < counts.mean() <= 40


def test_heads_in_full_and_streaming_heads_share_the_bytes(small):
    prompt = small.prompt("number", 5, LENGTH)
    protected = prompt.protect_sink + prompt.protect_window
    run = head_baselines.StreamingHeads(np.array([[0.1, 0.4], [0.3, 0.2]]))
    for budget in (protected + 10, 100, 150, prompt.seq_len - 1):
        counts = np.array([[len(head) for head in layer] for layer in run(prompt, budget)])
        assert budget - 1 < counts.mean() <= budget
        assert counts.min() >= protected
    # A whole head costs what 4 heads of `budget` have beside what is protected: the best one first.
    sets = run(prompt, protected + (prompt.seq_len - protected) // 4 + 2)
    assert [[len(head) == prompt.seq_len for head in layer] for layer in sets] == [
        [False, True], [False, False]]
    streaming = sets[1][0]
    assert list(streaming[:4]) == [0, 1, 2, 3] and streaming[-1] == prompt.seq_len - 1
    assert np.all(np.diff(streaming[4:]) == 1)


def test_a_head_that_looks_behind_its_own_tokens_is_found(small):
    """One query head attends to the token after the last occurrence of its own, one to nothing."""
    plain = small.repetition(8, 3)
    rows, seq_len = np.arange(16, 24), 24
    k = np.zeros((2, seq_len, seq_len), np.float32)
    k[0] = np.eye(seq_len)
    q = np.zeros((4, 8, seq_len), np.float32)
    q[1, np.arange(8), rows - 8 + 1] = 50.0
    layer = type(plain.layers[0])(q, k, k)
    scores = head_baselines.echo_and_induction(dataclasses.replace(
        plain, layers=(layer,), row_positions=rows, softmax_scale=1.0), 8)
    assert scores.shape == (1, 2)
    assert scores[0, 0] == pytest.approx(1, abs=1e-3) and scores[0, 1] < 0.2
    assert len(plain.row_positions) >= 8 and plain.seq_len == seq_len


def rotation(position: int, dim: int, theta: float) -> np.ndarray:
    """RoPE as a matrix [dim, dim]: dimension i turns with i + dim / 2."""
    out = np.zeros((dim, dim))
    half = dim // 2
    for i in range(half):
        angle = position * theta ** (-2 * i / dim)
        out[i, i] = out[i + half, i + half] = math.cos(angle)
        out[i, i + half], out[i + half, i] = -math.sin(angle), math.sin(angle)
    return out


@pytest.mark.parametrize("theta", [100.0, 1e6])
def test_expected_attention_is_that_of_normal_queries_turned_to_the_positions_to_come(small, theta):
    """Against loops in double precision over queries that were never rotated."""
    rng = np.random.default_rng(3)
    seq_len, dim, num_qo, num_kv, sinks, future = 30, 8, 4, 2, 4, 512
    plain = rng.normal(size=(num_qo, seq_len, dim)) + rng.normal(size=(num_qo, 1, dim))
    turned = np.array([[rotation(t, dim, theta) @ head[t] for t in range(seq_len)] for head in plain])
    k, v = rng.normal(size=(2, num_kv, seq_len, dim))
    ahead = sum(rotation(t, dim, theta) for t in range(seq_len, seq_len + future)) / future
    want = np.zeros((num_kv, seq_len))
    for head in range(num_qo):
        seen = plain[head, sinks:]
        mean = sum(seen) / len(seen)
        covariance = sum(np.outer(one - mean, one - mean) for one in seen) / len(seen)
        mean, covariance = ahead @ mean, ahead @ covariance @ ahead.T
        kv = head // (num_qo // num_kv)
        logits = [mean @ k[kv, t] / math.sqrt(dim) + k[kv, t] @ covariance @ k[kv, t] / (2 * dim)
                  for t in range(sinks, seq_len)]
        total = sum(math.exp(one) for one in logits)
        for t, one in zip(range(sinks, seq_len), logits):
            want[kv, t] += math.exp(one) / total / (num_qo // num_kv)
    want *= np.linalg.norm(v, axis=-1)
    want[:, :sinks] = want.max() + 1
    base = small.prompt("later_number", 6, LENGTH)
    prompt = dataclasses.replace(
        base, model=dataclasses.replace(base.model, rope={"theta": theta}), softmax_scale=dim**-0.5,
        layers=(type(base.layers[0])(turned[:, -1:], k, v),), queries=lambda: [turned], protect_window=0)
    (found,) = head_baselines._expected(prompt, sinks, future)
    np.testing.assert_allclose(found, want, rtol=1e-9)
    (sets,) = head_baselines.expected_attention(prompt, 10)
    for kept, scores in zip(sets, want):
        assert sorted(kept) == sorted(np.argsort(-scores, kind="stable")[:10])


def test_every_comparison_keeps_the_budget(engine, small):
    prompt = small.prompt("later_number", 6, LENGTH)
    methods = plain_methods(engine, small) | agnostic_methods(engine, small, small.PROBE)
    assert {"snapkv", "expected attention, per head", "keydiff, per head", "tova"} < set(methods)
    for name, run in methods.items():
        sets = run(prompt, 40)
        counts = [len(one) for one in sets] if isinstance(sets[0], np.ndarray) else [
            len(head) for layer in sets for head in layer]
        assert max(counts) <= 40, name


def test_without_choice_every_head_observes_as_the_table_does(engine, small):
    model = small.fingerprint
    table = heads.heads_table(model, "two", [(1, 2, LAST_ROW, 1.0), (0, 1, MAX_ROWS, 0.25)], pool_kernel=5,
                              dilate=12)
    alike = heads.heads_table(model, "alike", [
        (layer, head, way, 1.0) for way in (LAST_ROW, MAX_ROWS) for layer in range(model.num_layers)
        for head in range(model.num_qo_heads)], pool_kernel=5, dilate=12)
    prompt = small.prompt("number", 6, LENGTH)
    want = HeadsRun(engine, alike)(prompt, 40)
    assert np.array_equal(HeadsRun(engine, unchosen(table))(prompt, 40), want)
    assert not np.array_equal(HeadsRun(engine, table)(prompt, 40), want)


def test_without_choice_every_kv_head_tells_novelty(engine, small):
    model = small.fingerprint
    table = heads.heads_table(model, "one", [(1, 0, KEY_NOVELTY, 1.0)])
    every = heads.heads_table(model, "every", [(layer, head, KEY_NOVELTY, 1.0) for layer in range(
        model.num_layers) for head in range(model.num_kv_heads)])
    prompt = small.prompt("number", 6, LENGTH)
    assert np.array_equal(HeadsRun(engine, unchosen(table))(prompt, 40), HeadsRun(engine, every)(prompt, 40))


def test_the_evidence_of_a_model_in_small(build, engine, small, tmp_path):
    tested = SmallModelTasks(small.model, text="MPL-2.0")
    settings = Settings({"inside": ("number", "code"), "agnostic": ("later_number",)}, (256,), (40, 80),
                        (40,), prompts=(1,), failing_prompts=1, gate_prompts=1, fit_lengths=(256,),
                        calibration_prompts=2, risk_prompts=1, max_heads=1, targets=(0.1,))
    found = HeadPart(build, engine, tmp_path, RememberedTasks(small), RememberedTasks(tested),
                     small.PROBE, settings, lambda _: None).run()
    number, code = (found["columns"]["inside"]["tasks"][one] for one in ("number", "code"))
    assert (number["value"], code["value"]) == ("exact", "kl")
    assert {"budgets by head", "one layer's last row", "observation_heads", "shuffled", UNCHOSEN,
            "retrieval heads full, others streaming (DuoAttention-like)",
            "echo and induction heads full, others streaming (RazorAttention-like)"} < set(
        number["methods"])
    assert {"expected attention, per head", "all heads, probe"} < set(
        found["columns"]["agnostic"]["tasks"]["later_number"]["methods"])
    table = found["columns"]["inside"]["tables"]["all tasks"]
    least = min(table["measured_losses"], key=lambda one: table["measured_losses"][one])
    assert set(table["loss_errors"]) == set(table["measured_losses"]) and table["loss_errors"][least] == 0
    risk = found["columns"]["inside"]["risk"]
    assert risk["untold"] or risk["targets"][0]["target"] == 0.1
    report = markdown({"command": "c", "versions": {"keepset": "1", "backend": "b", "numpy": "n"},
                       "run": {"wall_seconds": 60, "cpu_seconds": 30, "cores": 2, "resumed": False},
                       "small_model": found | {"calibration_text": "a", "test_text": "b",
                                               "trained": [256, 2048]}}, ["picture.png"])
    assert "Not measured by this run" not in report and "not measured yet" not in report
    assert "| inside | code | 1 | 0.00 (1) | KL |" in report and "(picture.png)" in report
    # 4 sinks and 16 rows of the window are inside the budget.
    assert "| inside | code | 20 | 20 |" in report


def test_an_untaught_task_is_tested_by_a_table_of_the_others(build, engine, small, tmp_path):
    tested = SmallModelTasks(small.model, text="MPL-2.0")
    settings = Settings({"agnostic": ("later_number", "later_summary")}, (256,), (80,), (40,), prompts=(1,),
                        failing_prompts=1, gate_prompts=1, fit_lengths=(256,), calibration_prompts=2,
                        risk_prompts=1, max_heads=1, folds=2, untaught=("later_summary",), novelty_heads=2)
    column = HeadPart(build, engine, tmp_path, RememberedTasks(small), RememberedTasks(tested), small.PROBE,
                      settings, lambda _: None).run()["columns"]["agnostic"]
    assert set(column["tables"]) == {"all tasks"} and not list(tmp_path.glob("records/later_summary*"))
    methods = column["tasks"]["later_summary"]["methods"]
    assert methods[OTHERS]["80"]["by_prompt"] == methods[OURS]["80"]["by_prompt"]
    told = column["tasks"]["later_summary"]["novelty"]["80"]
    keydiff = methods["keydiff, per head"]["80"]["value"]
    assert told["value"] == methods[NOVELTY]["80"]["value"]
    assert told["against"]["keydiff, per head"]["difference"]["mean"] == pytest.approx(told["value"] - keydiff)
    report = "\n".join(novelty_section({"columns": {"agnostic": column}}))
    assert f"| agnostic | later_summary | 80 | 1 | {told['value']:.2f} KL | {keydiff:.2f} |" in report
    assert len(column["novelty_tables"]["later_summary"]["heads"]) == 2


def test_the_table_of_the_other_tasks_has_a_control_of_its_own(build, engine, small, tmp_path):
    settings = Settings({"inside": ("number", "multi")}, (256,), (40,), (40,), prompts=(1,), failing_prompts=1,
                        gate_prompts=1, fit_lengths=(256,))
    tasks = RememberedTasks(small)
    part = HeadPart(build, engine, tmp_path, tasks, tasks, small.PROBE, settings, lambda _: None)
    table = heads.heads_table(small.fingerprint, "others", [(1, 2, LAST_ROW, 1.0)], dilate=12)
    runs = part._of_others("inside", "number", ("multi",), table)
    assert {name: run.identity for name, run in runs.items()} == {
        OTHERS: heads.keeps_by(table), UNCHOSEN_OTHERS: heads.keeps_by(unchosen(table))}


def test_novelty_alone_reads_keys_alone(build, engine, small, tmp_path):
    records = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for seed, path in enumerate(records):
        heads.write_record(small.prompt("later_number", seed, LENGTH), path)
    table, told = fit_novelty(build, records, tmp_path / "novelty", "few", 2, (40,), lambda _: None)
    needs = engine.input_needs(model=small.fingerprint, policy="observation_heads", table=table)
    assert needs.rows == () and needs.probe is None
    assert not any(one.queries for one in needs.layers)
    assert sum(len(one.kv_heads) for one in needs.layers) == len(told["heads"]) == 2


def test_ways_are_compared_on_prompts_of_a_task_not_seen(engine, small, tmp_path):
    tables = {f"1 at 1, {dilate}": heads.heads_table(small.fingerprint, "way", [(1, 2, LAST_ROW, 1.0)],
                                                     dilate=dilate) for dilate in (0, 40)}
    near, far = tables
    prompts = [(3, 256), (4, 256)]
    found = held_out_ways(tmp_path, engine, RememberedTasks(small), heads.Ways(tables, far, near), "number",
                          prompts, (30, 40))
    prompt = small.prompt("number", 4, 256)
    want = [np.mean([prompt.outcome(heads.keep(engine, prompt, tables[one], budget).sets()).loss
                     for budget in (30, 40)]) for one in (far, near)]
    assert found["by_prompt"][1] == pytest.approx(want, abs=1e-3)
    assert found["least_minus_chosen"]["mean"] == pytest.approx(found["least_loss"] - found["chosen_loss"])
    # What was measured is read: no prompt is built.
    again = held_out_ways(tmp_path, engine, RememberedTasks(small, until=0), heads.Ways(tables, far, near),
                          "number", prompts, (30, 40))
    assert again == found
    same = held_out_ways(tmp_path, engine, RememberedTasks(small, until=0), heads.Ways(tables, far, far),
                         "number", prompts, (30, 40))
    assert same["prompts"] == 0 and "least_loss" not in same
    told = "\n".join(ways_section({"columns": {"inside": {"ways": [found, same]}}}))
    assert "In 1 of them both take the same way. " in told
    assert f"| inside | number | 2 | {far} | {found['chosen_loss']:.2f} | {near} |" in told


def earlier_report(**columns: str) -> dict:
    return {"command": "before", "versions": {"keepset": "0", "backend": "b"}, "small_model": {"a": 1},
            "hf_model": {"revision": "r", "columns": dict(columns),
                         "missing": [{"column": column} for column in columns]}}


def test_what_a_run_did_not_measure_stays_with_its_command():
    found = {"command": "now", "versions": {"keepset": "1", "backend": "b"}, "small_model": {"a": 2}}
    kept = keep_earlier(found, earlier_report(needles="n"))
    assert kept["small_model"] == {"a": 2} and kept["hf_model"]["columns"] == {"needles": "n"}
    assert kept["kept"] == {"hf_model": {"command": "before", "versions": {"keepset": "0", "backend": "b"}}}
    # Another run later: still from the one that measured it.
    assert keep_earlier(found | {"command": "later"}, kept)["kept"] == kept["kept"]


def test_columns_of_the_same_model_stay():
    found = earlier_report(needles="new") | {"command": "now"}
    kept = keep_earlier(found, earlier_report(needles="old", inside="i"))
    assert kept["hf_model"]["columns"] == {"needles": "new", "inside": "i"}
    assert [one["column"] for one in kept["hf_model"]["missing"]] == ["needles", "inside"]
    assert kept["kept"]["hf_model.inside"]["command"] == "before"
    # A third run of one column: what stays is from the run that measured it.
    third = keep_earlier(earlier_report(inside="newest") | {"command": "third"}, kept)
    assert third["kept"]["hf_model.needles"]["command"] == "now" and len(third["kept"]) == 1
    other = earlier_report(needles="new")
    other["hf_model"]["revision"] = "another"
    assert "kept" not in keep_earlier(other, kept)


@pytest.mark.parametrize("variables", [(), ("HF_MODEL=/models/one",)])
def test_make_measures_the_model_that_it_is_given(variables):
    root = pathlib.Path(__file__).parents[2]
    told = subprocess.run(["make", "-n", "evidence-heads", *variables], cwd=root, capture_output=True,
                          text=True, check=True).stdout
    assert ("--hf-model /models/one" in told) == bool(variables)
    assert "--out docs/results" in told


def test_the_command_keeps_the_earlier_model(build, tmp_path, monkeypatch):
    earlier = {"command": "with a model", "versions": {"keepset": "0.0.9", "backend": "cpu", "numpy": "n"},
               "hf_model": {"layers_and_heads": [1, 1], "revision": "r", "lengths": [256],
                            "fit_lengths": [256], "prompts": [1], "calibration_text": "a",
                            "calibration_prompts": 1, "fit_budgets": [40], "test_text": "b",
                            "test_seeds": [0, 1], "fixed_heads": {}, "missing": [], "floor": 0.4,
                            "budgets": [40], "columns": {}}}
    (tmp_path / "observation_heads.json").write_text(json.dumps(earlier))
    monkeypatch.setattr(sys, "argv", ["evidence", "--build", str(build.root), "--out", str(tmp_path),
                                      "--work", str(tmp_path / "work"), "--parts"])
    assert evidence_command.main() == 0
    report = (tmp_path / "observation_heads.md").read_text()
    assert "kept from an earlier one, `with a model`, with libkeepset 0.0.9" in report
    assert read_results(tmp_path)["hf_model"]["revision"] == "r"
    assert "hf_model" not in json.loads((tmp_path / "observation_heads.json").read_text())
