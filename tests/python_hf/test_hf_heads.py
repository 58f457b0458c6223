"""Observation heads of a model directory: tasks in plain English, calibration and evidence."""

import dataclasses
import json
import pathlib
import sys

import numpy as np
import pytest
from families import plain_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from keepset.calibrate import CalibrationError, observation_heads
from keepset.calibrate.head_prompts import KL, candidate_scores
from keepset.calibrate.hf_head_tasks import HfTasks
from keepset.calibrate.prompt_builder import Continuation, Script
from keepset.eval import vocabulary
from keepset.evidence.earlier_run import read_results
from keepset.evidence.head_methods import agnostic_methods, plain_methods
from keepset.evidence.observation_heads import main
from keepset.in_process import Engine

TEXTS = [vocabulary.COMMON_LICENSES / "GPL-3"]
LENGTH = 900
TEMPLATE = ("{% for message in messages %}<user>{{ message['content'] }}</user>{% endfor %}"
            "{% if add_generation_prompt %}<answer>{% endif %}")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> pathlib.Path:
    """A tiny model of random weights whose tokens are bytes, with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "bytes"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({one: index for index, one in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE).save_pretrained(folder)
    plain_model(LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=4096), "sdpa"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(directory) -> HfTasks:
    return HfTasks.load(directory, TEXTS, window=16)


def read(tasks: HfTasks, script: Script, begin: int = 0, end: int | None = None) -> str:
    """The text at positions [begin, end) of a prompt."""
    return tasks._tokenizer.decode(script.ids[begin:end])


@pytest.mark.parametrize("task", HfTasks.TASKS)
def test_a_prompt_is_text_question_and_template(tasks, task):
    prompt = tasks.prompt(task, 3, LENGTH)
    script = tasks.script(task, 3, LENGTH)
    assert len(script.ids) == prompt.seq_len and script.observe == prompt.observe
    whole = read(tasks, script)
    assert whole.startswith("<user>")
    assert 0.7 * LENGTH < prompt.seq_len < 1.4 * LENGTH
    if task.startswith("later_"):
        assert not whole.endswith("<answer>") and prompt.probe is not None
        return
    question = read(tasks, script, *prompt.observe)
    assert question.strip() and whole.endswith(question + "</user><answer>")
    # The question and the template's tail stay, for every method.
    assert prompt.protect_window == prompt.seq_len - prompt.observe[0]


def test_what_is_hidden_stands_in_the_prompt(tasks):
    script = tasks.script("tracking", 4, LENGTH)
    assert read(tasks, script, 0, script.observe[0]).count("VAR ") == 10


def test_the_need_is_what_the_continuation_attends_to(tasks):
    prompt = tasks.prompt("number", 3, LENGTH)
    # Seven digits, each in 2 layers of 4 heads; what they attend to among themselves is not counted.
    assert 0 < prompt.need.sum() <= 7 * 8
    assert prompt.need.shape == (prompt.seq_len,)


def test_the_full_cache_diverges_from_itself_by_nothing(tasks):
    for task in ("summary", "later_number"):
        prompt = tasks.prompt(task, 3, LENGTH)
        outcome = prompt.outcome([np.arange(prompt.seq_len)] * 2)
        assert outcome.kl == pytest.approx(0, abs=1e-6)
        fewer = prompt.outcome([np.arange(prompt.seq_len - 40, prompt.seq_len)] * 2)
        assert fewer.kl > 0
    assert tasks.prompt("summary", 3, LENGTH).scored == KL


@pytest.mark.parametrize("task", ["number", "later_number"])
def test_an_exact_answer_is_what_greedy_decoding_writes(tasks, task):
    """The answers are what some keep sets write token by token; each is exact under the sets that write
    it and under no other."""
    plain, rng = tasks.script(task, 3, LENGTH), np.random.default_rng(1)
    seq_len = len(plain.ids)
    keeps = [[np.sort(rng.choice(seq_len, count, replace=False)) for _ in range(2)]
             for count in (60, 60, 200, 400, seq_len - 1, seq_len)]
    question = plain.continuations[0].ids[~plain.continuations[0].judged]
    prefill = tasks.model.prefill(plain.ids, row_positions=[0])

    def written(keep: list) -> list[int]:
        # Without a question after it, the prompt's last token predicts the first of the answer.
        start = seq_len - (task == "number")
        fed = np.concatenate([plain.ids[start:], question])
        return tasks.model.decode(prefill.compact(keep).before(start), fed, start, 6)

    greedy = [written(keep) for keep in keeps]
    assert len({tuple(one) for one in greedy}) > 1
    for answer in greedy:
        script = dataclasses.replace(plain, continuations=(
            Continuation.of((question, False), (answer, True)),))
        prompt = tasks._builder.build(task, f"{task}-0", script)
        exact = [one.exact for one in prompt.outcomes(keeps)]
        assert exact == [one == answer for one in greedy]


def test_every_comparison_keeps_the_budget(build, tasks):
    prompt = tasks.prompt("later_code", 3, LENGTH)
    with Engine(build.library) as engine:
        for name, run in (plain_methods(engine, tasks)
                          | agnostic_methods(engine, tasks, tasks.PROBE)).items():
            sets = run(prompt, 100)
            heads = [head for one in sets for head in ([one] if isinstance(one, np.ndarray) else one)]
            assert max(map(len, heads)) <= 100, name
            assert np.isfinite(prompt.outcome(sets).kl), name


def test_the_candidates_are_those_of_the_whole_model(tasks):
    candidates, scores = candidate_scores(tasks.prompt("number", 3, LENGTH))
    assert len(candidates) == 2 * (4 * 3 + 2) and scores.shape[1] > 0


def test_the_command_compiles_a_table_of_a_model_directory(build, directory, tmp_path, monkeypatch,
                                                           capsys):
    table = tmp_path / "t.safetensors"
    monkeypatch.setattr(sys, "argv", [
        "observation_heads", "--model", f"hf:{directory}", "--text", *map(str, TEXTS), "--build",
        str(build.root), "--out", str(tmp_path / "records"), "--table", str(table), "--tasks",
        "number", "--lengths", "600", "900", "--prompts", "2", "--risk-prompts", "0", "--budgets",
        "200", "--max-heads", "2"])
    assert observation_heads.main() == 0
    document = observation_heads.with_curve(table.read_bytes(), None)[1]
    assert document["kind"] == "observation_heads" and document["model"]["num_layers"] == 2
    assert document["provenance"]["prompts_per_task"] == {"number": 4}
    assert "worst number at" in capsys.readouterr().err


def test_a_text_that_is_not_there_is_named(directory, tmp_path):
    with pytest.raises(CalibrationError, match="absent.txt"):
        HfTasks.load(directory, [tmp_path / "absent.txt"])


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(CalibrationError, match=str(tmp_path)):
        HfTasks.load(tmp_path, TEXTS)


@pytest.fixture
def evidence(build, directory, tmp_path, monkeypatch, capsys):
    """Runs the command into tmp_path; returns what it says."""
    def run(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", [
            "observation_heads", "--build", str(build.root), "--out", str(tmp_path / "out"), "--work",
            str(tmp_path / "work"), "--parts", "--hf-model", str(directory), "--hf-text",
            str(TEXTS[0]), "--hf-test-text", str(vocabulary.COMMON_LICENSES / "MPL-2.0"), "--hf-tasks",
            "number", "summary", "later_summary", "--hf-lengths", "600", "--hf-budgets", "200",
            "--hf-fit-budgets", "200", "--hf-prompts", "1", "--hf-calibration-prompts", "2",
            "--hf-risk-prompts", "1", "--hf-max-heads", "2", "--hf-window", "16",
            "--hf-gate-prompts", "1", *more])
        assert main() == 0
        return capsys.readouterr().err

    return run


def test_the_evidence_says_what_a_model_cannot_do_and_goes_on(evidence, tmp_path):
    said = evidence()
    assert "record " in said
    found = read_results(tmp_path / "out")["hf_model"]
    number = found["columns"]["needles"]["tasks"]["number"]
    summary = found["columns"]["inside"]["tasks"]["summary"]
    assert number["full"] == 0 and number["value"] == summary["value"] == "kl"
    assert number["methods"]["observation_heads"]["200"]["value"] > 0
    report = (tmp_path / "out" / "observation_heads.md").read_text()
    assert "| needles | number | 1 | 0.00 (1) | KL |" in report
    raw = json.loads(next((tmp_path / "work").rglob("number-600-1000.json")).read_text())
    assert raw["full"]["predicted"] and "predicted" in raw["methods"]["snapkv"]["200"]
    assert "record " not in evidence()
    again = read_results(tmp_path / "out")["hf_model"]
    assert again["columns"]["inside"]["tasks"] == found["columns"]["inside"]["tasks"]


def test_a_report_in_between_says_what_it_lacks(evidence, tmp_path):
    assert "out of time" in evidence("--hf-minutes", "0")
    report = (tmp_path / "out" / "observation_heads.md").read_text()
    assert "needles number at 600: 0 of 1 prompts" in report
    assert "--hf-model DIRECTORY" in report and str(tmp_path.parent) not in report
    evidence()
    assert "Not measured yet" not in (tmp_path / "out" / "observation_heads.md").read_text()
