"""Head prompts of a language model. The numpy runner and keepset.adapters.hf have the same methods, so
tasks of either are built here from token ids."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from keepset import Layer, ModelFingerprint
from keepset.calibrate.head_prompts import EXACT, HeadPrompt, Outcome, needed_mass
from keepset.eval.small_model import LayerObservation


Ids = npt.NDArray[np.int32]
# Continuations whose attention is counted as needed: each costs a pass.
_NEEDED = 4


class Reader(Protocol):
    """keepset.eval.small_model.SmallModel, keepset.adapters.hf.HfModel."""

    def prefill(self, input_ids: npt.ArrayLike, *, row_positions: npt.ArrayLike) -> Any: ...

    def score_caches(self, caches: Sequence[Any], input_ids: npt.ArrayLike, position: int, last: int
                     ) -> Iterator[np.ndarray]: ...

    def observe_after(self, prefill: Any, input_ids: npt.ArrayLike, position: int
                      ) -> tuple[LayerObservation, ...]: ...

    def queries(self, input_ids: npt.ArrayLike) -> list[np.ndarray]: ...

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
            Layer(one.q_window, np.ascontiguousarray(one.k[:, :seq_len]),
                       np.ascontiguousarray(one.v[:, :seq_len])) for one in prefill.layers)
        logprobs = prefill.token_logprobs[seq_len - self.window : seq_len]
        return HeadPrompt(
            task, prompt_id, self.fingerprint, self.softmax_scale, layers, rows, script.observe,
            lambda: self._needed(script, prefill), self.protect_sink, protect, self.window,
            _Judge(self, prefill, script), float(np.exp(-logprobs.mean(dtype=np.float64))), probe,
            lambda: self.model.queries(script.ids), script.scored)

    def repetition(self, vocab_size: int, length: int, times: int) -> HeadPrompt:
        """`length` random tokens, `times` times; the rows of the last time observe."""
        ids = np.tile(np.random.default_rng(0).integers(vocab_size, size=length, dtype=np.int32), times)
        return self.build("repetition", f"repetition-{len(ids)}-0", Script(
            ids, (len(ids) - length, len(ids)), (Continuation.of((ids[:1], True)),)))

    def told_by_full_cache(self, ids: Ids, fed: Sequence[int], count: int) -> list[int]:
        """The most likely `count` ids after the prompt `ids` and `fed`."""
        everything = np.concatenate([ids, np.asarray(fed, np.int32)])
        last = len(everything) - 1
        cache = self.model.prefill(everything, row_positions=[last]).full_cache().before(last)
        return self.model.decode(cache, everything[-1:], last, count)

    def _needed(self, script: Script, prefill: Any) -> npt.NDArray[np.float32]:
        seq_len = len(script.ids)
        need = np.zeros(seq_len, np.float32)
        for one in script.continuations[:_NEEDED]:
            again = int(one.judged[0])
            fed = np.concatenate([script.ids[seq_len - again :], one.ids[:-1]])
            rows = np.arange(seq_len - again, seq_len - again + len(fed))
            layers = self.model.observe_after(prefill, fed, rows[0])
            need += needed_mass(layers, rows, seq_len, self.softmax_scale)
        return need


class _Judge:
    """Outcomes of one prompt under keep sets; teacher-forced, so that every method is asked the same.

    All judged tokens being the most likely ones is what greedy decoding of the answer is: until the
    first other token both have read the same.
    """

    def __init__(self, builder: PromptBuilder, prefill: Any, script: Script):
        self._builder, self._prefill, self._script = builder, prefill, script
        self._known: dict[bytes, Outcome] = {}

    def __call__(self, keeps: Sequence[list]) -> list[Outcome]:
        wanted = {_digest(keep): keep for keep in keeps}
        new = {key: keep for key, keep in wanted.items() if key not in self._known}
        for key, logits in zip(new, self._logits(list(new.values()))):
            self._known[key] = self._outcome(logits)
        return [self._known[_digest(keep)] for keep in keeps]

    def _outcome(self, found: Sequence[np.ndarray]) -> Outcome:
        shares, losses, kls, told = [], [], [], []
        for one, logits, full in zip(self._script.continuations, found, self._full):
            answer = one.ids[one.judged]
            best = logits.argmax(-1)
            shares.append(bool((best == answer).all()))
            low, log_sum = _below_top(logits)
            losses.append((log_sum - low[np.arange(len(answer)), answer]).mean())
            kls.append(full.divergence(low, log_sum))
            told.append(self._builder.detokenize(best))
        share = float(np.mean(shares))
        return Outcome(share, share > 0.5, float(np.mean(losses)), "; ".join(told),
                       float(np.mean(kls)))

    @functools.cached_property
    def _full(self) -> list[_Reference]:
        everything = [np.arange(len(self._script.ids))] * len(self._prefill.layers)
        return [_Reference(one) for one in next(self._logits([everything]))]

    def _logits(self, keeps: Sequence[list]) -> Iterator[list[np.ndarray]]:
        """Of each keep set, of each continuation's judged tokens, [num_judged, vocab]."""
        script, model = self._script, self._builder.model
        seq_len = len(script.ids)
        # An answer that follows the prompt at once is predicted by the prompt's last token, which is
        # fed again. Equal lengths go together.
        groups: dict[tuple[int, bool], list[int]] = {}
        for index, one in enumerate(script.continuations):
            groups.setdefault((len(one.ids), bool(one.judged[0])), []).append(index)
        scored = []
        for (_, again), indices in groups.items():
            fed = np.stack([script.continuations[i].ids[:-1] for i in indices])
            start = seq_len
            if again:
                start -= 1
                fed = np.concatenate([np.full((len(fed), 1), script.ids[-1]), fed], 1)
            # Row i of what is scored predicts ids[i + 1], with `again` ids[i].
            first = min(int(script.continuations[i].judged.argmax()) for i in indices)
            last = fed.shape[1] - first + (not again)
            caches = _Compacted(self._prefill, keeps, start)
            scored.append((indices, last, model.score_caches(caches, fed, start, last)))
        for _ in keeps:
            found: list[np.ndarray] = [np.empty(0)] * len(script.continuations)
            for indices, last, logits in scored:
                for index, one in zip(indices, next(logits)):
                    found[index] = one[script.continuations[index].judged[-last:]]
            yield found


class _Compacted(Sequence):
    """The caches of keep sets before a position, made when they are asked for."""

    def __init__(self, prefill: Any, keeps: Sequence[list], position: int):
        self._prefill, self._keeps, self._position = prefill, keeps, position

    def __len__(self) -> int:
        return len(self._keeps)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        return self._prefill.compact(self._keeps[index]).before(self._position)


def _below_top(logits: np.ndarray) -> tuple[np.ndarray, npt.NDArray[np.float64]]:
    """Logits [n, vocab] less their maximum, and the logarithm of the sum of their exponentials [n]."""
    low = logits - logits.max(-1, keepdims=True)
    return low, np.log(np.exp(low).sum(-1, dtype=np.float64))


class _Reference:
    """Logits [n, vocab] that others are held against."""

    def __init__(self, logits: np.ndarray):
        low, log_sum = _below_top(logits)
        self._p = np.exp(low - log_sum[:, None])
        # The probabilities sum to 1, and the reference diverges from itself by exactly 0.
        self._entropy = log_sum - np.einsum("nv,nv->n", self._p, low)

    def divergence(self, logits: np.ndarray, log_sum: np.ndarray) -> float:
        """Mean KL(this || logits) in nats; log_sum [n] is of exp(logits)."""
        expected = np.einsum("nv,nv->n", self._p, logits)
        return float((log_sum - expected - self._entropy).mean())


def _digest(keep: list) -> bytes:
    digest = hashlib.sha256()
    for one in keep:
        for head in [one] if isinstance(one, np.ndarray) else one:
            digest.update(len(head).to_bytes(8, "little"))
            digest.update(np.asarray(head, np.int64).tobytes())
        digest.update(b"|")
    return digest.digest()
