"""What a model adapter brings: prompts that were read once and can be scored under any keep set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from keepset import ModelFingerprint
from keepset.eval import constructed, facts, vocabulary
from keepset.eval.small_model import SmallModel
from keepset.in_process import TileLayer

KeepSets = list[npt.NDArray[np.integer]]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prefill. `layers` is what compilerkv decides from, `loss` is teacher-forced under keep sets.

    protect_sink, protect_window: first and last positions that stay, inside the budget; a window of None
    is that of the rollouts.
    """

    prompt_id: str
    seed: int
    seq_len: int
    ppl: float
    layers: tuple[TileLayer, ...]
    full_loss: float
    loss: Callable[[KeepSets], float]
    protect_sink: int = 0
    protect_window: int | None = None


class Adapter(Protocol):
    """A model with prompts made from seeds: the same seed is the same prompt."""

    name: str

    def fingerprint(self) -> ModelFingerprint: ...

    def prompts(self, seeds: Sequence[int]) -> Iterator[Prompt]: ...


def sufficient_layer(q_window: np.ndarray, k: np.ndarray, v: np.ndarray, softmax_scale: float,
                     row_positions: npt.NDArray[np.integer]) -> TileLayer:
    """All that compilerkv reads of a layer, a hundred times smaller.

    The policy takes the mean of the observed rows and the norms of the values, nothing else. So the mean
    row stands for the window, [H, 1, T], and a value of one component, its norm, for each value,
    [Hkv, T, 1]. q_window [H, W, d], k and v [Hkv, T, d].
    """
    group = len(q_window) // len(k)
    future = np.arange(k.shape[1]) > np.asarray(row_positions)[:, None]
    rows = np.empty((len(q_window), 1, k.shape[1]), np.float32)
    for head, q in enumerate(q_window):
        logits = softmax_scale * (q @ k[head // group].T)
        logits[future] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        rows[head, 0] = (weights / weights.sum(-1, keepdims=True)).mean(0)
    return TileLayer(rows, np.linalg.norm(v, axis=-1, keepdims=True).astype(np.float32))


@dataclasses.dataclass(frozen=True)
class ConstructedAdapter:
    """Asks every fact of a constructed model after the prompt."""

    model: constructed.ConstructedModel
    seq_len: int = 2048
    num_facts: int = 32

    @property
    def name(self) -> str:
        return self.model.name

    def fingerprint(self) -> ModelFingerprint:
        return ModelFingerprint(**self.model.fingerprint())

    def prompts(self, seeds: Sequence[int]) -> Iterator[Prompt]:
        rows = np.arange(self.seq_len - constructed.WINDOW, self.seq_len)
        for seed in seeds:
            prefill = self.model.prefill(self.model.make_facts(seed, self.seq_len, self.num_facts))
            layers = tuple(
                sufficient_layer(one.q_window, one.k, one.v, self.model.softmax_scale, rows)
                for one in prefill.layers)
            yield self._prompt(seed, prefill, layers)

    def _prompt(self, seed: int, prefill: constructed.Prefill,
                layers: tuple[TileLayer, ...]) -> Prompt:
        # Copies of the retrieval heads alone: the whole prefill would stay in memory with them.
        cache = [(k.copy(), v.copy()) for k, v in self.model.retrieval_cache(prefill)]
        facts_asked = prefill.facts

        def loss(keep: KeepSets) -> float:
            kept = [(k[one], v[one]) for (k, v), one in zip(cache, keep)]
            return self.model.answer(facts_asked, kept).loss

        return Prompt(f"{self.name}-{seed}", seed, self.seq_len, prefill.ppl, layers,
                      self.model.answer(facts_asked, cache).loss, loss)


@dataclasses.dataclass(frozen=True)
class SmallModelAdapter:
    """Facts in text; even seeds ask after the prompt, odd ones inside it, at its end.

    text_part: the share of the text that prompts are cut from, (0, 1) for all of it.
    """

    model: SmallModel
    text: str = "Apache-2.0"
    seq_len: int = 1024
    num_facts: int = 32
    num_questions: int = 16
    window: int = 16
    text_part: tuple[float, float] = (0.0, 1.0)

    name = "small-model"

    def fingerprint(self) -> ModelFingerprint:
        return ModelFingerprint(**self.model.fingerprint())

    def prompts(self, seeds: Sequence[int]) -> Iterator[Prompt]:
        words = vocabulary.read_text_words(vocabulary.COMMON_LICENSES / self.text)
        begin, end = (int(share * len(words)) for share in self.text_part)
        words = words[begin:end]
        for seed in seeds:
            rng = np.random.default_rng(seed)
            sample = facts.make_sample(rng, words, self.seq_len, self.num_facts)
            asked = [sample.facts[i] for i in rng.permutation(self.num_facts)[: self.num_questions]]
            yield self._inside(seed, sample, asked[0]) if seed % 2 else self._later(seed, sample, asked)

    def _later(self, seed: int, sample: facts.Sample, asked: list[facts.Fact]) -> Prompt:
        prefill = self.model.prefill(self.model.tokenize(sample.context), self.window)
        fed = np.stack([self.model.tokenize(fact.question + fact.answer[:1]) for fact in asked])
        answers = np.stack([self.model.tokenize(fact.answer) for fact in asked])

        def loss(keep: KeepSets) -> float:
            logits = self.model.score_many(prefill.compact(keep), fed, prefill.seq_len)
            return answer_loss(logits[:, -facts.ANSWER_WORDS:], answers)

        return self._prompt(f"later-{seed}", seed, prefill, loss)

    def _inside(self, seed: int, sample: facts.Sample, fact: facts.Fact) -> Prompt:
        prefill = self.model.prefill(
            self.model.tokenize(sample.prompt_with_question(fact)), self.window)
        fed = self.model.tokenize((fact.name, *fact.answer[:1]))[None]
        answers = self.model.tokenize(fact.answer)[None]
        last = prefill.seq_len - 1

        def loss(keep: KeepSets) -> float:
            cache = prefill.compact(keep).before(last)
            return answer_loss(self.model.score_many(cache, fed, last), answers)

        return self._prompt(f"inside-{seed}", seed, prefill, loss)

    def _prompt(self, name: str, seed: int, prefill, loss: Callable[[KeepSets], float]) -> Prompt:
        layers = tuple(
            sufficient_layer(one.q_window, one.k, one.v, self.model.config.softmax_scale,
                             prefill.row_positions) for one in prefill.layers)
        everything = [np.arange(prefill.seq_len)] * len(layers)
        return Prompt(f"{self.name}-{self.text}-{self.text_part}-{name}", seed, prefill.seq_len,
                      prefill.perplexity(self.window), layers, loss(everything), loss)


def answer_loss(logits: np.ndarray, answers: np.ndarray) -> float:
    """Mean negative log-likelihood of answers [n, words] under logits [n, words, vocab]."""
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    log_sum = top[..., 0] + np.log(np.exp(wide - top).sum(-1))
    return float((log_sum - np.take_along_axis(wide, answers[..., None], -1)[..., 0]).mean())
