"""The check of the Python exporter that runs on a card, over a driver of host memory."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "clients" / "python" / "src"


@pytest.fixture(scope="module")
def library() -> str:
    build = os.environ.get("KEEPSET_BUILD")
    if not build:
        pytest.skip("KEEPSET_BUILD is not set: run `make test`")
    return str(pathlib.Path(build) / "tests" / "service" / "memory" / "libfake_libcuda.so")


def run_check(package: pathlib.Path, library: str, *options: str) -> tuple[int, dict[str, dict]]:
    done = subprocess.run(
        [sys.executable, *options, ROOT / "tests" / "gpu" / "exporter_check.py", package],
        env=os.environ | {"KEEPSET_LIBCUDA": library}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, {line["check"]: line for line in lines}


def test_every_check_passes_without_numpy_and_grpc(library: str) -> None:
    code, checks = run_check(PACKAGE, library, "-S")
    assert [line for line in checks.values() if "passed" in line and not line["passed"]] == []
    assert code == 0
    assert [name for name, line in checks.items() if "skipped" in line] == [
        "memory_of_a_pool_is_refused"
    ]
    assert len(checks) == 10


@pytest.mark.parametrize(
    ("right", "wrong", "found_by"),
    [
        ("self.pointer - base.value, size.value", "0, size.value", "plain_memory_is_shared_by_handle"),
        ("self.size_bytes > left", "False", "region_over_two_segments_is_refused"),
        ("& _POSIX_FD:", "| _POSIX_FD:", "segment_without_a_handle_is_refused"),
    ],
)
def test_an_exporter_that_is_wrong_is_found(
    tmp_path: pathlib.Path, library: str, right: str, wrong: str, found_by: str
) -> None:
    package = tmp_path / "keepset"
    package.mkdir()
    for name in ("errors.py", "device_memory.py"):
        text = (PACKAGE / "keepset" / name).read_text()
        (package / name).write_text(text.replace(right, wrong))
    code, checks = run_check(tmp_path, library)
    assert code == 1
    assert not checks[found_by]["passed"]


def test_a_machine_without_a_driver_is_told_apart() -> None:
    assert run_check(PACKAGE, "libcuda-that-is-not-there.so") == (3, {})
