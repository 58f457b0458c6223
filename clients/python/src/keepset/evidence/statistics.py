"""Paired statistics over prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

NUM_RESAMPLES = 10_000


def bootstrap_interval(per_prompt: npt.ArrayLike, seed: int = 0,
                       strata: npt.ArrayLike | None = None) -> tuple[float, float]:
    """95 % percentile interval of the mean of values [prompts], prompts drawn with replacement; with
    strata [prompts], within each of them."""
    values = np.asarray(per_prompt, np.float64)
    rng = np.random.default_rng(seed)
    labels = np.zeros(len(values)) if strata is None else np.asarray(strata)
    total = np.zeros(NUM_RESAMPLES)
    for label in np.unique(labels):
        part = values[labels == label]
        total += part[rng.integers(len(part), size=(NUM_RESAMPLES, len(part)))].sum(1)
    low, high = np.percentile(total / len(values), [2.5, 97.5])
    return float(low), float(high)


def paired_difference(first: npt.ArrayLike, second: npt.ArrayLike,
                      strata: npt.ArrayLike | None = None) -> dict[str, float]:
    """Mean of first - second over the same prompts, with its interval."""
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    low, high = bootstrap_interval(difference, strata=strata)
    return {"mean": float(difference.mean()), "low": low, "high": high}


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float]:
    """Questions that only one of two methods gets right, and the exact two-sided p of that split.

    Questions of one prompt are not independent; the interval over prompts is the cautious reading.
    """
    only_first = sum(a and not b for a, b in zip(first, second))
    only_second = sum(b and not a for a, b in zip(first, second))
    total = only_first + only_second
    tail = sum(math.comb(total, i) for i in range(min(only_first, only_second) + 1)) / 2**total
    return {"only_first": only_first, "only_second": only_second, "p": min(1.0, 2 * tail)}
