"""Pictures of the report; matplotlib is an extra (`plots`), `make evidence` installs it."""

from __future__ import annotations

import pathlib

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

_PLAIN = ("streaming_llm", "random", "knorm", "tova", "snapkv")
_KINDS = ("uniform", "compiled", "shuffled")


def draw(report: dict, out: pathlib.Path) -> list[str]:
    """Writes the pictures that the report's data allow into `out`; returns their names."""
    made = [_constructed(report["constructed"], out)]
    if "small_model" in report:
        part = report["small_model"]
        made += [_accuracy(part, out), _curve(part, out), _gates(part, out)]
    return made


def _save(figure, out: pathlib.Path, name: str) -> str:
    figure.savefig(out / name, dpi=90, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
    return name


def _constructed(cases: list[dict], out: pathlib.Path) -> str:
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.6 * len(cases)))
    names = ("uniform", "compiled", "shuffled", "heads only", "gate only")
    places = np.arange(len(cases))
    for index, name in enumerate(names):
        values = [case["rows"][name]["accuracy"] for case in cases]
        low, high = np.array([case["rows"][name]["interval"] for case in cases]).T
        axes.barh(places + 0.16 * (index - 2), values, 0.16, label=name,
                  xerr=np.maximum(0, [values - low, high - values]))
        for place, value in zip(places, values):
            axes.text(value + 0.02, place + 0.16 * (index - 2), f"{value:.2f}", va="center", fontsize=5)
    axes.set_yticks(places, [f"{case['title']} ({case['alpha_scope']})" for case in cases])
    axes.invert_yaxis()
    axes.set_xlabel(f"exact answers at {cases[0]['budget']} of {cases[0]['seq_len']} tokens")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, out, "evidence-constructed.png")


def _accuracy(part: dict, out: pathlib.Path) -> str:
    variants = list(part["calibrations"])
    figure, grid = pyplot.subplots(2, len(variants), figsize=(3.2 * len(variants), 6), sharex=True,
                                   sharey=True, squeeze=False)
    for line, column in zip(grid, ("inside", "later")):
        for axes, variant in zip(line, variants):
            for method in _PLAIN:
                _line(axes, part, method, column, {"lw": 0.8, "ls": ":"}, method, 1.0)
            for place, kind in enumerate(_KINDS):
                _line(axes, part, f"compilerkv {variant} {kind}", column,
                      {"lw": 1.6, "marker": "o^s"[place], "ms": 4}, kind, 1.06 ** (place - 1))
            axes.set_title(f"{variant}, question {column}", fontsize=9)
            axes.set_xscale("log", base=2)
            axes.set_xticks(part["settings"]["budgets"], part["settings"]["budgets"])
    grid[0][0].legend(fontsize=6)
    figure.supxlabel("budget, tokens per layer")
    figure.supylabel("exact answers")
    return _save(figure, out, "evidence-accuracy.png")


def _line(axes, part: dict, method: str, column: str, style: dict, label: str,
          shift: float) -> None:
    """shift: of the budget, so that curves on each other stay visible."""
    rows = [row for row in part["rows"] if row["method"] == method and row["column"] == column]
    values = np.array([row["exact"] for row in rows])
    low, high = np.array([row["interval"] for row in rows]).T
    axes.errorbar([shift * row["budget"] for row in rows], values,
                  yerr=np.maximum(0, [values - low, high - values]), label=label, capsize=2, **style)


def _curve(part: dict, out: pathlib.Path) -> str:
    figure, line = pyplot.subplots(1, len(part["learning_curves"]), sharey=True, squeeze=False,
                                   figsize=(3.2 * len(part["learning_curves"]), 3))
    for axes, (variant, points) in zip(line[0], part["learning_curves"].items()):
        for index, budget in enumerate(part["settings"]["budgets"]):
            axes.plot([point["prompts"] for point in points],
                      [point["loss_by_budget"][index] for point in points], "o-", label=str(budget))
        axes.set_title(variant, fontsize=9)
        axes.set_xlabel("calibration prompts")
    line[0][0].set_ylabel("loss on test prompts, nats")
    line[0][0].legend(title="budget", fontsize=6)
    return _save(figure, out, "evidence-curve.png")


def _gates(part: dict, out: pathlib.Path) -> str:
    """Above: decisions per risk cell; below: candidates against the budget."""
    variants = list(part["calibrations"])
    shape = (part["settings"]["entropy_bins"], part["settings"]["ppl_bins"])
    figure, grid = pyplot.subplots(2, len(variants), figsize=(3.2 * len(variants), 6), squeeze=False)
    for index, variant in enumerate(variants):
        rows = [row for row in part["rows"] if row["method"] == f"compilerkv {variant} compiled"]
        hits = np.zeros(shape)
        for row in rows:
            for cell, count in row["hits_by_entropy_and_ppl_bin"].items():
                hits[tuple(map(int, cell.split(",")))] += count
        axes = grid[0][index]
        axes.imshow(hits, cmap="viridis")
        for cell in np.ndindex(shape):
            axes.text(cell[1], cell[0], f"{hits[cell]:.0f}", ha="center", va="center", color="white",
                      fontsize=7)
        axes.set_title(f"{variant}: decisions per cell", fontsize=9)
        axes.set_xticks(range(shape[1]))
        axes.set_yticks(range(shape[0]))
        axes.set_xlabel("perplexity bin")
        axes.set_ylabel("entropy bin")
        axes = grid[1][index]
        for column in ("inside", "later"):
            chosen = [row for row in rows if row["column"] == column]
            axes.plot([row["budget"] for row in chosen], [row["mean_candidates"] for row in chosen],
                      "o-", label=column)
        budgets = part["settings"]["budgets"]
        axes.plot(budgets, budgets, "k:", label="budget")
        axes.set_xlabel("budget")
        axes.set_ylabel("candidates")
        axes.legend(fontsize=6)
    figure.tight_layout()
    return _save(figure, out, "evidence-gates.png")
