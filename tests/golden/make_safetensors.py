"""Writes the golden files that come from the public safetensors library.

Usage: make_safetensors.py DIRECTORY (needs the packages numpy and safetensors). The files are committed, so
that the reader is tested against bytes it did not write; run this only to change them.
"""

import json
import pathlib
import sys

import numpy as np
from safetensors.numpy import save_file

MODEL = {
    "architecture": "llama",
    "num_layers": 2,
    "num_qo_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "rope": {"theta": 10000.0},
}


def write_table(path: pathlib.Path) -> None:
    document = {
        "format": "keepset.table",
        "format_version": 1,
        "name": "public-library",
        "version": "1",
        "model": MODEL,
        "provenance": {"source": "hand-written"},
        "default_budget": 32,
    }
    heads = np.linspace(0.8, 1.5, 2 * 2 * 4, dtype=np.float32).reshape(2, 2, 4)
    gates = np.linspace(0.8, 1.0, 2 * 2 * 3 * 1, dtype=np.float32).reshape(2, 2, 3, 1)
    tensors = {
        "head_weights": heads,
        "gate_thresholds": gates,
        "entropy_edges": np.array([2.0, 4.0], dtype=np.float32),
        "ppl_edges": np.zeros(0, dtype=np.float32),
        "budgets": np.array([64, 32], dtype=np.int64),
    }
    save_file(tensors, path, metadata={"keepset": json.dumps(document)})


def write_observation_heads(path: pathlib.Path) -> None:
    document = {
        "format": "keepset.table",
        "kind": "observation_heads",
        "format_version": 1,
        "name": "public-library-heads",
        "version": "1",
        "model": MODEL,
        "provenance": {"source": "hand-written"},
        "observation_heads": {},
    }
    tensors = {
        "heads": np.array([[1, 2], [0, 1]], dtype=np.int32),
        "weights": np.array([2.0, 0.5], dtype=np.float32),
        "rows": np.array([2, 5], dtype=np.int32),
    }
    save_file(tensors, path, metadata={"keepset": json.dumps(document)})


def write_observations(path: pathlib.Path) -> None:
    document = {
        "format": "keepset.observations",
        "format_version": 1,
        "model": MODEL,
        "prompt_id": "p-1",
        "task": "p",
        "seq_len": 4,
        "protected": [[0, 1]],
        "probe": {"name": "recall", "text": "What was said?"},
    }
    tensors = {
        "heads": np.array([[1, 2], [0, 1]], dtype=np.int32),
        "rows": np.array([2, 5], dtype=np.int32),
        "scores": np.array([[0, 0.25, 0.5, 0.25], [-1, 1, 0.5, -0.5]], dtype=np.float16),
        "need": np.array([0, 0, 2, 1], dtype=np.float32),
    }
    save_file(tensors, path, metadata={"keepset": json.dumps(document)})


def write_capture(path: pathlib.Path) -> None:
    seq_len, window = 6, 2
    document = {
        "format": "keepset.capture",
        "model": MODEL,
        "seq_len": seq_len,
        "window": window,
        "num_layers": 2,
        "num_qo_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "softmax_scale": 0.5,
        "spans": [{"name": "système", "begin": 1, "end": 3}],
    }
    random = np.random.default_rng(7)
    tensors = {
        "input_ids": np.arange(seq_len, dtype=np.int32),
        "window_logprobs": np.array([-0.5, -1.5], dtype=np.float32),
        "row_positions": np.array([2, 5], dtype=np.int64),
    }
    for layer in range(2):
        for name, shape, dtype in (
            ("q_window", (4, window, 4), np.float32),
            ("k", (2, seq_len, 4), np.float16),
            ("v", (2, seq_len, 4), np.float16),
        ):
            tensors[f"layers.{layer}.{name}"] = random.standard_normal(shape).astype(dtype)
    tensors["layers.1.k"][0, 0] = [0.0, 0.5, 1.0, -2.0]
    save_file(tensors, path, metadata={"keepset": json.dumps(document, ensure_ascii=False)})


def main() -> None:
    directory = pathlib.Path(sys.argv[1])
    write_table(directory / "public_library_table.safetensors")
    write_observation_heads(directory / "public_library_observation_heads.safetensors")
    write_observations(directory / "public_library_observations.safetensors")
    write_capture(directory / "public_library_capture.safetensors")


if __name__ == "__main__":
    main()
