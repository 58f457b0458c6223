"""Raw outcomes of one method at one budget in one column, and what is computed from them."""

from __future__ import annotations

import collections

import numpy as np

import keepset
from keepset.evidence.service import candidates_of, candidates_summary, cells_of
from keepset.evidence.statistics import bootstrap_interval


class Tally:
    """Filled prompt by prompt: `begin_prompt`, then any number of `add`."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self.exact: list[list[bool]] = []  # by prompt, by question
        self._predicted: list[list[str]] = []
        self._kl: list[float] = []
        self._bytes_before = 0
        self._bytes_after = 0
        self._kept: list[float] = []
        self._candidates: list[int] = []
        self._common: list[float] = []
        self._cells: collections.Counter[str] = collections.Counter()

    def begin_prompt(self) -> None:
        self.exact.append([])
        self._predicted.append([])

    def add(self, result: keepset.Result, exact: list[bool], predicted: list[str],
            kl: np.ndarray) -> None:
        self.exact[-1] += exact
        self._predicted[-1] += predicted
        self._kl += kl.tolist()
        self._bytes_before += result.bytes_before
        self._bytes_after += result.bytes_after
        self._kept += [float(np.mean([len(one.indices) for one in layer.sets]))
                       for layer in result.layers]
        self._candidates += candidates_of(result) or []
        self._cells.update(cells_of(result))

    def compare_kept(self, kept: list[np.ndarray], reference: list[np.ndarray]) -> None:
        """Notes the Jaccard overlap of what two tables kept, layer by layer."""
        self._common += [len(np.intersect1d(a, b)) / max(1, len(np.union1d(a, b)))
                         for a, b in zip(kept, reference)]

    def by_prompt(self) -> list[float]:
        """Share of exact answers of each prompt."""
        return [float(np.mean(one)) for one in self.exact]

    def to_json(self) -> dict:
        return {
            "exact": float(np.mean(self.by_prompt())),
            "interval": bootstrap_interval(self.by_prompt()),
            "kl_mean": float(np.mean(self._kl)), "kl_p95": float(np.percentile(self._kl, 95)),
            "bytes_before": self._bytes_before, "bytes_after": self._bytes_after,
            "mean_kept": float(np.mean(self._kept)),
            **candidates_summary(self._candidates, self._budget),
            "kept_in_common_with_uniform": float(np.mean(self._common)) if self._common else None,
            "hits_by_entropy_and_ppl_bin": dict(sorted(self._cells.items())),
            "correct_by_prompt": ["".join("01"[int(x)] for x in one) for one in self.exact],
            "predicted": self._predicted,
        }  # fmt: skip
