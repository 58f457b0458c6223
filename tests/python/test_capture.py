"""Capture files, read back with the public safetensors library."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from safetensors import safe_open

from keepset.eval import capture, small_model, write_capture


@pytest.fixture(scope="module")
def model() -> small_model.SmallModel:
    return small_model.SmallModel.load()


@pytest.fixture(scope="module")
def prefill(model: small_model.SmallModel) -> small_model.Prefill:
    ids = np.random.default_rng(1).integers(4, 1024, size=50)
    return model.prefill(ids, window=8)


def read(path: pathlib.Path) -> tuple[dict, dict[str, np.ndarray]]:
    with safe_open(str(path), framework="numpy") as file:
        assert list(file.metadata()) == ["keepset"]
        document = json.loads(file.metadata()["keepset"])
        return document, {name: file.get_tensor(name) for name in file.keys()}


def test_capture_states_its_shape_and_model(tmp_path: pathlib.Path,
                                            model: small_model.SmallModel,
                                            prefill: small_model.Prefill) -> None:
    capture.write_capture(tmp_path / "c.safetensors", prefill, model.fingerprint(), ppl=12.5,
                          spans=[("system", 0, 40)])
    document, _ = read(tmp_path / "c.safetensors")
    assert document == {
        "format": "keepset.capture", "format_version": 1, "model": model.fingerprint(),
        "seq_len": 50, "window": 8, "num_layers": 2, "num_qo_heads": 4, "num_kv_heads": 2,
        "head_dim": 32, "softmax_scale": 32**-.5, "ppl": 12.5,
        "spans": [{"name": "system", "begin": 0, "end": 40}]}


def test_capture_holds_the_tensors_of_the_prefill(tmp_path: pathlib.Path,
                                                  model: small_model.SmallModel,
                                                  prefill: small_model.Prefill) -> None:
    capture.write_capture(tmp_path / "c.safetensors", prefill, model.fingerprint())
    document, tensors = read(tmp_path / "c.safetensors")
    assert "ppl" not in document and "spans" not in document
    expected = {"input_ids": prefill.input_ids, "window_logprobs": prefill.token_logprobs[-8:]}
    for index, layer in enumerate(prefill.layers):
        for name in ("q_window", "k", "v", "window_lse"):
            expected[f"layers.{index}.{name}"] = getattr(layer, name)
    assert sorted(tensors) == sorted(expected)
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype
        np.testing.assert_array_equal(tensors[name], value)


def test_half_precision_capture_rounds_once(tmp_path: pathlib.Path,
                                            model: small_model.SmallModel,
                                            prefill: small_model.Prefill) -> None:
    capture.write_capture(tmp_path / "c.safetensors", prefill, model.fingerprint(),
                          dtype=np.float16)
    _, tensors = read(tmp_path / "c.safetensors")
    np.testing.assert_array_equal(tensors["layers.1.k"], prefill.layers[1].k.astype(np.float16))
    assert tensors["layers.1.window_lse"].dtype == np.float32


def test_given_rows_are_named(tmp_path: pathlib.Path, model: small_model.SmallModel,
                              prefill: small_model.Prefill) -> None:
    chosen = model.prefill(prefill.input_ids, row_positions=[4, 9, 49])
    capture.write_capture(tmp_path / "c.safetensors", chosen, model.fingerprint())
    _, tensors = read(tmp_path / "c.safetensors")
    np.testing.assert_array_equal(tensors["row_positions"], [4, 9, 49])


def test_window_of_the_whole_prompt_has_no_logprobs(tmp_path: pathlib.Path,
                                                    model: small_model.SmallModel,
                                                    prefill: small_model.Prefill) -> None:
    whole = model.prefill(prefill.input_ids, window=64)
    capture.write_capture(tmp_path / "c.safetensors", whole, model.fingerprint())
    document, tensors = read(tmp_path / "c.safetensors")
    assert document["window"] == 50
    assert "window_logprobs" not in tensors


def test_refused_capture_leaves_no_file(tmp_path: pathlib.Path, model: small_model.SmallModel,
                                        prefill: small_model.Prefill) -> None:
    with pytest.raises(ValueError, match="span system"):
        capture.write_capture(tmp_path / "c.safetensors", prefill, model.fingerprint(),
                              spans=[("system", 0, 51)])
    assert not list(tmp_path.iterdir())


def test_write_capture_command_writes_a_readable_prompt(tmp_path: pathlib.Path, capsys):
    path = tmp_path / "prompt.safetensors"
    write_capture.main(["--out", str(path), "--seq-len", "300", "--facts", "8"])
    document, tensors = read(path)
    assert document["seq_len"] == 302 and document["spans"][0]["name"] == "answer"
    assert tensors["layers.1.k"].shape == (2, 302, 32)
    assert "the prompt ends in 'ask" in capsys.readouterr().out
