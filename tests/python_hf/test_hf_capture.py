"""From a Hugging Face model to a capture, through `keepset compress`, and back into its cache."""

import json
import subprocess

import numpy as np
import pytest
from families import FAMILIES, SHAPE, model_of
from safetensors import safe_open

from keepset.eval.capture import write_capture

SEQ_LEN = 80
BUDGET = 20


@pytest.fixture(params=FAMILIES)
def model(request):
    return model_of(request.param, "sdpa")


def compress(build, capture, out, *arguments) -> tuple[dict, list]:
    """The result's document and its keep sets, per layer or per layer and KV head."""
    subprocess.run([str(build.keepset), "compress", str(capture), "--budget", str(BUDGET), "--out",
                    str(out), *arguments], check=True, capture_output=True)
    with safe_open(out, "np") as file:
        document = json.loads(file.metadata()["keepset"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    keeps = []
    for layer in range(len(document["layers"])):
        name = f"layers.{layer}.keep_indices"
        keeps.append(tensors[name] if name in tensors else [tensors[f"{name}.{g}"] for g in range(2)])
    return document, keeps


@pytest.mark.parametrize(("policy", "per_head"), [("snapkv", True), ("tova", False)])
def test_a_decision_of_the_engine_is_applied(build, model, tmp_path, policy, per_head):
    ids = np.random.default_rng(0).integers(1, SHAPE["vocab_size"], SEQ_LEN)
    prefill = model.prefill(ids, 8)
    capture = tmp_path / "capture.safetensors"
    write_capture(capture, prefill, model.fingerprint())
    document, keeps = compress(build, capture, tmp_path / "r.safetensors", "--policy", policy)
    assert document["outcome"] == "compressed"
    assert isinstance(keeps[0], list) == per_head
    cache = prefill.compact(keeps)
    for index in model.full_layers:
        assert cache.num_tokens()[index] == [BUDGET, BUDGET]
    assert len(model.decode(cache, [5], SEQ_LEN, 4)) == 4
    # What was kept are the positions that the engine named, with the prompt's own keys.
    for index, keep in zip(model.full_layers, keeps):
        heads = keep if per_head else [keep, keep]
        for head, positions in enumerate(heads):
            found = cache.layers[index].keys[0, head]
            assert np.array_equal(found, prefill.cache.layers[index].keys[0, head, positions])


def test_the_capture_states_the_softmax_scale_of_the_model(tmp_path):
    model = model_of("gemma3", "eager")
    path = tmp_path / "capture.safetensors"
    write_capture(path, model.prefill(np.arange(1, 40), 8), model.fingerprint())
    with safe_open(path, "np") as file:
        document = json.loads(file.metadata()["keepset"])
    assert document["softmax_scale"] == pytest.approx(20**-0.5)
    assert (document["num_layers"], document["head_dim"]) == (2, 16)
