"""Would more calibration prompts help? Compiles tables from fewer of the prompts that were measured."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence

from keepset.calibrate import records
from keepset.calibrate.compiler import Compiler


def tables_by_prompts(compiler: Compiler, records_path: pathlib.Path, prompt_ids: Sequence[str],
                      counts: Sequence[int], work: pathlib.Path) -> dict[int, bytes]:
    """A table from the records of the first `count` prompts, for every count."""
    work.mkdir(parents=True, exist_ok=True)
    lines = [(record["prompt_id"], json.dumps(record)) for record in records.read(records_path)]
    made = {}
    for count in counts:
        wanted = set(prompt_ids[:count])
        part = work / f"{count}.jsonl"
        part.write_text("".join(line + "\n" for prompt, line in lines if prompt in wanted))
        table = work / f"{count}.safetensors"
        compiler.compile([part], table, name="curve", version=str(count))
        made[count] = table.read_bytes()
    return made


def curve(tables: dict[int, bytes], loss: Callable[[bytes], list[float]]) -> list[dict]:
    """Losses by budget under the table of every count."""
    return [{"prompts": count, "loss_by_budget": loss(table)} for count, table in tables.items()]
