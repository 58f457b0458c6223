"""`make evidence-registry` in a run of seconds: the benchmarks run and the page is written from what they print."""

import pathlib
import subprocess
import sys

from conftest import binary

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_registry_benchmarks_write_their_page(tmp_path):
    out = tmp_path / "registry.md"
    command = [sys.executable, ROOT / "tests/bench/registry_report.py", "--quick", "--out", out,
               "--build", pathlib.Path(binary()).parents[1]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = out.read_text()
    for source in ("directory", "etcd"):
        assert f"| {source} | 6 + 2 | 0 | 0 |" in page
    assert "Failed or mixed in all: 0." in page
    assert page.count("| 10 (5 active) |") == 4
