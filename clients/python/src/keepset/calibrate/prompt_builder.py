"""Head prompts of a language model. The numpy runner and keepset.adapters.hf have the same methods, so
tasks of either are built here from token ids."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from keepset import ModelFingerprint
from keepset.calibrate.head_prompts import EXACT, HeadPrompt, Outcome, needed_mass
from keepset.calibrate.prompts import answer_loss
from keepset.in_process import QueryLayer

Ids = npt.NDArray[np.int32]
# Continuations whose attention is counted as needed: each costs a prefill.
_NEEDED = 4


class Reader(Protocol):
    """keepset.eval.small_model.SmallModel, keepset.adapters.hf.HfModel."""

    def prefill(self, input_ids: npt.ArrayLike, *, row_positions: npt.ArrayLike) -> Any: ...

    def score_many(self, cache: Any, input_ids: npt.ArrayLike, position: int) -> np.ndarray: ...

    def decode(self, cache: Any, input_ids: npt.ArrayLike, position: int, num_new_tokens: int
               ) -> list[int]: ...


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Follows the prompt: ids [n] are fed, those where judged [n] is true are predicted first."""

    ids: Ids
    judged: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, *parts: tuple[Sequence[int], bool]) -> Continuation:
        """parts: (ids, whether they are judged), one after the other."""
        return cls(np.concatenate([np.asarray(ids, np.int32) for ids, _ in parts]),
                   np.concatenate([np.full(len(ids), judged) for ids, judged in parts]))


@dataclasses.dataclass(frozen=True)
class Script:
    """What is read and asked. ids [T]: the prompt, compressed as a whole. observe: positions of the rows
    that observe. probe: name, text and ids that are read behind the prompt and dropped."""

    ids: Ids
    observe: tuple[int, int]
    continuations: tuple[Continuation, ...]
    probe: tuple[str, str, Ids] | None = None
    scored: str = EXACT


@dataclasses.dataclass(frozen=True)
class PromptBuilder:
    """window: rows that window methods observe. protect_sink: of every method, beside the last `window`
    positions and everything from `observe` on."""

    model: Reader
    fingerprint: ModelFingerprint
    softmax_scale: float
    detokenize: Callable[[Sequence[int]], str]
    window: int
    protect_sink: int = 4

    def build(self, task: str, prompt_id: str, script: Script) -> HeadPrompt:
        seq_len, begin = len(script.ids), script.observe[0]
        protect = max(self.window, seq_len - begin)
        rows = np.arange(seq_len - protect, seq_len)
        ids, probe = script.ids, None
        if script.probe is not None:
            probe = script.probe[:2]
            ids = np.concatenate([ids, script.probe[2]])
            rows = np.arange(rows[0], len(ids))
        prefill = self.model.prefill(ids, row_positions=rows)
        layers = tuple(
            QueryLayer(one.q_window, np.ascontiguousarray(one.k[:, :seq_len]),
                       np.ascontiguousarray(one.v[:, :seq_len])) for one in prefill.layers)
        logprobs = prefill.token_logprobs[seq_len - self.window : seq_len]
        return HeadPrompt(
            task, prompt_id, self.fingerprint, self.softmax_scale, layers, rows, script.observe,
            lambda: self._needed(script), self.protect_sink, protect, self.window,
            _Judge(self, prefill, script), float(np.exp(-logprobs.mean(dtype=np.float64))), probe,
            lambda: self._queries(script.ids), script.scored)

    def told_by_full_cache(self, ids: Ids, fed: Sequence[int], count: int) -> list[int]:
        """The most likely `count` ids after the prompt `ids` and `fed`."""
        everything = np.concatenate([ids, np.asarray(fed, np.int32)])
        last = len(everything) - 1
        cache = self.model.prefill(everything, row_positions=[last]).full_cache().before(last)
        return self.model.decode(cache, everything[-1:], last, count)

    def _needed(self, script: Script) -> npt.NDArray[np.float32]:
        seq_len = len(script.ids)
        need = np.zeros(seq_len, np.float32)
        for one in script.continuations[:_NEEDED]:
            rows = np.arange(seq_len - int(one.judged[0]), seq_len + len(one.ids) - 1)
            read = self.model.prefill(np.concatenate([script.ids, one.ids[:-1]]), row_positions=rows)
            need += needed_mass(read.layers, rows, seq_len, self.softmax_scale)
        return need

    def _queries(self, ids: Ids) -> list[np.ndarray]:
        return [one.q_window for one in
                self.model.prefill(ids, row_positions=np.arange(len(ids))).layers]


class _Judge:
    """Outcomes of one prompt under keep sets; teacher-forced, so that every method is asked the same."""

    def __init__(self, builder: PromptBuilder, prefill: Any, script: Script):
        self._builder, self._prefill, self._script = builder, prefill, script

    def __call__(self, keep: list) -> Outcome:
        found = self._logits(keep)
        shares, losses, kls, told = [], [], [], []
        for one, logits, full in zip(self._script.continuations, found, self._full):
            answer = one.ids[one.judged]
            best = logits.argmax(-1)
            shares.append(bool((best == answer).all()))
            losses.append(answer_loss(logits[None], answer[None]))
            kls.append(_kl(full, logits))
            told.append(self._builder.detokenize(best))
        share = float(np.mean(shares))
        return Outcome(share, share > 0.5, float(np.mean(losses)), "; ".join(told),
                       float(np.mean(kls)))

    @functools.cached_property
    def _full(self) -> list[np.ndarray]:
        seq_len = len(self._script.ids)
        return self._logits([np.arange(seq_len)] * len(self._prefill.layers))

    def _logits(self, keep: list) -> list[np.ndarray]:
        """Of each continuation's judged tokens, [num_judged, vocab]."""
        script, model = self._script, self._builder.model
        seq_len = len(script.ids)
        cache = self._prefill.compact(keep).before(seq_len)
        found: list[np.ndarray] = [np.empty(0)] * len(script.continuations)
        # An answer that follows the prompt at once is predicted by the prompt's last token, which is
        # fed again. Equal lengths go together.
        groups: dict[tuple[int, bool], list[int]] = {}
        for index, one in enumerate(script.continuations):
            groups.setdefault((len(one.ids), bool(one.judged[0])), []).append(index)
        for (_, again), indices in groups.items():
            fed = np.stack([script.continuations[i].ids[:-1] for i in indices])
            start = seq_len
            if again:
                start -= 1
                fed = np.concatenate([np.full((len(fed), 1), script.ids[-1]), fed], 1)
            logits = model.score_many(cache.before(start), fed, start)
            for index, one in zip(indices, logits):
                judged = script.continuations[index].judged
                found[index] = one[judged if again else judged[1:]]
        return found


def _kl(full: np.ndarray, kept: np.ndarray) -> float:
    """Mean KL(full || kept) of logits [n, vocab], nats."""
    def log_softmax(logits: np.ndarray) -> np.ndarray:
        wide = logits.astype(np.float64)
        wide -= wide.max(-1, keepdims=True)
        return wide - np.log(np.exp(wide).sum(-1, keepdims=True))

    p, q = log_softmax(full), log_softmax(kept)
    return float((np.exp(p) * (p - q)).sum(-1).mean())
