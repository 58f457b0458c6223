"""Writes the capture and the table of the command-line golden tests, and what every policy must answer.

Usage: make_cli_capture.py DIRECTORY (needs the packages numpy and safetensors). The files come from the
public safetensors library; the expected keep sets are computed here in plain fp64, apart from the engine. The
files are committed; run this only to change them.
"""

import json
import math
import pathlib
import sys

import numpy as np
from safetensors.numpy import save_file

LAYERS, HEADS, KV_HEADS, DIM, SEQ_LEN, WINDOW, BUDGET = 3, 4, 2, 8, 40, 6, 12
GROUP = HEADS // KV_HEADS
SCALE = 1.0 / math.sqrt(DIM)
PPL = 12.7
MODEL = {
    "architecture": "llama",
    "num_layers": LAYERS,
    "num_qo_heads": HEADS,
    "num_kv_heads": KV_HEADS,
    "head_dim": DIM,
    "rope": {"theta": 10000.0},
    "revision": "golden",
}


def make_tensors():
    random = np.random.default_rng(11)
    tensors = {"input_ids": np.arange(SEQ_LEN, dtype=np.int64)}
    for layer in range(LAYERS):
        for name, shape in (("q_window", (HEADS, WINDOW, DIM)), ("k", (KV_HEADS, SEQ_LEN, DIM)),
                            ("v", (KV_HEADS, SEQ_LEN, DIM))):
            tensors[f"layers.{layer}.{name}"] = random.standard_normal(shape).astype(np.float16)
    return tensors


def attention(tensors, layer):
    """[H, W, T] softmax over what each row may see."""
    q = tensors[f"layers.{layer}.q_window"].astype(np.float64)
    k = np.repeat(tensors[f"layers.{layer}.k"].astype(np.float64), GROUP, axis=0)
    logits = np.einsum("hwd,htd->hwt", q, k) * SCALE
    for row in range(WINDOW):
        logits[:, row, SEQ_LEN - WINDOW + row + 1:] = -np.inf
    logits -= logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits)
    return weights / weights.sum(axis=-1, keepdims=True)


def top(scores, count):
    """Ascending positions of the highest scores; the lower position wins a tie."""
    order = sorted(range(len(scores)), key=lambda t: (-scores[t], t))
    return sorted(order[:count])


def snapkv(tensors, kernel=5):
    layers = []
    for layer in range(LAYERS):
        mean = attention(tensors, layer).mean(axis=1)[:, :SEQ_LEN - WINDOW]
        padded = np.pad(mean, ((0, 0), (kernel // 2, kernel // 2)))
        pooled = sum(padded[:, i:i + mean.shape[1]] for i in range(kernel)) / kernel
        merged = pooled.reshape(KV_HEADS, GROUP, -1).mean(axis=1)
        window = list(range(SEQ_LEN - WINDOW, SEQ_LEN))
        layers.append([top(head, BUDGET - WINDOW) + window for head in merged])
    return layers


def tova(tensors):
    layers = []
    for layer in range(LAYERS):
        scores = attention(tensors, layer)[:, -1, :].mean(axis=0)
        layers.append([top(scores[:-1], BUDGET - 1) + [SEQ_LEN - 1]])
    return layers


def knorm(tensors):
    norms = [np.linalg.norm(tensors[f"layers.{layer}.k"].astype(np.float64), axis=-1)
             for layer in range(LAYERS)]
    return [[top(-head, BUDGET) for head in layer] for layer in norms]


def streaming_llm(_):
    kept = list(range(4)) + list(range(SEQ_LEN - (BUDGET - 4), SEQ_LEN))
    return [[kept]] * LAYERS


def make_table():
    random = np.random.default_rng(12)
    return {
        "head_weights": random.uniform(0.8, 1.5, (LAYERS, HEADS)).astype(np.float32),
        "gate_thresholds": random.uniform(0.81, 0.99, (LAYERS, 3, 2)).astype(np.float32),
        "entropy_edges": np.array([3.0, 3.6], dtype=np.float32),
        "ppl_edges": np.array([10.0], dtype=np.float32),
    }


def compilerkv(tensors):
    table = make_table()
    alpha = sum(attention(tensors, layer).mean(axis=0).sum(axis=0) for layer in range(LAYERS))
    alpha *= SEQ_LEN / WINDOW / LAYERS
    share = alpha / alpha.sum()
    entropy = -(share * np.log(np.maximum(share, 1e-8))).sum()
    entropy_bin = int((table["entropy_edges"] <= np.float32(entropy)).sum())
    ppl_bin = int((table["ppl_edges"] <= np.float32(PPL)).sum())
    layers = []
    for layer in range(LAYERS):
        norms = np.linalg.norm(tensors[f"layers.{layer}.v"].astype(np.float64), axis=-1)
        rho = np.repeat(norms / norms.mean(axis=-1, keepdims=True), GROUP, axis=0)
        weights = table["head_weights"][layer].astype(np.float64)[:, None]
        scores = (weights * alpha * rho).max(axis=0)
        gate = float(table["gate_thresholds"][layer, entropy_bin, ppl_bin])
        layers.append([top(scores, min(BUDGET, int((scores >= gate).sum())))])
    return layers


def main() -> None:
    directory = pathlib.Path(sys.argv[1])
    tensors = make_tensors()
    document = {
        "format": "keepset.capture",
        "format_version": 1,
        "model": MODEL,
        "seq_len": SEQ_LEN,
        "window": WINDOW,
        "num_layers": LAYERS,
        "num_qo_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": DIM,
        "softmax_scale": SCALE,
        "spans": [{"name": "system", "begin": 3, "end": 6}],
    }
    save_file(tensors, directory / "cli_capture.safetensors",
              metadata={"keepset": json.dumps(document)})
    save_file(make_table(), directory / "cli_table.safetensors", metadata={"keepset": json.dumps({
        "format": "keepset.table",
        "format_version": 1,
        "kind": "compilerkv",
        "name": "golden-cli",
        "version": "1",
        "model": MODEL,
        "provenance": {"source": "hand-written"},
    })})
    policies = {policy.__name__: policy(tensors)
                for policy in (snapkv, tova, knorm, streaming_llm, compilerkv)}
    expected = {"budget": BUDGET, "ppl": PPL, "policies": policies}
    (directory / "cli_capture_expected.json").write_text(json.dumps(expected) + "\n",
                                                          encoding="utf-8")


if __name__ == "__main__":
    main()
