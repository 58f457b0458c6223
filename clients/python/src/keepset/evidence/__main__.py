"""Measures whether compiled tables help and writes evidence.json, evidence.md and its pictures."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import sys
import tempfile
import time

import numpy as np

from keepset.calibrate.__main__ import Build
from keepset.evidence import constructed_part, report, small_model_part
from keepset.in_process import Engine


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m keepset.evidence", description=__doc__)
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build/release"))
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the report's files")
    parser.add_argument("--work", type=pathlib.Path,
                        help="folder for records and tables; kept, and an interrupted run goes on "
                             "there. Without it a temporary one")
    parser.add_argument("--quick", action="store_true",
                        help="one constructed model only; exit status 1 when it does not pass")
    parser.add_argument("--no-plots", action="store_true",
                        help="a report without pictures, which need the extra `plots` (matplotlib)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="keepset-evidence-") as temporary:
        return run(Build(options.build), options.out, options.work or pathlib.Path(temporary),
                   quick=options.quick, with_plots=not options.no_plots)


def run(build: Build, out: pathlib.Path, work: pathlib.Path, *, quick: bool,
        with_plots: bool = False) -> int:
    started, cpu_before = time.monotonic(), _cpu_seconds()
    resumed = work.is_dir() and any(work.iterdir())
    if with_plots:
        # An optional extra: missing, it is missed before the work and not after it.
        from keepset.evidence import plots

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {line}", file=sys.stderr, flush=True)

    with Engine(build.library) as engine:
        versions = {"keepset": engine.version, "backend": engine.backend, "numpy": np.__version__,
                    "python": platform.python_version()}
    cases = constructed_part.quick_cases() if quick else constructed_part.all_cases()
    found: dict = {"command": "python -m keepset.evidence" + (" --quick" if quick else ""),
                   "versions": versions, "constructed": []}
    for index, case in enumerate(cases):
        say(f"constructed model {index + 1} of {len(cases)}: {case.title}, "
            f"alpha_scope={case.alpha_scope}")
        entry = constructed_part.run_case(case, build, work / f"constructed-{index}", say)
        found["constructed"].append(entry)
        say("accuracy " + ", ".join(f"{name} {row['accuracy']:.2f}"
                                    for name, row in entry["rows"].items()))
    if not quick:
        found["small_model"] = small_model_part.run(build, work / "small-model",
                                                    small_model_part.Settings(), say)
    found["run"] = {"wall_seconds": round(time.monotonic() - started, 1),
                    "cpu_seconds": round(_cpu_seconds() - cpu_before, 1),
                    "cores": len(os.sched_getaffinity(0)), "resumed": resumed}
    out.mkdir(parents=True, exist_ok=True)
    found["plots"] = plots.draw(found, out) if with_plots else []
    (out / "evidence.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")
    (out / "evidence.md").write_text(report.markdown(found))
    say(f"wrote {out / 'evidence.json'}, {out / 'evidence.md'} and {len(found['plots'])} pictures")
    unexpected = [one["title"] for one in found["constructed"]
                  if one["passed"] != one["expected_to_pass"]]
    for title in unexpected:
        say(f"not as expected: {title}")
    return 1 if unexpected else 0


def _cpu_seconds() -> float:
    """Of this process and of the servers and tools it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    sys.exit(main())
