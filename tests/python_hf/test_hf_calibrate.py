"""Calibration of a model directory: `--model hf:DIRECTORY`."""

import dataclasses
import json
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from families import plain_model, windowed_everywhere
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from keepset import table_file
from keepset.calibrate.__main__ import main
from keepset.calibrate.hf_prompts import HfTextAdapter
from keepset.calibrate.ray_rollouts import RayRollouts
from keepset.calibrate.records import StepFile, key_of, read
from keepset.calibrate.rollouts import Rollouts, Weights
from keepset.eval import vocabulary
from keepset.eval.small_model import SmallModel
from keepset.in_process import Engine

TEXT = vocabulary.COMMON_LICENSES / "GPL-3"
MEASURING = {"seed": 0, "parameters": {"alpha_scope": "global"}, "actions_per_state": 2,
             "protect_window": 8}


@pytest.fixture(scope="module")
def directory(exported, tmp_path_factory) -> pathlib.Path:
    """The small model with a tokenizer of its words, `<bos>` first."""
    words = SmallModel.load().words.words
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+|[.,;:()]"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", words.index("<bos>"))])
    copied = tmp_path_factory.mktemp("models") / "words"
    shutil.copytree(exported, copied)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>"
                            ).save_pretrained(copied)
    return copied


@pytest.fixture(scope="module")
def adapter(directory):
    return HfTextAdapter(directory, (TEXT,), seq_len=160, continuation=24, window=16)


def test_the_same_seed_is_the_same_prompt(adapter):
    first, second = adapter.prompts(range(2))
    (again,) = adapter.prompts(range(1, 2))
    assert (first.seq_len, first.prompt_id.startswith(f"{adapter.name}-0-at-")) == (160, True)
    assert (second.prompt_id, second.full_loss) == (again.prompt_id, again.full_loss)
    assert first.prompt_id != second.prompt_id


def test_other_texts_or_lengths_have_another_name(adapter):
    assert adapter.name.startswith("hf-words-")
    other = dataclasses.replace(adapter, texts=(vocabulary.COMMON_LICENSES / "MPL-2.0",))
    longer = dataclasses.replace(adapter, continuation=25)
    assert len({adapter.name, other.name, longer.name, dataclasses.replace(adapter).name}) == 3


def test_loss_is_that_of_the_continuation(adapter):
    """Against one forward pass over prompt and continuation."""
    (prompt,) = adapter.prompts(range(7, 8))
    prefix, text = adapter._tokens
    begin = int(prompt.prompt_id.rsplit("-", 1)[1])
    ids = np.concatenate([prefix, text[begin : begin + 160 - 1 + 24]])
    assert ids[0] == 0
    whole = adapter._model.prefill(ids, 23)
    expected = -whole.token_logprobs[-23:].mean()
    assert prompt.full_loss == pytest.approx(expected, abs=1e-3)
    assert prompt.loss([np.arange(160)] * 2) == prompt.full_loss
    assert prompt.loss([np.arange(150, 160)] * 2) != pytest.approx(prompt.full_loss, abs=1e-3)


def test_a_copy_for_another_process_brings_no_weights(adapter):
    list(adapter.prompts(range(1)))
    data = pickle.dumps(adapter)
    assert len(data) < 2000
    (ours,), (theirs,) = (one.prompts(range(3, 4)) for one in (adapter, pickle.loads(data)))
    assert ours.full_loss == theirs.full_loss


def test_ray_workers_measure_what_one_process_measures(build, adapter, tmp_path):
    def run(rollouts, path):
        with StepFile(path, "t/1@0") as file:
            rollouts.run("head", Weights.neutral(adapter.fingerprint(), 1), "t/1@0", file,
                         lambda done: None)
        return sorted(read(path), key=key_of)

    with Engine(build.library) as engine:
        alone = run(Rollouts(engine, adapter.fingerprint(), list(adapter.prompts(range(2))), [40],
                             **MEASURING), tmp_path / "alone")
    with RayRollouts(build.library, adapter, range(2), [40], num_workers=2, **MEASURING) as two:
        assert run(two, tmp_path / "two") == alone
    assert len(alone) == 2 * 4 * 2


@pytest.fixture
def refusal(build, tmp_path, monkeypatch, capsys):
    """The one line that the command ends with when it refuses a model directory or settings."""
    def run(directory, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [
            "calibrate", "--build", str(build.root), "--model", f"hf:{directory}",
            "--out", str(tmp_path / "r.jsonl"), *arguments])
        assert main() == 3
        return capsys.readouterr().err.splitlines()[-1]

    return run


def test_the_command_compiles_a_table_of_a_model_directory(build, directory, tmp_path):
    table = tmp_path / "t.safetensors"
    done = subprocess.run(
        [sys.executable, "-m", "keepset.calibrate", "--build", str(build.root),
         "--model", f"hf:{directory}", "--text", str(TEXT), "--seq-len", "120", "--continuation", "16",
         "--window", "8", "--prompts", "2", "--budgets", "32", "--actions", "3", "--rounds", "1",
         "--entropy-bins", "1", "--ppl-bins", "1", "--out", str(tmp_path / "r.jsonl"),
         "--table", str(table)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = table_file.read_table(table.read_bytes())
    assert found.document["model"]["architecture"] == "llama"
    assert found.document["name"].startswith("hf-words-")
    assert found.head_weights.shape == (1, 2, 4)
    settings = json.loads((tmp_path / "r.jsonl.steps" / "settings.json").read_text())
    assert settings["sequence_lengths"] == [120, 120]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--seq-len", "100000"], "tokens, want at least 100127 for one prompt and its continuation"),
    (["--text", "absent.txt"], "absent.txt"),
    (["--seq-len", "1"], "seq_len=1, continuation=128, window=64, want at least 2, 2 and 1"),
])
def test_settings_that_cannot_be_are_refused(refusal, directory, arguments, message):
    assert message in refusal(directory, *arguments)


def test_a_directory_without_a_model_is_refused(refusal, tmp_path):
    assert f"{tmp_path}: " in refusal(tmp_path)


def test_a_directory_without_a_tokenizer_is_refused(refusal, exported):
    assert f"{exported}: no tokenizer: " in refusal(exported)


def test_a_model_of_windows_only_is_refused(refusal, tmp_path):
    plain_model(windowed_everywhere(), "sdpa").save_pretrained(tmp_path)
    assert f"{tmp_path}: every layer has a sliding window" in refusal(tmp_path)
