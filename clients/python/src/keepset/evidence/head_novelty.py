"""The table that observes by key novelty of a few KV heads alone: of a worker it needs their keys, nothing else."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import safetensors.numpy

from keepset import table_file
from keepset.calibrate.__main__ import Build
from keepset.calibrate.head_prompts import KEY_NOVELTY
from keepset.calibrate.observation_heads import Say, fit_heads

_POOL_KERNEL = 5


def fit_novelty(build: Build, records: Sequence[pathlib.Path], folder: pathlib.Path, name: str, number: int,
                budgets: Sequence[int], say: Say) -> tuple[bytes, dict]:
    """The bytes of a table of `number` KV heads chosen by recall on observation records, pooled over 5 positions, not
    dilated, and what the report says of it. What it is made of stays in `folder`; what was made of the same records
    before stands."""
    folder.mkdir(parents=True, exist_ok=True)
    alone = [_key_novelty_alone(path, folder / path.name) for path in records]
    table, report = fit_heads(
        build, alone, folder / f"{name}.table.safetensors", name=name, version="1", budgets=budgets,
        max_heads=number, num_heads=number, pool_kernel=_POOL_KERNEL, dilate=0, folds=2, say=say)
    return table, {"heads": [[one["layer"], one["head"], one["weight"]] for one in report["observations"]],
                   "held_out_recall": report["held_out_recall"]}


def _key_novelty_alone(record: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """The record without any other observation; written again when the record is newer."""
    if out.exists() and out.stat().st_mtime_ns >= record.stat().st_mtime_ns:
        return out
    data = record.read_bytes()
    size = int.from_bytes(data[:8], "little")
    document = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["keepset"])
    document.pop("probe", None)
    tensors = safetensors.numpy.load(data)
    novelty = tensors["rows"] == KEY_NOVELTY
    tensors |= {one: tensors[one][novelty] for one in ("heads", "rows", "scores")}
    table_file.write_atomically(out, safetensors.numpy.save(tensors, metadata={"keepset": json.dumps(document)}))
    return out
