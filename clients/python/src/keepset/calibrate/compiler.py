"""Calls `keepset tables compile`: the fit lives in C++ and only there."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import tempfile
from collections.abc import Sequence

from keepset import ModelFingerprint
from keepset.calibrate import CalibrationError
from keepset.calibrate.grids import PAPER_GRIDS, Grids


@dataclasses.dataclass(frozen=True)
class Compiler:
    """The `keepset` program and the model whose tables it writes."""

    program: pathlib.Path
    model: ModelFingerprint
    entropy_bins: int = 20
    ppl_bins: int = 4
    grids: Grids = PAPER_GRIDS

    def compile(self, records: Sequence[pathlib.Path], table: pathlib.Path, *, name: str,
                version: str) -> str:
        """Fits `table` to the records; returns what the program reported."""
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(self.model.to_json(), file)
            file.flush()
            done = subprocess.run(
                [str(self.program), "tables", "compile", *map(str, records), "-o", str(table),
                 "--model-json", file.name, "--name", name, "--version", version,
                 "--entropy-bins", str(self.entropy_bins), "--ppl-bins", str(self.ppl_bins),
                 "--head-actions", str(self.grids.head), "--gate-actions", str(self.grids.gate)],
                capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CalibrationError(f"keepset tables compile: {done.stderr.strip()}")
        return done.stdout
