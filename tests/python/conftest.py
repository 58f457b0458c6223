"""A running keepsetd for tests that talk to one; KEEPSET_BUILD names the build directory."""

import os
import pathlib
import time

import numpy as np
import pytest

import keepset
from keepset import table_file
from keepset.server_process import ServerProcess

MODEL = keepset.ModelFingerprint("tiny", 3, 4, 2, 8, {"theta": 10000.0}, "r1")
SEQ_LEN = 96
WINDOW = 8


def binary() -> pathlib.Path:
    build = os.environ.get("KEEPSET_BUILD")
    if not build:
        pytest.skip("KEEPSET_BUILD is not set: run `make test`")
    return pathlib.Path(build) / "service" / "keepsetd"


def publish(server: ServerProcess, version: str, gate: float = 0.8, name: str = "tiny") -> None:
    data = table_file.uniform_table(MODEL, name=name, version=version, gate=gate, seq_len=SEQ_LEN)
    table_file.write_atomically(server.tables / f"{name}.safetensors", data)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    tables = tmp_path_factory.mktemp("tables")
    data = table_file.uniform_table(MODEL, name="tiny", version="1", seq_len=SEQ_LEN)
    table_file.write_atomically(tables / "tiny.safetensors", data)
    with ServerProcess(binary(), tables=tables) as running:
        yield running


@pytest.fixture(params=["memfd", "inline"])
def client(request, server):
    with keepset.Client.connect(server.address, transport=request.param) as connected:
        yield connected


def random_layers(seed: int = 0, dtype=np.float32) -> list[keepset.Layer]:
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    return [
        keepset.Layer(
            q_window=draw(MODEL.num_qo_heads, WINDOW, MODEL.head_dim),
            k=draw(MODEL.num_kv_heads, SEQ_LEN, MODEL.head_dim),
            v=draw(MODEL.num_kv_heads, SEQ_LEN, MODEL.head_dim),
        )
        for _ in range(MODEL.num_layers)
    ]


def spec(**changes) -> dict:
    """Keywords of a plain operation."""
    base = {
        "model": MODEL,
        "seq_len": SEQ_LEN,
        "softmax_scale": MODEL.head_dim**-0.5,
        "policy": "snapkv",
        "budget": keepset.Budget.tokens(24),
        "ppl": 10.0,
    }
    return {**base, **changes}


@pytest.fixture(scope="module")
def build():
    """The build folder's programs and library."""
    from keepset.calibrate.__main__ import Build

    return Build(binary().parent.parent)


@pytest.fixture(scope="module")
def engine(build):
    from keepset.in_process import Engine

    with Engine(build.library) as opened:
        yield opened


@pytest.fixture(scope="module")
def small():
    """The shipped small model with its tasks."""
    from keepset.calibrate.small_head_tasks import SmallModelTasks
    from keepset.eval.small_model import SmallModel

    return SmallModelTasks(SmallModel.load())


def sets_of(result: keepset.Result) -> list[list[int]]:
    return [one.indices.tolist() for layer in result.layers for one in layer.sets]


def poll(condition, timeout_seconds: float = 10.0):
    """Returns the first true value of condition()."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    pytest.fail(f"condition not reached in {timeout_seconds} s")
