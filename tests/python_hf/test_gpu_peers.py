"""The peers of the GPU benchmark compute what they are compared with."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from keepset.calibrate.__main__ import Build
from keepset.in_process import Engine
from keepset.types import Layer, ModelFingerprint

SCRIPT = pathlib.Path(__file__).parents[1] / "gpu" / "peers.py"


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers"] = module  # where its dataclass looks for its own module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["peers"]


def numbers(seed: int, *sizes: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(sizes).astype(np.float32)


@pytest.mark.parametrize("peer", ["repeat_kv", "grouped"])
@pytest.mark.parametrize(
    ("seq_len", "qo_heads", "kv_heads", "rows", "budget"),
    [(97, 4, 2, 8, 40), (301, 6, 2, 16, 17), (64, 4, 4, 1, 63), (513, 8, 1, 32, 256)],
)
def test_positions_are_those_of_snapkv(
    build: Build, peers: ModuleType, peer: str, seq_len: int, qo_heads: int, kv_heads: int,
    rows: int, budget: int,
) -> None:  # fmt: skip
    head_dim = 16
    shape = peers.Shape(1, qo_heads, kv_heads, head_dim, rows, budget)
    q = numbers(seq_len, qo_heads, rows, head_dim)
    k, v = (numbers(seq_len + i, kv_heads, seq_len, head_dim) for i in (1, 2))
    model = ModelFingerprint("test", 1, qo_heads, kv_heads, head_dim)
    with Engine(build.library) as engine:
        ours = engine.keep(
            model=model, policy="snapkv", layers={0: Layer(q_window=q, k=k, v=v)},
            seq_len=seq_len, budget_tokens=budget, softmax_scale=head_dim**-0.5,
            row_positions=range(seq_len - rows, seq_len), scope="kv_head",
        )  # fmt: skip
    positions, kept_k, kept_v = getattr(peers, peer)(
        torch, shape, *(torch.from_numpy(one) for one in (q, k, v))
    )
    assert len(ours.keep_indices[0]) == kv_heads
    for head in range(kv_heads):
        np.testing.assert_array_equal(np.sort(positions[head]), ours.keep_indices[0][head])
        np.testing.assert_array_equal(kept_k[head], k[head, positions[head]])
        np.testing.assert_array_equal(kept_v[head], v[head, positions[head]])


def test_runs_to_its_end_without_a_device() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--cpu"], capture_output=True, text=True, timeout=300, check=True
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [line for line in lines if "error" in line]
    timed = [(line["peer"], line["seq_len"]) for line in lines if "ms" in line]
    peers = ("repeat_kv", "grouped", "grouped_compiled")
    assert timed == [(peer, seq_len) for seq_len in (97, 130) for peer in peers]
    assert min(line["overlap"] for line in lines if "overlap" in line) > 0.9
    assert [line["rows"] for line in lines if line["peer"] == "torch.topk"] == [4, 16]
