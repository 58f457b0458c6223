"""Prompts for choosing observing heads: what a prompt showed, what its continuation needed, and the loss
under any keep set. A model brings a prefill that shows q, k and v of chosen rows; nothing else is asked of
it, so any adapter with `prefill(ids, row_positions=...)` serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from keepset import ModelFingerprint
from keepset.calibrate.prompts import answer_loss
from keepset.eval import constructed, facts, vocabulary
from keepset.eval.small_model import Prefill, SmallModel
from keepset.in_process import QueryLayer

# Values of tensor `rows` of an observation_heads table.
LAST_ROW, MAX_ROWS, MEAN_ROWS, PROBE_MAX, PROBE_MEAN, KEY_NOVELTY = range(6)
ROWS_NAMES = ("last_row", "max_rows", "mean_rows", "probe_max", "probe_mean", "key_novelty")

Candidate = tuple[int, int, int]  # layer, head, rows


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one keep set: share of exact answers, most of them exact, mean loss of the answers' tokens."""

    share: float
    exact: bool
    loss: float
    predicted: str


@dataclasses.dataclass(frozen=True)
class HeadPrompt:
    """One prefill. row_positions [W] may end with rows of a probe, at positions from seq_len on.

    observe: the positions [begin, end) of the rows that observe. need [T]: attention of the full-cache
    continuation's queries, summed over layers and heads. The last `protect_window` and first
    `protect_sink` positions stay, for every method.
    """

    task: str
    prompt_id: str
    model: ModelFingerprint
    softmax_scale: float
    layers: tuple[QueryLayer, ...]
    row_positions: npt.NDArray[np.int64]
    observe: tuple[int, int]
    need: npt.NDArray[np.float32]
    protect_sink: int
    protect_window: int
    outcome: Callable[[list], Outcome]
    ppl: float
    probe: tuple[str, str] | None = None

    @property
    def seq_len(self) -> int:
        return int(self.layers[0].k.shape[1])

    def parameters(self, uses_probe: bool = False) -> dict[str, str]:
        """Policy parameters of observation_heads for this prompt."""
        chosen = {"observe": f"{self.observe[0]}:{self.observe[1]}"}
        if uses_probe and self.probe is not None:
            chosen["probe"] = self.probe[0]
        return chosen


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


def needed_mass(prefill: Prefill, seq_len: int, scale: float) -> np.ndarray:
    """Attention of all observed rows on positions below seq_len, summed over layers, heads and rows."""
    total = np.zeros(seq_len, np.float32)
    for layer in prefill.layers:
        tile = attention(layer.q_window, layer.k, prefill.row_positions, scale)
        total += tile.sum((0, 1))[:seq_len]
    return total


class SmallModelTasks:
    """Tasks that the small model can do with its full cache; `prompt(task, seed)` is deterministic.

    number: the question stands at the prompt's end. multi: two questions stand there, the second is
    answered first and the first is asked again. later: eight questions are asked after compression.
    """

    TASKS = ("number", "multi", "later")
    PROBE = ("recall", "pin ask")

    def __init__(self, model: SmallModel, *, text: str = "Apache-2.0", seq_len: int = 1024,
                 num_facts: int = 32, window: int = 16):
        self.model = model
        self.text = text
        self._words = vocabulary.read_text_words(vocabulary.COMMON_LICENSES / text)
        self._seq_len, self._num_facts, self._window = seq_len, num_facts, window
        self.fingerprint = ModelFingerprint(**model.fingerprint())

    def prompt(self, task: str, seed: int) -> HeadPrompt:
        rng = np.random.default_rng([seed, self.TASKS.index(task)])
        sample = facts.make_sample(rng, self._words, self._seq_len, self._num_facts)
        asked = [sample.facts[i] for i in rng.permutation(self._num_facts)[:8]]
        return getattr(self, f"_{task}")(f"{self.text}-{task}-{seed}", sample, asked)

    def whole_prefill(self, task: str, seed: int) -> Prefill:
        """The prompt's context with every row observed."""
        rng = np.random.default_rng([seed, self.TASKS.index(task)])
        sample = facts.make_sample(rng, self._words, self._seq_len, self._num_facts)
        return self.model.prefill(self._ids(sample.context), self._seq_len)

    def _ids(self, words: Sequence[str]) -> npt.NDArray[np.int32]:
        return self.model.tokenize(words)

    def _number(self, name: str, sample: facts.Sample, asked: list[facts.Fact]) -> HeadPrompt:
        return self._inside("number", name, sample, [asked[0]], [])

    def _multi(self, name: str, sample: facts.Sample, asked: list[facts.Fact]) -> HeadPrompt:
        return self._inside("multi", name, sample, [asked[1], asked[0]], [asked[1]])

    def _inside(self, task: str, name: str, sample: facts.Sample, questions: list[facts.Fact],
                again: list[facts.Fact]) -> HeadPrompt:
        """`questions` end the prompt; the last one is answered, then those of `again` are asked."""
        asked_words = sum((fact.question for fact in questions), ())
        ids = self._ids(sample.context + asked_words)
        seq_len, last = len(ids), len(ids) - 1
        rows = np.arange(seq_len - self._window, seq_len)
        prefill = self.model.prefill(ids, row_positions=rows)
        words = list(questions[-1].answer) + sum(([*fact.question, *fact.answer] for fact in again), [])
        # Teacher-forced: the token before each one is fed; only answers are judged.
        tokens = self._ids(words)
        judged = np.array([True, True] + [False, False, True, True] * len(again))
        longer = self.model.prefill(np.concatenate([ids, tokens[:-1]]),
                                    row_positions=np.arange(last, last + len(tokens)))
        fed = np.concatenate([ids[-1:], tokens[:-1]])[None]

        def outcome(keep: list) -> Outcome:
            logits = self.model.score_many(prefill.compact(keep).before(last), fed, last)
            return self._judge(logits[:, judged], tokens[judged][None])

        return self._prompt(task, name, prefill, (seq_len - len(asked_words), seq_len),
                            needed_mass(longer, seq_len, self._scale()), outcome)

    def _later(self, name: str, sample: facts.Sample, asked: list[facts.Fact]) -> HeadPrompt:
        ids = self._ids(sample.context)
        seq_len = len(ids)
        # Rows of the probe are read behind the context; its keys and values are dropped.
        probe = self._ids(self.PROBE[1].split())
        rows = np.concatenate([np.arange(seq_len - self._window, seq_len),
                               seq_len + np.arange(len(probe))])
        prefill = _cut(self.model.prefill(np.concatenate([ids, probe]), row_positions=rows), seq_len)
        fed = np.stack([self._ids(fact.question + fact.answer[:1]) for fact in asked])
        answers = np.stack([self._ids(fact.answer) for fact in asked])
        need = np.zeros(seq_len, np.float32)
        for one in fed[:4]:
            longer = self.model.prefill(np.concatenate([ids, one]),
                                        row_positions=seq_len + np.arange(len(one)))
            need += needed_mass(longer, seq_len, self._scale())

        def outcome(keep: list) -> Outcome:
            logits = self.model.score_many(prefill.compact(keep), fed, seq_len)
            return self._judge(logits[:, -facts.ANSWER_WORDS:], answers)

        return self._prompt("later", name, prefill, (seq_len - self._window, seq_len), need, outcome,
                            self.PROBE)

    def _judge(self, logits: np.ndarray, answers: np.ndarray) -> Outcome:
        best = logits.argmax(-1)
        predicted = "; ".join(" ".join(self.model.detokenize(one)) for one in best)
        share = float((best == answers).all(-1).mean())
        return Outcome(share, share > 0.5, answer_loss(logits, answers), predicted)

    def _scale(self) -> float:
        return self.model.config.softmax_scale

    def _prompt(self, task: str, name: str, prefill: Prefill, observe: tuple[int, int],
                need: np.ndarray, outcome: Callable[[list], Outcome],
                probe: tuple[str, str] | None = None) -> HeadPrompt:
        layers = tuple(QueryLayer(one.q_window, one.k, one.v) for one in prefill.layers)
        return HeadPrompt(task, name, self.fingerprint, self._scale(), layers, prefill.row_positions,
                          observe, need, 4, self._window, outcome,
                          prefill.perplexity(self._window), probe)


class ConstructedTasks:
    """Every fact of a constructed model is asked after the prompt."""

    TASKS = ("facts",)

    def __init__(self, model: constructed.ConstructedModel, *, seq_len: int = 2048,
                 num_facts: int = 32):
        self.model = model
        self._seq_len, self._num_facts = seq_len, num_facts
        self.fingerprint = ModelFingerprint(**model.fingerprint())

    def prompt(self, task: str, seed: int) -> HeadPrompt:
        made = self.model.make_facts(seed, self._seq_len, self._num_facts)
        prefill = self.model.prefill(made)
        seq_len = prefill.seq_len
        layers = tuple(QueryLayer(one.q_window, one.k, one.v) for one in prefill.layers)
        # What the questions attend to is known by construction: the values of the facts.
        need = np.zeros(seq_len, np.float32)
        for step in range(self.model.num_layers):
            need[made.key_positions + 1 + step] = 1

        def outcome(keep: list) -> Outcome:
            # Of one set per KV head the retrieval head's is what the answers come from.
            sets = [one if isinstance(one, np.ndarray) else one[self.model.retrieval_head(layer)]
                    for layer, one in enumerate(keep)]
            answers = self.model.answer(made, self.model.retrieval_cache(prefill, sets))
            share = float(answers.correct.mean())
            return Outcome(share, share > 0.5, answers.loss,
                           "".join("01"[int(one)] for one in answers.correct))

        return HeadPrompt(task, f"{self.model.name}-{seed}", self.fingerprint,
                          self.model.softmax_scale, layers,
                          np.arange(seq_len - constructed.WINDOW, seq_len),
                          (seq_len - constructed.WINDOW, seq_len), need, 0, 0, outcome, prefill.ppl)


def _cut(prefill: Prefill, seq_len: int) -> Prefill:
    """The prefill without the keys and values from seq_len on."""
    layers = tuple(
        dataclasses.replace(one, k=np.ascontiguousarray(one.k[:, :seq_len]),
                            v=np.ascontiguousarray(one.v[:, :seq_len])) for one in prefill.layers)
    return dataclasses.replace(prefill, input_ids=prefill.input_ids[:seq_len], layers=layers,
                               token_logprobs=prefill.token_logprobs[:seq_len])
