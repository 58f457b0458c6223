"""What `transfer.measure` found, for a person."""

from __future__ import annotations

from collections.abc import Iterator


def transfer_lines(part: dict, title: str, halves: str) -> Iterator[str]:
    """`halves` says what the two sides are."""
    yield f"### {title}"
    yield ""
    ranks = part["rank_correlation"]
    calibration, test = part["calibration_prompts"][0], part["test_prompts"][0]
    yield (f"Tables compiled on {halves}, {calibration} prompts each. Spearman correlation of their "
           f"rankings of a head state's actions by mean reward: {_number(ranks['mean'])} on average over "
           f"{ranks['ranked_states']} of {ranks['states']} states (the others rank nothing on one side); "
           f"{_number(ranks['mean_of_steep_states'])} over the {ranks['steep_states']} states in which "
           f"the best action is worth more than {ranks['steep']} nats on both sides. Mean loss on {test} "
           "other prompts of each half, in nats:")
    yield ""
    yield ("| half | budget | full cache | own table | other half's table | uniform table | lost by the "
           "swap |")
    yield "|---|---|---|---|---|---|---|"
    for half, losses in enumerate(part["loss_by_half"]):
        for index, budget in enumerate(part["budgets"]):
            own, other = losses["own"][index], losses["other"][index]
            yield (f"| {half + 1} | {budget} | {losses['full']:.3f} | {own:.3f} | {other:.3f} | "
                   f"{losses['uniform'][index]:.3f} | {other - own:+.3f} |")
    yield ""


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.2f}"
