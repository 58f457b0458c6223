"""The demo, small: every section appears and no request of the swap under load fails."""

import re
import subprocess
import sys

import pytest
from conftest import binary

from keepset import table_file
from keepset.demo.__main__ import COMPILED_TABLE
from keepset.eval.small_model import SmallModel


@pytest.fixture(scope="module")
def output() -> str:
    run = subprocess.run(
        [sys.executable, "-m", "keepset.demo", "--keepsetd", str(binary()),
         "--seq-len", "700", "--facts", "12", "--questions", "4"],
        capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr
    return run.stdout


def rows(output: str) -> dict[tuple[str, str], list[str]]:
    """Rows of the quality table by policy and budget."""
    pattern = re.compile(r"^ *(\w+) +(all|\d+) +([\d.]+) +([\d.]+) +(\d+) KiB +(\d+) KiB", re.M)
    return {(m[0], m[1]): list(m[2:]) for m in pattern.findall(output)}


def test_full_cache_answers_everything(output):
    inside, later, before, after = rows(output)[("full", "all")]
    assert (float(inside), float(later)) == (1.0, 1.0)
    assert before == after


def test_every_policy_saves_bytes_at_every_budget(output):
    table = rows(output)
    policies = {policy for policy, _ in table} - {"full"}
    assert policies == {"streaming_llm", "random", "knorm", "tova", "snapkv", "compilerkv",
                        "uniform"}
    for (policy, _), (_, _, before, after) in table.items():
        assert policy == "full" or int(after) < int(before)


def test_compiled_table_decides_and_is_named(output):
    found = table_file.read_table(COMPILED_TABLE.read_bytes())
    assert found.document["provenance"]["source"] == "offline-calibration"
    assert found.document["model"]["revision"] == SmallModel.load().fingerprint()["revision"]
    digest = table_file.digest(COMPILED_TABLE.read_bytes())
    assert "table small-model version 1, offline-calibration" in output
    assert output.count(digest) == 2  # above the quality table, and in the explained reply


def test_what_the_table_gains_is_said_in_words(output):
    assert re.search(r"The compiled table against the uniform one, .*inside [+-]\d", output)


def test_swap_under_load_fails_nothing_and_the_next_reply_shows_it(output):
    assert re.search(r"'1': \d+, '2': \d+\} replies by version, 0 failed", output)
    assert "the next reply: version 2, tau 0.90" in output


def test_metrics_show_the_work(output):
    assert re.search(r"keepset_compress_operations_total\{.*compressed.*\} [1-9]", output)
    assert 'version="2"' in output
