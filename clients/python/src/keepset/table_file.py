"""Writes keepset.table files (kind compilerkv). Reading and validating is the server's and `keepset
tables validate`'s."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import tempfile

import numpy as np
import safetensors.numpy

from keepset.types import ModelFingerprint

DEFAULT_ENTROPY_BINS = 20
DEFAULT_PPL_BINS = 4


def uniform_table(
    model: ModelFingerprint,
    *,
    name: str,
    version: str,
    head_weight: float = 1.0,
    gate: float = 0.8,
    seq_len: int = 2048,
) -> bytes:
    """The bytes of a neutral table: every head weight and every gate the same, for any budget.

    It learned nothing and says so: provenance source "uniform". `seq_len` only places the bin edges:
    entropies of 0..ln(seq_len) in equal steps, perplexities by powers of four.
    """
    shape_gate = (model.num_layers, DEFAULT_ENTROPY_BINS, DEFAULT_PPL_BINS)
    tensors: dict[str, np.ndarray] = {
        "head_weights": np.full((model.num_layers, model.num_qo_heads), head_weight, np.float32),
        "gate_thresholds": np.full(shape_gate, gate, np.float32),
        "entropy_edges": np.array(
            np.linspace(0, np.log(seq_len), DEFAULT_ENTROPY_BINS + 1)[1:-1], np.float32
        ),
        "ppl_edges": np.array([4, 16, 64], np.float32),
    }
    document = {
        "format": "keepset.table",
        "format_version": 1,
        "kind": "compilerkv",
        "name": name,
        "version": version,
        "model": model.to_json(),
        "algorithm": {"name": "uniform", "head_weight": head_weight, "gate": gate},
        "provenance": {
            "source": "uniform",
            "tool_version": "0.1.0",
            "created": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        },
    }
    return safetensors.numpy.save(tensors, metadata={"keepset": json.dumps(document)})


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Temporary name, sync, rename: a watcher sees the old file or the new one."""
    path = pathlib.Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
