"""Tests of the extras `hf` and `ray`: `make test-hf`. KEEPSET_BUILD names the build directory."""

import os
import pathlib
import tempfile

import pytest
import torch

from keepset.calibrate.__main__ import Build
from keepset.eval import export_llama

# The models are so small that threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def ray_folder():
    """Sockets and logs of local Ray instances; a short path, for the sockets."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        yield
        del os.environ["RAY_TMPDIR"]


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> pathlib.Path:
    """The shipped small model as a Llama directory."""
    directory = tmp_path_factory.mktemp("small-llama")
    export_llama.main(["--out", str(directory)])
    return directory


@pytest.fixture(scope="session")
def build() -> Build:
    root = os.environ.get("KEEPSET_BUILD")
    if not root:
        pytest.skip("KEEPSET_BUILD is not set: run `make test-hf`")
    return Build(pathlib.Path(root))
