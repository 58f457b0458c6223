"""The report's section on key novelty of a few KV heads."""

from __future__ import annotations

from collections.abc import Iterator

from keepset.evidence.head_methods import NOVELTY


def novelty_section(part: dict) -> Iterator[str]:
    found = [(column, task, rows) for column, each in part["columns"].items()
             for task, rows in each["tasks"].items() if rows.get("novelty")]
    if not found:
        return
    yield "### Key novelty of a few KV heads"
    yield ""
    yield (f"`{NOVELTY}` against methods that read the keys of all KV heads, on the prompts that were measured with "
           "both: its figure / theirs, and the paired difference with its 95 % interval. Answers: more is better; KL: "
           "less.")
    yield ""
    for column, each in part["columns"].items():
        for task, table in each.get("novelty_tables", {}).items():
            heads = ", ".join(f"({layer}, {head}) {weight:.2f}" for layer, head, weight in table["heads"])
            yield (f"- {column} {task}: (layer, KV head) weight {heads}; recall of needed mass on held-out prompts of "
                   f"the other tasks {table['held_out_recall']:.2f}")
    yield ""
    rivals = list(next(iter(found[0][2]["novelty"].values()))["against"])
    yield f"| column | task | budget | prompts | it | {' | '.join(f'{one} | it minus {one}' for one in rivals)} |"
    yield "|---|---|---|---|---|" + "---|---|" * len(rivals)
    for column, task, rows in found:
        unit = "" if rows["value"] == "exact" else " KL"
        for budget, one in rows["novelty"].items():
            told = " | ".join(
                f"{other['value']:.2f} | {other['difference']['mean']:+.2f} [{other['difference']['low']:+.2f}, "
                f"{other['difference']['high']:+.2f}]" for other in one["against"].values())
            yield f"| {column} | {task} | {budget} | {one['prompts']} | {one['value']:.2f}{unit} | {told} |"
    yield ""
