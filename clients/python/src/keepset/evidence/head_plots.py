"""The picture of the report: predicted against measured miss rates; matplotlib is the extra `plots`."""

from __future__ import annotations

import pathlib

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

_PARTS = {"small_model": "small model", "hf_model": "Hugging Face model"}


def draw(found: dict, out: pathlib.Path) -> list[str]:
    """Writes the picture that the data allow into `out`; returns its name."""
    panels = [(f"{title}, {column}", rows["risk"]) for part, title in _PARTS.items() if part in found
              for column, rows in found[part]["columns"].items() if rows["risk"]["points"]]
    if not panels:
        return []
    figure, grid = pyplot.subplots(2, len(panels), figsize=(4 * len(panels), 7), squeeze=False)
    for column, (title, risk) in enumerate(panels):
        _calibration(grid[0][column], risk)
        grid[0][column].set_title(title, fontsize=9)
        _curve(grid[1][column], risk)
    figure.tight_layout()
    name = "observation_heads-risk.png"
    figure.savefig(out / name, dpi=90, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
    return [name]


def _calibration(axes, risk: dict) -> None:
    """Bins of replies, and replies to a target; on the diagonal what was predicted came."""
    for label, rows, style in (("fixed budgets", risk["bins"], "o"),
                               ("target miss rates", risk["targets"], "s")):
        if not rows:
            continue
        measured = np.array([one["measured"] for one in rows])
        low, high = np.array([one["interval"] for one in rows]).T
        axes.errorbar([one["predicted"] for one in rows], measured, fmt=style, capsize=2, label=label,
                      yerr=np.maximum(0, [measured - low, high - measured]))
    axes.plot([0, 1], [0, 1], "k:", lw=0.8)
    axes.set_xlabel("predicted miss rate")
    axes.set_ylabel("measured, 95 % interval")
    axes.legend(fontsize=7)


def _curve(axes, risk: dict) -> None:
    """The table's curve as the replies showed it, and each reply's answer: lost above, found below."""
    mass, predicted, missed = np.array(sorted(risk["points"])).T
    axes.plot(mass, predicted, "-", label="curve of the table")
    spread = np.linspace(-0.03, 0.03, 7)[np.arange(len(mass)) % 7]
    axes.plot(mass, missed + spread, ".", ms=3, alpha=0.4, label="replies: 1 lost, 0 found")
    axes.set_xlabel("mass outside the cut")
    axes.set_ylabel("miss rate")
    axes.legend(fontsize=7)
