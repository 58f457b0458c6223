"""Prompts for choosing observing heads: what a prompt showed, what its continuation needed, and what is
lost under any keep set. keepset.calibrate.prompt_builder makes them for a model."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from keepset import Layer, ModelFingerprint
from keepset.eval import constructed
from keepset.eval.small_model import LayerObservation


# Values of tensor `rows` of an observation_heads table.
LAST_ROW, MAX_ROWS, MEAN_ROWS, PROBE_MAX, PROBE_MEAN, KEY_NOVELTY = range(6)
ROWS_NAMES = ("last_row", "max_rows", "mean_rows", "probe_max", "probe_mean", "key_novelty")

Candidate = tuple[int, int, int]  # layer, head, rows


# How a task is scored: by the share of exact answers, or by the KL divergence from the full cache alone.
EXACT, KL = "exact", "kl"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one keep set: share of exact answers, whether most are, mean loss of the answers' tokens, and
    mean KL(full cache || kept) at them, NaN where a model has no logits."""

    share: float
    exact: bool
    loss: float
    predicted: str
    kl: float = float("nan")


# Compared by identity: it holds arrays.
@dataclasses.dataclass(frozen=True, eq=False)
class HeadPrompt:
    """One prefill. row_positions [W] may end with rows of a probe, at positions from seq_len on.

    observe: the positions [begin, end) of the rows that observe. The last `protect_window` and first
    `protect_sink` positions stay, for every method. window: the rows that methods with an observation
    window look at, the last ones of the prompt. needed: see `need`. judge: see `outcomes`. queries: of
    every position, per layer [H, T, d], for methods that read them all.
    """

    task: str
    prompt_id: str
    model: ModelFingerprint
    softmax_scale: float
    layers: tuple[Layer, ...]
    row_positions: npt.NDArray[np.int64]
    observe: tuple[int, int]
    needed: Callable[[], npt.NDArray[np.float32]]
    protect_sink: int
    protect_window: int
    window: int
    judge: Callable[[Sequence[list]], list[Outcome]]
    ppl: float
    probe: tuple[str, str] | None = None
    queries: Callable[[], list[np.ndarray]] | None = None
    scored: str = EXACT

    @property
    def seq_len(self) -> int:
        return int(self.layers[0].k.shape[1])

    @functools.cached_property
    def need(self) -> npt.NDArray[np.float32]:
        """[T]: attention of the full-cache continuation's queries, summed over layers and heads."""
        return self.needed()

    def outcomes(self, keeps: Sequence[list]) -> list[Outcome]:
        """Of each keep set: per layer positions [n], or one [n_g] per KV head. Cheaper together."""
        return self.judge(keeps)

    def outcome(self, keep: list) -> Outcome:
        return self.judge([keep])[0]

    def num_bytes(self) -> int:
        """Of the arrays; what `judge` holds beside them is no more."""
        return sum(one.nbytes for layer in self.layers for one in (layer.q_window, layer.k, layer.v))

    def parameters(self, uses_probe: bool = False) -> dict[str, str]:
        """Policy parameters of observation_heads for this prompt."""
        chosen = {"observe": f"{self.observe[0]}:{self.observe[1]}"}
        if uses_probe and self.probe is not None:
            chosen["probe"] = self.probe[0]
        return chosen


class Tasks(Protocol):
    """A model with prompts made from seeds: the same task, seed and length are the same prompt.

    seq_len is nominal: a prompt has about so many tokens.
    """

    fingerprint: ModelFingerprint

    def prompt(self, task: str, seed: int, seq_len: int) -> HeadPrompt: ...

    def repetition(self, length: int, times: int) -> HeadPrompt:
        """`length` random tokens, `times` times; the rows of the last time observe."""


class OutOfTime(Exception):
    """A prompt was asked for after the time that RememberedTasks was given."""


class RememberedTasks:
    """Tasks whose prompts are read once, while they fit in `max_bytes`; the least recently used goes.

    until: of time.monotonic; later `prompt` raises OutOfTime.
    """

    def __init__(self, tasks: Tasks, until: float = math.inf, max_bytes: int = 3 << 30):
        self.fingerprint = tasks.fingerprint
        self._tasks = tasks
        self._until = until
        self._max_bytes = max_bytes
        self._known: collections.OrderedDict[tuple, HeadPrompt] = collections.OrderedDict()

    def prompt(self, task: str, seed: int, seq_len: int) -> HeadPrompt:
        self.check_time()
        key = task, seed, seq_len
        if key not in self._known:
            self._known[key] = self._tasks.prompt(task, seed, seq_len)
        self._known.move_to_end(key)
        while len(self._known) > 1 and (
                sum(one.num_bytes() for one in self._known.values()) > self._max_bytes):
            self._known.popitem(last=False)
        return self._known[key]

    def check_time(self) -> None:
        """OutOfTime, as `prompt` raises it."""
        if time.monotonic() > self._until:
            raise OutOfTime

    def repetition(self, length: int, times: int) -> HeadPrompt:
        return self._tasks.repetition(length, times)


def attention(q: np.ndarray, k: np.ndarray, rows: np.ndarray, scale: float) -> np.ndarray:
    """Softmax of rows q [H, n, d] over k [Hkv, T, d]: [H, n, T]; row i sees positions <= rows[i]."""
    group = len(q) // len(k)
    future = np.arange(k.shape[1]) > np.asarray(rows)[:, None]
    out = np.empty((*q.shape[:2], k.shape[1]), np.float32)
    for head, one in enumerate(q):
        logits = scale * (one @ k[head // group].T)
        logits[future] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out[head] = weights / weights.sum(-1, keepdims=True)
    return out


def key_novelty(k: np.ndarray) -> np.ndarray:
    """-cos(k, mean unit key) of every KV head: k [Hkv, T, d] -> [Hkv, T]."""
    unit = k / np.maximum(np.linalg.norm(k, axis=-1, keepdims=True), 1e-20)
    mean = unit.mean(1, keepdims=True)
    mean /= np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-20)
    return -(unit * mean).sum(-1)


def candidate_scores(prompt: HeadPrompt) -> tuple[list[Candidate], np.ndarray]:
    """Every way every head can observe the prompt, and what it sees [N, T]: not pooled, not normalised."""
    rows = np.asarray(prompt.row_positions)
    is_probe = rows >= prompt.seq_len
    in_span = (rows >= prompt.observe[0]) & (rows < prompt.observe[1])
    candidates: list[Candidate] = []
    scores = []
    for index, layer in enumerate(prompt.layers):
        tile = attention(layer.q_window, layer.k, rows, prompt.softmax_scale)
        for head in range(len(tile)):
            prompt_rows = tile[head][~is_probe]
            ways = {LAST_ROW: prompt_rows[-1], MAX_ROWS: tile[head][in_span].max(0),
                    MEAN_ROWS: tile[head][in_span].mean(0)}
            if is_probe.any():
                ways |= {PROBE_MAX: tile[head][is_probe].max(0),
                         PROBE_MEAN: tile[head][is_probe].mean(0)}
            for way, values in ways.items():
                candidates.append((index, head, way))
                scores.append(values)
        for head, values in enumerate(key_novelty(layer.k)):
            candidates.append((index, head, KEY_NOVELTY))
            scores.append(values)
    return candidates, np.asarray(scores, np.float32)


def needed_mass(layers: Sequence[LayerObservation], rows: np.ndarray, seq_len: int, scale: float
                ) -> npt.NDArray[np.float32]:
    """Attention of the observed rows on positions below seq_len, summed over layers, heads and rows."""
    total = np.zeros(seq_len, np.float32)
    for layer in layers:
        total += attention(layer.q_window, layer.k, rows, scale).sum((0, 1))[:seq_len]
    return total


class ConstructedTasks:
    """Every fact of a constructed model is asked after the prompt; one fact per 64 tokens."""

    TASKS = ("facts",)

    def __init__(self, model: constructed.ConstructedModel):
        self.model = model
        self.fingerprint = ModelFingerprint(**model.fingerprint())

    def prompt(self, task: str, seed: int, seq_len: int) -> HeadPrompt:
        made = self.model.make_facts(seed, seq_len, seq_len // 64)
        prefill = self.model.prefill(made)
        layers = tuple(Layer(one.q_window, one.k, one.v) for one in prefill.layers)

        def needed() -> npt.NDArray[np.float32]:
            # What the questions attend to is known by construction: the values of the facts.
            need = np.zeros(seq_len, np.float32)
            for step in range(self.model.num_layers):
                need[made.key_positions + 1 + step] = 1
            return need

        def judge(keeps: Sequence[list]) -> list[Outcome]:
            return [outcome(keep) for keep in keeps]

        def outcome(keep: list) -> Outcome:
            # Of one set per KV head the retrieval head's is what the answers come from.
            sets = [one if isinstance(one, np.ndarray) else one[self.model.retrieval_head(layer)]
                    for layer, one in enumerate(keep)]
            answers = self.model.answer(made, self.model.retrieval_cache(prefill, sets))
            share = float(answers.correct.mean())
            return Outcome(share, share > 0.5, answers.loss,
                           "".join("01"[int(one)] for one in answers.correct))

        return HeadPrompt(task, f"{self.model.name}-{seq_len}-{seed}", self.fingerprint,
                          self.model.softmax_scale, layers,
                          np.arange(seq_len - constructed.WINDOW, seq_len),
                          (seq_len - constructed.WINDOW, seq_len), needed, 0, 0, constructed.WINDOW,
                          judge, prefill.ppl)
