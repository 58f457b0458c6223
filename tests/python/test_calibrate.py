"""Rollouts and their records; the fit itself is tested where it lives."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import binary

import keepset
from keepset import table_file
from keepset.calibrate import CalibrationError, stratify
from keepset.calibrate.__main__ import Build, calibrate
from keepset.calibrate.alternation import NEUTRAL, Progress, steps_of
from keepset.calibrate.convergence import change
from keepset.calibrate.grids import GATE_GRID, HEAD_GRID, Grid, Grids
from keepset.calibrate.prompts import ConstructedAdapter, Prompt, SmallModelAdapter
from keepset.calibrate.records import StepFile, read
from keepset.calibrate.rollouts import Entry, Rollouts, Weights
from keepset.calibrate.stratify import Signals, choose
from keepset.eval import constructed
from keepset.eval.small_model import SmallModel
from keepset.in_process import Engine, EngineError, TileLayer
from keepset.server_process import ServerProcess

BUDGET = 48
HEAD_ACTIONS, GATE_ACTIONS = HEAD_GRID.actions(), GATE_GRID.actions()
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


def test_actions_are_those_of_the_paper_unless_another_grid_is_asked_for():
    assert HEAD_ACTIONS[:2] + HEAD_ACTIONS[-1:] == (0.8, 0.825, 1.5) and len(HEAD_ACTIONS) == 29
    assert GATE_ACTIONS[:2] + GATE_ACTIONS[-1:] == (0.8, 0.81, 1.0) and len(GATE_ACTIONS) == 21
    assert Grid.parse("--head-actions", "0.5:0.25:4").actions() == (0.5, 0.75, 1.0, 1.25)
    assert Grid.parse("--head-actions", str(HEAD_GRID)) == HEAD_GRID


@pytest.mark.parametrize("text", ["", "0.8", "0.8:0.1", "a:0.1:3", "0.8:0.1:3:4", "0:0.1:3", "nan:0.1:3",
                                  "0.8:inf:3", "0.8:-0.1:3", "0.8:0.0001:3", "0.8:0.1:1", "0.8:0.1:65",
                                  "0.8:0.1:2.5", "999:1:3"])
def test_what_is_no_grid_is_refused_by_name(text):
    with pytest.raises(CalibrationError, match="--gate-actions .*, want FIRST:STEP:COUNT"):
        Grid.parse("--gate-actions", text)


def test_values_of_a_table_lead_back_to_their_action():
    grid = Grid(0.8125, 0.025, 40)
    assert [grid.index(float(np.float32(action))) for action in grid.actions()] == list(range(40))
    assert grid.index(0.82) is None and grid.index(0.78) is None and grid.index(1.8125) is None


def test_candidate_tables_may_hold_what_the_fit_puts_where_nothing_was_measured():
    assert Grids().ranges() == {"head": [0.8, 1.5], "gate": [0.8, 1.0]}
    away = Grids(Grid(0.2, 0.1, 3), Grid(0.9, 0.05, 3))
    assert away.ranges() == {"head": [0.2, 1.0], "gate": [0.8, 1.0]}


def test_a_run_on_other_grids_measures_and_compiles_them(adapter, tmp_path):
    grids = Grids(Grid(0.5, 0.5, 4), Grid(0.3, 0.3, 3))
    out = tmp_path / "records.jsonl"
    outcome = calibrate(Build(binary().parent.parent), adapter, out, seeds=range(2), budgets=[BUDGET],
                        alpha_scope="global", max_rounds=2, name="t", version="1", grids=grids,
                        say=lambda line: None, bins=(1, 1))
    actions = {kind: {record["action"] for record in read(out) if record["kind"] == kind}
               for kind in ("head", "gate")}
    assert actions == {"head": {0.5, 1.0, 1.5, 2.0}, "gate": {0.3, 0.6, 0.9}}
    table = table_file.read_table(outcome.table)
    np.testing.assert_allclose(table.document["grid"]["head"], [0.5, 2.0])
    marker = adapter.model.marker_heads()[0]
    assert table.head_weights[0, 0, 2 * marker] == table.head_weights.max() > 1
    assert all(grids.gate.index(float(gate)) is not None for gate in table.gate_thresholds.flat)
    settings = json.loads((steps_of(out) / "settings.json").read_text())
    assert settings["grids"] == {"head": "0.5:0.5:4", "gate": "0.3:0.3:3"}


def test_a_grid_of_the_command_line_that_is_none_ends_the_run_by_name(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "keepset.calibrate", "--model", "constructed", "--out",
         str(tmp_path / "r.jsonl"), "--build", str(binary().parent.parent), "--head-actions", "0.8:1"],
        capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "--head-actions 0.8:1, want FIRST:STEP:COUNT" in done.stderr


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


def test_two_runs_cannot_write_the_same_step(tmp_path):
    path = tmp_path / "h.jsonl"
    with StepFile(path, "t/1@0") as first:
        first.append(head_record(1.0, 2.0))
        with pytest.raises(CalibrationError, match="another run is writing it"):
            StepFile(path, "t/1@0")
    with StepFile(path, "t/1@0") as second:
        assert len(second) == 1


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


def signals(entropies, ppls):
    return [Signals(seed, f"p{seed}", entropy, ppl)
            for seed, (entropy, ppl) in enumerate(zip(entropies, ppls))]


def test_chosen_prompts_cover_every_cell_that_the_pool_reaches():
    # Low entropy and low perplexity go together in 90 of 100 prompts: drawn by chance, few of the
    # other two cells would be chosen.
    rng = np.random.default_rng(1)
    entropies = rng.normal(4, 1, 100)
    ppls = np.where(np.arange(100) < 90, entropies, 8 - entropies) + 20
    made = choose(signals(entropies, ppls), 12, (2, 2))
    assert made.covered_cells == made.reachable_cells == 4
    assert {count for row in made.chosen_per_cell for count in row} == {3}
    assert sum(map(sum, made.pool_per_cell)) == 100


def test_fewer_prompts_than_cells_are_spread_and_always_the_same():
    entropies = np.linspace(0, 9, 200)
    pool = signals(entropies, np.linspace(2, 90, 200)[::-1])
    made = choose(pool, 5, (20, 4))
    assert made == choose(pool[::-1], 5, (20, 4))
    assert made.covered_cells == 5
    rows = [row for row, counts in enumerate(made.chosen_per_cell) if any(counts)]
    assert max(rows) - min(rows) >= 8


def test_more_prompts_than_the_pool_holds_are_refused():
    with pytest.raises(CalibrationError, match="5 prompts of a pool of 2, want 1..2"):
        choose(signals([1, 2], [3, 4]), 5, (2, 2))


def test_signals_are_those_that_the_engine_decides_by(engine, adapter, prompts):
    table = table_file.uniform_table(adapter.fingerprint(), name="t", version="1")
    found = stratify.signals_of(prompts[0])
    decided = engine.decide(model=adapter.fingerprint(), layers=prompts[0].layers, table=table,
                            budget_tokens=BUDGET, ppl=prompts[0].ppl)
    assert found.entropy == pytest.approx(decided.entropy[0], abs=1e-4)
    assert (found.seed, found.ppl) == (0, prompts[0].ppl)


class CountedAdapter:
    """Hands on a shorter adapter's prompts and counts how many were read."""

    def __init__(self, adapter):
        self._adapter, self.name, self.read = adapter, adapter.name, 0

    def fingerprint(self):
        return self._adapter.fingerprint()

    def prompts(self, seeds):
        for prompt in self._adapter.prompts(seeds):
            self.read += 1
            yield prompt


def test_pool_is_read_once_for_all_runs_and_belongs_to_its_adapter(adapter, tmp_path):
    counted = CountedAdapter(adapter)

    def chosen(pool):
        return stratify.stratified_seeds(counted, pool, 2, (2, 2), tmp_path / "pool.json",
                                         lambda line: None)

    first = chosen(range(3))
    assert chosen(range(3)) == first and counted.read == 3
    with pytest.raises(CalibrationError, match="another pool"):
        chosen(range(4))


def weights(heads, gates, entropy_edges=()):
    return Weights(np.array(heads, np.float32), np.array(gates, np.float32),
                   np.array(entropy_edges, np.float32), np.zeros(0, np.float32))


def head_record(action, loss, kv_head=0, prompt="p"):
    return {"kind": "head", "prompt_id": prompt, "seed": 0, "budget": 64, "layer": 0, "kv_head": kv_head,
            "action": action, "full_loss": 0.5, "compressed_loss": loss, "sequence_length": 100,
            "paired_policy": "t/1@0"}


def gate_record(action, loss, entropy, candidates):
    return {"kind": "gate", "prompt_id": "p", "seed": 0, "budget": 64, "layer": 0, "action": action,
            "full_loss": 0.5, "compressed_loss": loss, "sequence_length": 100, "entropy": entropy,
            "ppl": 5.0, "candidate_count": candidates, "paired_policy": "t/1@0"}


def changed(tmp_path, records, before, after):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return change(before, after, [path], [64], group_size=2)


def test_a_flat_state_that_flips_has_settled_and_a_steep_one_has_not(tmp_path):
    records = [head_record(1.0, 2.0), head_record(1.2, 2.01), head_record(1.2, 2.01, prompt="q"),
               head_record(1.0, 2.0, kv_head=1), head_record(1.5, 1.0, kv_head=1)]
    gates = [[[[0.8]]]]
    flat = changed(tmp_path, records, weights([[[1, 1, 1, 1]]], gates),
                   weights([[[1.2, 1.2, 1, 1]]], gates))
    assert (flat.changed_head_states, flat.changed_gate_states, flat.states) == (1, 0, 3)
    assert flat.largest_difference == pytest.approx(0.01)
    assert flat.within(0.02) and not flat.within(0.005)
    steep = changed(tmp_path, records, weights([[[1, 1, 1, 1]]], gates),
                    weights([[[1.2, 1.2, 1.5, 1.5]]], gates))
    assert steep.largest_difference == pytest.approx(1.0) and not steep.within(0.02)


def test_gates_are_compared_in_their_own_cell_with_the_price_of_candidates(tmp_path):
    records = [gate_record(0.8, 1.0, 2.0, 74), gate_record(0.9, 1.0, 2.0, 64),
               gate_record(0.8, 9.0, 6.0, 64), gate_record(0.9, 1.0, 6.0, 64)]
    heads = [[[1, 1, 1, 1]]]
    found = changed(tmp_path, records, weights(heads, [[[[0.8]]]]),
                    weights(heads, [[[[0.9], [0.8]]]], entropy_edges=[4.0]))
    assert (found.changed_gate_states, found.unmeasured) == (1, 0)
    assert found.largest_difference == pytest.approx(0.1)  # (74 - 64) / 100


def test_a_change_that_the_round_did_not_measure_has_not_settled(tmp_path):
    found = changed(tmp_path, [head_record(1.2, 2.0)], weights([[[1, 1, 1, 1]]], [[[[0.8]]]]),
                    weights([[[1.2, 1.2, 1, 1]]], [[[[0.8]]]]))
    assert found.unmeasured == 1 and not found.within(100)


def test_nothing_changed_has_settled(tmp_path):
    same = weights([[[1, 1, 1, 1]]], [[[[0.8]]]])
    found = changed(tmp_path, [], same, same)
    assert found.largest_difference is None and found.within(0)


@pytest.mark.parametrize("field,value,message", [
    ("compressed_loss", float("nan"), "compressed_loss=nan"),
    ("full_loss", float("inf"), "full_loss=inf"),
    ("sequence_length", 0, "sequence_length=0, want 1 or more")])
def test_what_nobody_can_have_measured_is_refused_by_name(tmp_path, field, value, message):
    with StepFile(tmp_path / "h.jsonl", "t/1@0") as file:
        with pytest.raises(CalibrationError, match=message):
            file.append(head_record(1.0, 2.0) | {field: value})
    assert (tmp_path / "h.jsonl").read_bytes() == b""


@pytest.fixture(scope="module")
def small_run(engine, adapter, tmp_path_factory):
    """A whole small calibration: what it says, its outcome and where it lies."""
    out = tmp_path_factory.mktemp("run") / "records.jsonl"
    said: list[str] = []

    def run():
        return calibrate(Build(binary().parent.parent), adapter, out, seeds=range(6), num_prompts=3,
                         budgets=[BUDGET], alpha_scope="global", action_step=4,
                         max_rounds=4, name="t", version="1", say=said.append, bins=(2, 1))

    return run, run(), out, said


def test_alternation_stops_when_what_still_changes_is_worth_nothing(small_run):
    _, outcome, _, said = small_run
    assert outcome.settled and 2 <= outcome.rounds <= 4
    assert outcome.changes[0].largest_difference > 1
    assert outcome.changes[-1].within(outcome.tolerance)
    assert any("states changed, worth" in line for line in said)


def test_coverage_of_the_risk_cells_is_reported(small_run):
    _, outcome, _, said = small_run
    assert outcome.coverage["chosen"] == 3 and outcome.coverage["pool"] == 6
    assert outcome.coverage["covered_cells"] == outcome.coverage["reachable_cells"] == 2
    assert any("2 of 2 risk cells covered" in line for line in said)


def test_every_record_leads_to_its_prompt_seed_and_table(small_run, engine, adapter):
    _, outcome, out, _ = small_run
    steps = steps_of(out)
    settings = json.loads((steps / "settings.json").read_text())
    seeds = dict(zip(settings["prompts"], settings["seeds"]))
    tables = json.loads((steps / "rounds.json").read_text())["paired_policies"]
    found = [record for path in steps.glob("*.jsonl") for record in read(path)]
    assert len(found) == outcome.num_records
    assert all(seeds[record["prompt_id"]] == record["seed"] for record in found)
    # Any record can be measured again from what it names.
    record = found[len(found) // 2]
    name = tables[record["paired_policy"]]
    frozen = Weights.neutral(adapter.fingerprint(), 1) if name == NEUTRAL else Weights.of(
        table_file.read_table((steps / name).read_bytes()))
    assert record["paired_policy"].endswith("@" + frozen.digest())
    again = rollouts(engine, adapter, list(adapter.prompts([record["seed"]])))
    entry = Entry(0, record["layer"], record.get("kv_head"), record["action"])
    assert again.record(record["kind"], 0, entry, frozen, record["paired_policy"]) == record


def test_a_finished_run_started_again_measures_nothing_and_gives_the_same_table(small_run):
    run, outcome, out, said = small_run
    before = {path.name: path.read_bytes() for path in steps_of(out).glob("*.jsonl")}
    del said[:]
    again = run()
    assert {path.name: path.read_bytes() for path in steps_of(out).glob("*.jsonl")} == before
    assert (again.rounds, again.num_records) == (outcome.rounds, outcome.num_records)
    first, second = (table_file.read_table(one.table) for one in (outcome, again))
    np.testing.assert_array_equal(first.head_weights, second.head_weights)
    assert all("from an earlier run" in line for line in said if "records in" in line)


def test_an_interrupted_run_ends_as_an_undisturbed_one(small_run, adapter, tmp_path):
    _, outcome, out, _ = small_run
    steps = tmp_path / "records.jsonl.steps"
    steps.mkdir()
    for name in ("settings.json", "pool.json", "0-gate.jsonl"):
        (steps / name).write_bytes((steps_of(out) / name).read_bytes())
    whole = (steps_of(out) / "1-head.jsonl").read_bytes()
    (steps / "1-head.jsonl").write_bytes(whole[: len(whole) // 3])  # cut in the middle of a line
    resumed = calibrate(Build(binary().parent.parent), adapter, tmp_path / "records.jsonl",
                        seeds=range(6), num_prompts=3, budgets=[BUDGET], alpha_scope="global",
                        action_step=4, max_rounds=4, name="t", version="1",
                        say=lambda line: None, bins=(2, 1))
    assert (tmp_path / "records.jsonl").read_bytes() == out.read_bytes()
    assert resumed.num_records == outcome.num_records


def test_progress_tells_a_terminal_the_time_left_and_a_pipe_the_end_alone(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def shown(stream):
        said: list[str] = []
        monkeypatch.setattr(sys, "stderr", stream)
        progress = Progress("round 1-head", 100, 20, said.append)
        progress._shown = float("-inf")  # as if the last line were old
        progress(60)
        progress.close(100)
        return stream.getvalue(), said

    line, said = shown(Terminal())
    assert "round 1-head: 60/100 records, 0 s left" in line
    assert said[0].startswith("round 1-head: 100 records in")
    assert said[0].endswith("20 of them from an earlier run")
    assert shown(io.StringIO())[0] == ""
