"""The report's section on predicted miss rates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def risk_section(part: dict, pictures: Sequence[str]) -> Iterator[str]:
    shown = {column: rows["risk"] for column, rows in part["columns"].items()
             if rows["risk"]["points"]}
    untold = {column: rows["risk"]["untold"] for column, rows in part["columns"].items()
              if rows["risk"].get("untold")}
    if not shown and not untold:
        return
    yield "### Predicted miss rate"
    yield ""
    for column, why in untold.items():
        yield f"Column {column} has no risk curve: {why}."
        yield ""
    if not shown:
        return
    yield ("The reply states the miss rate that its table's curve predicts; the curve was learned on "
           "held-out prompts of the calibration text, under the gate itself. Below: replies at all budgets in five bins ordered "
           "by what they predicted, then replies that were given a target miss rate and kept as few "
           f"positions as that allows, at most {max(part['budgets'])}.")
    yield ""
    for picture in pictures:
        yield f"![Predicted against measured miss rates]({picture})"
        yield ""
    yield "| column | replies | target | predicted | measured | 95 % | mean kept |"
    yield "|---|---|---|---|---|---|---|"
    for column, risk in shown.items():
        for one in (*risk["bins"], *risk["targets"]):
            low, high = one["interval"]
            kept = f"{one['kept']:.0f}" if "kept" in one else "-"
            yield (f"| {column} | {one['prompts']} | {one.get('target', '-')} | {one['predicted']:.2f} | "
                   f"{one['measured']:.2f} | {low:.2f} .. {high:.2f} | {kept} |")
    yield ""
