"""Writes keepset.table files (kind compilerkv) and reads those we wrote. Validating is the server's and
`keepset tables validate`'s."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
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
    return compilerkv_table(
        model,
        name=name,
        version=version,
        head_weights=np.full((model.num_layers, model.num_qo_heads), head_weight),
        gate_thresholds=np.full((model.num_layers, DEFAULT_ENTROPY_BINS, DEFAULT_PPL_BINS), gate),
        entropy_edges=np.linspace(0, np.log(seq_len), DEFAULT_ENTROPY_BINS + 1)[1:-1],
        ppl_edges=np.array([4, 16, 64]),
        algorithm={"name": "uniform", "head_weight": head_weight, "gate": gate},
        source="uniform",
    )


def compilerkv_table(
    model: ModelFingerprint,
    *,
    name: str,
    version: str,
    head_weights: npt.ArrayLike,
    gate_thresholds: npt.ArrayLike,
    entropy_edges: npt.ArrayLike,
    ppl_edges: npt.ArrayLike,
    algorithm: Mapping[str, object],
    source: str,
    budgets: Sequence[int] | None = None,
    provenance: Mapping[str, object] | None = None,
    grid: Mapping[str, Sequence[float]] | None = None,
) -> bytes:
    """The bytes of a table.

    head_weights [L, H] and gate_thresholds [L, E, P] of a table for any budget, or with a leading axis
    of `budgets`. entropy_edges [E - 1], ppl_edges [P - 1]. `source` says where the numbers come from
    ("offline-calibration", "hand-written" ...); `provenance` adds to it. `grid` declares other ranges of
    values than 0.8..1.5 and 0.8..1.0: {"head": [low, high], "gate": [low, high]}.
    """
    tensors: dict[str, np.ndarray] = {
        "head_weights": np.array(head_weights, np.float32),
        "gate_thresholds": np.array(gate_thresholds, np.float32),
        "entropy_edges": np.array(entropy_edges, np.float32),
        "ppl_edges": np.array(ppl_edges, np.float32),
    }
    if budgets is not None:
        tensors["budgets"] = np.array(budgets, np.int64)
    document = {
        "format": "keepset.table",
        "format_version": 1,
        "kind": "compilerkv",
        "name": name,
        "version": version,
        "model": model.to_json(),
        "algorithm": dict(algorithm),
        "provenance": {
            "source": source,
            "tool_version": "0.1.0",
            "created": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            **(provenance or {}),
        },
    }
    if grid is not None:
        document["grid"] = {name: list(ends) for name, ends in grid.items()}
    return safetensors.numpy.save(tensors, metadata={"keepset": json.dumps(document)})


@dataclasses.dataclass(frozen=True)
class TableContent:
    """Tensors and JSON document of a table file; `budgets` is None for a table of any budget."""

    head_weights: np.ndarray
    gate_thresholds: np.ndarray
    entropy_edges: np.ndarray
    ppl_edges: np.ndarray
    budgets: list[int] | None
    document: dict

    @property
    def num_budgets(self) -> int:
        return 1 if self.budgets is None else len(self.budgets)


def read_table(data: bytes) -> TableContent:
    """Reads a table that one of our tools wrote; validating is the server's business."""
    tensors = safetensors.numpy.load(data)
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    budgets = tensors.get("budgets")
    return TableContent(
        tensors["head_weights"],
        tensors["gate_thresholds"],
        tensors["entropy_edges"],
        tensors["ppl_edges"],
        None if budgets is None else budgets.tolist(),
        json.loads(metadata["keepset"]),
    )


def digest(data: bytes) -> str:
    """The digest by which replies name a table."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


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
