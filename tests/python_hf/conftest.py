"""Tests of the extras `hf` and `ray`: `make test-hf`. KEEPSET_BUILD names the build directory."""

import os
import pathlib

import pytest

from keepset.calibrate.__main__ import Build


@pytest.fixture(scope="session")
def build() -> Build:
    root = os.environ.get("KEEPSET_BUILD")
    if not root:
        pytest.skip("KEEPSET_BUILD is not set: run `make test-hf`")
    return Build(pathlib.Path(root))
