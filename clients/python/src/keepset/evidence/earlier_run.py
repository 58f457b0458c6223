"""What a run did not measure stays in the report as an earlier run left it, and the report says which."""

from __future__ import annotations

PARTS = ("constructed", "small_model", "hf_model")


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
