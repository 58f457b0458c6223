"""The claim of the project, end to end: rollouts, fit, serving, test on other prompts."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import binary

import keepset
from keepset import table_file
from keepset.calibrate.__main__ import Build
from keepset.evidence import __main__ as evidence
from keepset.evidence import headroom, report, small_model_part, statistics, tables, transfer
from keepset.server_process import ServerProcess

MODEL = keepset.ModelFingerprint("tiny", 3, 8, 4, 8)


@pytest.fixture(scope="module")
def build():
    return Build(binary().parent.parent)


@pytest.fixture(scope="module")
def quick(build, tmp_path_factory):
    """The quick form's exit status and what it wrote."""
    out, work = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("work")
    done = subprocess.run(
        [sys.executable, "-m", "keepset.evidence", "--quick", "--no-plots", "--build", str(build.root), "--out",
         str(out), "--work", str(work)], check=False,
        # Small matrices: BLAS threads would only wait for each other.
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    return done.returncode, out, work


def test_compiled_table_finds_the_marker_head_and_uniform_does_not(quick):
    status, out, _ = quick
    (case,) = json.loads((out / "evidence.json").read_text())["constructed"]
    accuracy = {name: row["accuracy"] for name, row in case["rows"].items()}
    assert accuracy["uniform"] <= 0.20 and accuracy["shuffled"] <= 0.20
    assert accuracy["compiled"] >= 0.95
    assert case["gain_compiled_over_uniform"]["low"] > 0.5
    assert all(case["marker_has_largest_weight"])
    assert case["passed"] and status == 0


def test_report_says_what_was_measured(quick):
    _, out, _ = quick
    found = json.loads((out / "evidence.json").read_text())
    assert (out / "evidence.md").read_text() == report.markdown(found)
    assert set(found["constructed"][0]["digests"]) == {"uniform", "compiled", "shuffled", "heads only",
                                                       "gate only"}


def test_report_says_what_the_run_took(quick):
    _, out, _ = quick
    run = json.loads((out / "evidence.json").read_text())["run"]
    assert run["wall_seconds"] > 0 and run["cpu_seconds"] > 0 and not run["resumed"]
    assert "One run, from scratch: " in (out / "evidence.md").read_text()


def test_report_tells_gates_cells_and_the_halves_of_a_table(quick):
    _, out, _ = quick
    (case,) = json.loads((out / "evidence.json").read_text())["constructed"]
    assert case["rows"]["heads only"]["accuracy"] >= 0.95
    assert case["rows"]["gate only"]["accuracy"] <= 0.20
    assert sum(case["rows"]["compiled"]["hits_by_entropy_and_ppl_bin"].values()) == 12
    assert 0 <= case["rows"]["compiled"]["under_filled"] <= 1
    assert case["calibration"]["coverage"]["chosen"] == 4
    assert "candidates uniform" in (out / "evidence.md").read_text()


def test_records_of_a_run_pass_the_tool_that_checks_them(quick, build):
    *_, work = quick
    done = subprocess.run(
        [str(build.keepset), "tables", "records", str(work / "constructed-0" / "records.jsonl"),
         "--json"], capture_output=True, text=True, check=True)
    records = json.loads(done.stdout)["records"]
    assert (records["rejected"], records["head"], records["gate"]) == (0, 4 * 8 * 8, 4 * 6)


def test_other_settings_in_the_same_place_are_refused(quick, build):
    *_, work = quick
    settings = work / "constructed-0" / "records.jsonl.steps" / "settings.json"
    settings.write_text(settings.read_text().replace('"global"', '"layer"'))
    with pytest.raises(ValueError, match="parameters"):
        evidence.run(build, work / "unused", work, quick=True)


def test_table_of_another_model_is_refused(quick):
    *_, work = quick
    with ServerProcess(binary(), tables=work / "constructed-0" / "tables") as server, \
            keepset.Client.connect(server.address) as client:
        with pytest.raises(keepset.Refused):
            client.compress(
                model=MODEL, seq_len=32, softmax_scale=1.0, policy="compilerkv", ppl=2.0,
                table=keepset.TablePin(name="compiled"), budget=keepset.Budget.tokens(96),
                layers=[keepset.Layer(q_window=np.ones((8, 2, 8), np.float32),
                                      k=np.ones((4, 32, 8), np.float32),
                                      v=np.ones((4, 32, 8), np.float32))] * 3)


def test_shuffled_table_holds_the_same_numbers_at_other_places():
    rng = np.random.default_rng(0)
    groups = np.stack([rng.permutation(np.linspace(0.8, 1.5, 4)) for _ in range(3)])
    compiled = table_file.compilerkv_table(
        MODEL, name="t", version="1", head_weights=np.repeat(groups, 2, 1)[None],
        gate_thresholds=np.linspace(0.8, 1.0, 18).reshape(1, 3, 3, 2), entropy_edges=[1, 2],
        ppl_edges=[5], budgets=[96], algorithm={"name": "x"}, source="offline-calibration")
    before = table_file.read_table(compiled)
    after = table_file.read_table(tables.shuffled(MODEL, compiled, "s", 3))
    for name in ("head_weights", "gate_thresholds"):
        old, new = (getattr(one, name)[0].reshape(3, -1) for one in (before, after))
        assert np.array_equal(np.sort(old, 1), np.sort(new, 1))
        assert not (old == new).any()
    assert after.document["provenance"]["source"] == "hand-written"


def test_interval_of_a_constant_is_the_constant():
    assert statistics.bootstrap_interval([0.25] * 9) == (0.25, 0.25)
    gap = statistics.paired_difference([1, 1, 0, 1], [0, 0, 0, 0])
    assert gap["low"] < gap["mean"] == 0.75 < gap["high"]


def test_mcnemar_counts_the_questions_that_disagree():
    split = statistics.mcnemar([True] * 6 + [True, False], [False] * 6 + [True, False])
    assert (split["only_first"], split["only_second"]) == (6, 0)
    assert split["p"] == pytest.approx(2 / 64)
    assert statistics.mcnemar([True], [True])["p"] == 1


def test_rank_correlation_shares_ranks_among_ties():
    assert transfer.spearman(np.array([1.0, 2, 2, 5]), np.array([10.0, 20, 20, 30])) == pytest.approx(1)
    assert transfer.spearman(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    assert transfer.spearman(np.array([1.0, 1, 1]), np.array([3.0, 2, 1])) is None


def test_rewards_of_the_marker_head_spread_widest(quick):
    *_, work = quick
    path = work / "constructed-0" / "records.jsonl"
    agreement = transfer.ranking_agreement(path, path)
    assert agreement["mean"] == pytest.approx(1)
    rewards = transfer.mean_rewards(path)
    spread = {state[2]: max(all_.values()) - min(all_.values()) for state, all_ in rewards.items()}
    case = json.loads((quick[1] / "evidence.json").read_text())["constructed"][0]
    assert max(spread, key=spread.get) == case["roles"][0].index("marker")


def test_halves_of_a_compiled_table_keep_their_half():
    compiled = table_file.compilerkv_table(
        MODEL, name="t", version="1", head_weights=np.full((1, 3, 8), 1.2),
        gate_thresholds=np.full((1, 3, 1, 1), 0.95), entropy_edges=[], ppl_edges=[], budgets=[96],
        algorithm={"name": "x"}, source="offline-calibration")
    heads = table_file.read_table(tables.heads_only(MODEL, compiled, "h"))
    gates = table_file.read_table(tables.gate_only(MODEL, compiled, "g"))
    assert np.allclose(heads.head_weights, 1.2) and np.allclose(heads.gate_thresholds, 0.8)
    assert np.allclose(gates.head_weights, 1.0) and np.allclose(gates.gate_thresholds, 0.95)


@pytest.fixture(scope="module")
def small(build, tmp_path_factory):
    """The small model's part at a size that takes seconds: what is computed, not what comes out."""
    settings = small_model_part.Settings(
        seq_len=300, num_facts=8, questions_per_prompt=2, variants=small_model_part.VARIANTS[::2],
        budgets=(24, 64), calibration_pool=range(4), calibration_prompts=3, action_step=14, max_rounds=1,
        test_seeds=range(1000, 1003), headroom_seeds=range(1000, 1002), curve_prompts=(1, 3),
        transfer_variant=1, transfer_seeds=range(2), transfer_test_seeds=range(2000, 2002),
        transfer_rounds=1, entropy_bins=2, ppl_bins=1)
    return small_model_part.run(build, tmp_path_factory.mktemp("small"), settings, lambda line: None)


def test_small_model_is_served_by_every_method_in_both_columns(small):
    methods = {row["method"] for row in small["rows"]}
    kinds = ("uniform", "compiled", "shuffled", "heads only", "gate only")
    assert methods == {"full", "streaming_llm", "random", "knorm", "tova", "snapkv"} | {
        f"compilerkv {variant} {kind}" for variant in ("global", "global pool3") for kind in kinds}
    for row in small["rows"]:
        assert row["column"] in ("inside", "later") and row["kl_mean"] <= row["kl_p95"] + 20
        assert row["interval"][0] <= row["exact"] <= row["interval"][1]
        assert len(row["predicted"]) == 3
        assert row["bytes_after"] == row["bytes_before"] if row["method"] == "full" else (
            row["bytes_after"] < row["bytes_before"])
    full = [row for row in small["rows"] if row["method"] == "full"]
    assert all(row["exact"] == 1 and row["kl_mean"] == pytest.approx(0, abs=1e-6) for row in full)


def test_small_model_report_has_every_section(small, quick):
    found = json.loads((quick[1] / "evidence.json").read_text()) | {"small_model": small}
    text = report.markdown(json.loads(json.dumps(found)))
    for part in ("Do compiled tables help here?", "Why: what any table could gain", "Question inside",
                 "Question later", "Compiled table against the others", "KL p95", "only compiled right",
                 "Gates and risk cells", "Transfer, variant global pool3", "lost by the swap",
                 "risk cells calibrated", "3 prompts"):
        assert part in text, part


def test_best_table_in_hindsight_is_never_worse_than_the_uniform_one(small):
    for rows in small["headroom"].values():
        for row in rows:
            assert row["best_beyond_grid"] <= row["best_on_grid"] <= row["worst"]


@pytest.mark.parametrize("uniform,compiled,on_grid,beyond,expected", [
    (0.05, 0.04, 0.0, 0.0, "ceiling"), (9.0, 9.0, 8.9, 8.5, "no signal"),
    (5.0, 5.0, 4.9, 1.0, "grid"), (5.0, 4.8, 3.0, 1.0, "not learned"), (5.0, 3.5, 3.0, 1.0, "learned")])
def test_reason_follows_from_what_is_left_to_gain(uniform, compiled, on_grid, beyond, expected):
    assert headroom.reason({"full": 0.0, "uniform_open": uniform, "compiled": compiled,
                            "best_on_grid": on_grid, "best_beyond_grid": beyond}) == expected


def test_ranking_agreement_tells_steep_states_from_flat_ones(tmp_path):
    def record(action, loss, kv_head):
        return {"kind": "head", "budget": 64, "layer": 0, "kv_head": kv_head, "action": action,
                "full_loss": 0.0, "compressed_loss": loss}

    def write(name, losses):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record(action, loss, kv_head)) + "\n"
                                for kv_head, row in enumerate(losses)
                                for action, loss in zip((0.8, 1.0, 1.5), row)))
        return path

    first = write("a", [[3.0, 2.0, 1.0], [1.0, 1.01, 1.02]])
    second = write("b", [[2.5, 2.0, 0.5], [1.02, 1.01, 1.0]])
    found = transfer.ranking_agreement(first, second)
    assert found["mean"] == pytest.approx(0) and found["ranked_states"] == 2
    assert (found["steep_states"], found["mean_of_steep_states"]) == (1, pytest.approx(1))


def test_pictures_are_drawn_from_the_report(small, quick, tmp_path):
    plots = pytest.importorskip("keepset.evidence.plots", reason="extra `plots` is not installed")
    found = json.loads((quick[1] / "evidence.json").read_text()) | {
        "small_model": json.loads(json.dumps(small))}
    names = plots.draw(found, tmp_path)
    assert names == ["evidence-constructed.png", "evidence-accuracy.png", "evidence-curve.png",
                     "evidence-gates.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
