"""The report's section on the way to pool and dilate."""

from __future__ import annotations

from collections.abc import Iterator

from keepset.evidence.statistics import paired_difference


def ways_section(part: dict) -> Iterator[str]:
    found = [(column, one) for column, rows in part["columns"].items() for one in rows.get("ways", [])]
    if not found:
        return
    told = [(column, one) for column, one in found if one["prompts"]]
    yield "### The way to pool and dilate, on tasks not seen"
    yield ""
    yield (f"Of ways whose measured losses cannot be told apart the compiler takes the one that recalls most of "
           f"held-out tasks. Would it be better to take the least measured loss? Asked of the {len(found)} tables that "
           "were compiled without a task, on that task's prompts of the calibration text, which neither compiled nor "
           "chose them: loss under compression, mean over the budgets of the fit, before the number of observations "
           f"is chosen. In {len(found) - len(told)} of them both take the same way. The last row draws prompts within "
           "these tasks; of other tasks it says nothing.")
    yield ""
    if not told:
        return
    yield ("| column | task not seen | prompts | chosen | loss | least measured loss | loss | least minus chosen | "
           "reading |")
    yield "|---|---|---|---|---|---|---|---|---|"
    for column, one in told:
        difference = one["least_minus_chosen"]
        yield (f"| {column} | {one['task']} | {one['prompts']} | {one['chosen']} | {one['chosen_loss']:.2f} | "
               f"{one['least']} | {one['least_loss']:.2f} | {_interval(difference)} | {_sign(difference)} |")
    pairs = [pair for _, one in told for pair in one["by_prompt"]]
    strata = [number for number, (_, one) in enumerate(told) for _ in one["by_prompt"]]
    both = paired_difference([one[1] for one in pairs], [one[0] for one in pairs], strata)
    yield (f"| all | {len(told)} table{'s' * (len(told) > 1)} | {len(pairs)} | | | | | {_interval(both)} | {_sign(both)} |")
    yield ""


def _sign(difference: dict) -> str:
    """Of losses: less is better."""
    if difference["high"] < 0:
        return "least loss better"
    return "chosen better" if difference["low"] > 0 else "no difference shown"


def _interval(one: dict) -> str:
    return f"{one['mean']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]"
