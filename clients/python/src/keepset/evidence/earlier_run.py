"""What a run did not measure stays in the report as an earlier run left it, and the report says which."""

from __future__ import annotations

import json
import pathlib

PARTS = ("constructed", "small_model", "hf_model")
# The Hugging Face model's part has a file of its own.
RESULTS = "observation_heads.json"
HF_RESULTS = "observation_heads_hf_model.json"


def read_results(folder: pathlib.Path) -> dict | None:
    """What `write_results` left in the folder, None without it."""
    if not (folder / RESULTS).exists():
        return None
    return {key: value for name in (RESULTS, HF_RESULTS) if (folder / name).exists()
            for key, value in json.loads((folder / name).read_text()).items()}


def write_results(folder: pathlib.Path, found: dict) -> list[str]:
    """Writes `found`; the names of its files."""
    parts = {RESULTS: {key: value for key, value in found.items() if key != "hf_model"}}
    if "hf_model" in found:
        parts[HF_RESULTS] = {"hf_model": found["hf_model"]}
    for name, part in parts.items():
        (folder / name).write_text(json.dumps(part, separators=(",", ":")) + "\n")
    return list(parts)


def keep_earlier(found: dict, earlier: dict) -> dict:
    """`found` with the parts that only `earlier` has and, of the same Hugging Face model, the columns.

    "kept" of the result says by part, or "hf_model.COLUMN", which command and versions measured it.
    """
    source = {"command": earlier["command"], "versions": earlier["versions"]}
    told = earlier.get("kept", {})
    out, kept = dict(found), {}
    for part in PARTS:
        if part not in found and part in earlier:
            out[part] = earlier[part]
            kept[part] = told.get(part, source)
            kept |= {name: one for name, one in told.items() if name.startswith(f"{part}.")}
    ours, theirs = found.get("hf_model"), earlier.get("hf_model")
    if ours and theirs and ours["revision"] == theirs["revision"]:
        columns = {name: rows for name, rows in theirs["columns"].items() if name not in ours["columns"]}
        missing = [one for one in ours["missing"] if one["column"] not in columns]
        missing += [one for one in theirs["missing"] if one["column"] in columns]
        out["hf_model"] = ours | {"columns": ours["columns"] | columns, "missing": missing}
        kept |= {f"hf_model.{name}": told.get(f"hf_model.{name}", told.get("hf_model", source))
                 for name in columns}
    return out | {"kept": kept} if kept else out
