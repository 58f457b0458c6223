"""Measures the table registry and writes docs/results/registry.md: `make evidence-registry`, on a machine with nothing
else to do. Runs registry_swap_bench (operations while the active table changes) and registry_bench (start of 100 models
of 5 versions); --quick is a run of seconds whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

Row = dict[str, Any]

SWAP_QUICK = ("--streams=4", "--swaps=8", "--operations-per-swap=8", "--quiet-operations=64")
START_QUICK = ("5", "2")
STARTS = {
    "directory": "tables directory, no state directory: every table a copy in memory",
    "directory_first": "tables directory, empty state directory: copied there, mapped",
    "directory_again": "tables directory, state directory of an earlier start: mapped",
    "recover": "state directory alone, before any source answers",
}


def json_lines(*command: str | pathlib.Path) -> list[Row]:
    """What a benchmark prints; its complaint and exit status end this program."""
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{command[0]}: exit status {done.returncode}\n{done.stdout}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def processor() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def machine() -> str:
    system = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    return (f"{os.cpu_count()} cores, {processor()}, {system}, preset release. Load average at the start: "
            f"{os.getloadavg()[0]:.2f}.")


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def swap_row(row: Row) -> list[str]:
    quiet, swapping = row["quiet"], row["swapping"]
    return [row["source"], f"{row['activations']} + {row['rollbacks']}", str(row["failed"]), str(row["mixed"]),
            f"{quiet['operations']} + {swapping['operations']}", f"{quiet['p50_ms']:.2f} / {quiet['p99_ms']:.2f}",
            f"{swapping['p50_ms']:.2f} / {swapping['p99_ms']:.2f}", f"{row['p99_swapping_over_quiet']:.3f}",
            f"{row['swap_p50_ms']:.2f} / {row['swap_p99_ms']:.2f}"]


def start_row(row: Row) -> list[str]:
    mebi = 1 << 20
    return [STARTS[row["start"]], f"{row['loaded']} ({row['active']} active)", f"{row['table_bytes'] / mebi:.0f} MiB",
            f"{row['seconds']:.2f}", f"{row['resident_anonymous_bytes'] / mebi:.0f} MiB",
            f"{row['resident_file_bytes'] / mebi:.0f} MiB"]


def page(swaps: list[Row], starts: list[Row], where: str, command: str) -> str:
    ratios = {source: sorted(row["p99_swapping_over_quiet"] for row in swaps if row["source"] == source)
              for source in dict.fromkeys(row["source"] for row in swaps)}
    medians = ", ".join(f"{source} {values[len(values) // 2]:.3f}" for source, values in ratios.items())
    failed = sum(row["failed"] + row["mixed"] for row in swaps)
    lines = [
        "# Table registry", "",
        f"Written by `{command}`. Timings are benchmarks, never test assertions.", "",
        f"Machine: {where}", "",
        "## Operations while the active table changes", "",
        f"{swaps[0]['streams']} streams compress one prompt of a `keepsetd` process, one client activates versions and rolls",
        "back (every fourth change). Each answer is held against what its table alone would have kept: `failed` are calls",
        "without an answer, `mixed` answers of no single table. Quiet operations run before and after, in the same process.",
        "Each row is one run; times in milliseconds, p50 / p99.", "",
        *table(["source", "activations + rollbacks", "failed", "mixed", "operations quiet + swapping", "quiet",
                "swapping", "p99 swapping over quiet", "one change"], [swap_row(row) for row in swaps]), "",
        f"Failed or mixed in all: {failed}. Median of the p99 ratio: {medians}; the goal is at most 1.10.", "",
        "## Start of many tables", "",
        "Each row is a process of its own; resident memory is what the start added to it. Mapped tables are page cache,",
        "which the kernel takes back when it needs it. The goal is under one second.", "",
        *table(["start", "tables", "bytes of their files", "seconds", "resident, anonymous", "resident, file"],
               [start_row(row) for row in starts]), "",
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build/release"))
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the Markdown file")
    parser.add_argument("--runs", type=int, default=3, help="runs of registry_swap_bench")
    parser.add_argument("--quick", action="store_true", help="a run of seconds; the figures mean nothing")
    options = parser.parse_args(arguments)
    where = machine()
    bench = options.build / "tests" / "bench"
    keepsetd = options.build / "service" / "keepsetd"
    swaps: list[Row] = []
    for _ in range(1 if options.quick else options.runs):
        swaps += json_lines(bench / "registry_swap_bench", keepsetd, *(SWAP_QUICK if options.quick else ()))
    starts = json_lines(bench / "registry_bench", *(START_QUICK if options.quick else ()))
    command = "tests/bench/registry_report.py --quick" if options.quick else "make evidence-registry"
    options.out.write_text(page(swaps, starts, where, command))
    print(options.out.read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
