"""The README's "By hand" section, run as it stands but for directory, port and interpreter."""

import contextlib
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from conftest import binary

ROOT = pathlib.Path(__file__).resolve().parents[2]


def by_hand(directory: pathlib.Path) -> list[str]:
    """The section's shell blocks: the server's, then the client's."""
    section = re.search(r"^## By hand$(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)
    assert section
    replaced = section[1].replace("/tmp/keepset", str(directory))
    replaced = replaced.replace("build/release", str(binary().parents[1]))
    replaced = replaced.replace("$PWD/", "").replace(".venv/bin/python", sys.executable)
    return re.findall(r"^```sh\n(.*?)^```$", replaced, re.M | re.S)


@contextlib.contextmanager
def serving(block: str) -> Iterator[str]:
    """The server's block at work; gives the address of its metrics page, on a port that is free."""
    prepare, command = block.strip().rsplit("\n", 1)
    subprocess.run(prepare, shell=True, check=True, timeout=60)
    server = subprocess.Popen([*command.split(), "--metrics-listen", "127.0.0.1:0"],
                              stderr=subprocess.PIPE, text=True)
    try:
        for line in server.stderr:
            if found := re.search(r"ready.* metrics=(\S+)", line):
                yield found[1]
                return
        pytest.fail("the server ended before it was ready")
    finally:
        server.terminate()
        server.communicate(timeout=60)


def test_commands_by_hand_work_as_one_paste(tmp_path):
    server_block, client_block = by_hand(tmp_path)
    with serving(server_block) as metrics:
        run = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", client_block.replace("127.0.0.1:9464", metrics)],
            capture_output=True, text=True, timeout=120, env=os.environ)
    assert run.returncode == 0, run.stdout + run.stderr
    assert 'reason="none"} 2' in run.stdout  # two operations by the server
    assert {"a.safetensors", "b.safetensors", "c.safetensors"} <= {p.name for p in tmp_path.iterdir()}
