"""Policies that the engine does not have, in numpy, for comparison alone: KeyDiff and Expected Attention
(kvpress' definitions), budgets by retrieval head as HeadKV (arXiv:2410.19258) has them, and retrieval heads
in full beside streaming ones as in DuoAttention (arXiv:2410.10819) and RazorAttention (arXiv:2407.15891),
each with one set per KV head."""

from __future__ import annotations

import functools
import hashlib
import pathlib
from collections.abc import Iterable

import numpy as np
import safetensors.numpy

from keepset import ModelFingerprint
from keepset.calibrate.head_prompts import MEAN_ROWS, HeadPrompt, attention, key_novelty

# Of a head's budget, the share that every head has; the rest goes to the heads that retrieve.
_EQUAL_SHARE = 0.5


def cut(scores: np.ndarray, budget: int, prompt: HeadPrompt) -> np.ndarray:
    """Ascending positions: protected ones first, then the best of scores [T], ties to the lower."""
    order = np.lexsort((np.arange(len(scores)), -scores))
    is_protected = np.zeros(len(scores), bool)
    is_protected[: prompt.protect_sink] = True
    if prompt.protect_window:
        is_protected[-prompt.protect_window :] = True
    rest = order[~is_protected[order]][: budget - int(is_protected.sum())]
    return np.sort(np.concatenate([np.flatnonzero(is_protected), rest])).astype(np.int64)


def keydiff(prompt: HeadPrompt, budget: int) -> list[list[np.ndarray]]:
    """Keys far from the mean direction of their head stay."""
    return [[cut(head, budget, prompt) for head in key_novelty(layer.k)] for layer in prompt.layers]


@functools.lru_cache(maxsize=1)
def _expected(prompt: HeadPrompt, num_sinks: int, num_future: int) -> list[np.ndarray]:
    """Per layer [Hkv, T]: exp of the expected logit of a future query, times the value's norm."""
    if prompt.queries is None or set(prompt.model.rope) != {"theta"}:
        raise ValueError(f"rope {prompt.model.rope}, want queries of every row and plain rope")
    queries, rope_theta = prompt.queries(), prompt.model.rope["theta"]
    out = []
    seq_len = prompt.seq_len
    half = queries[0].shape[-1] // 2
    frequencies = rope_theta ** (-np.arange(half) / half)
    back = -np.arange(seq_len)[:, None] * frequencies
    ahead = (seq_len + np.arange(num_future))[:, None] * frequencies
    cos, sin = np.cos(ahead).mean(0), np.sin(ahead).mean(0)
    turn = np.block([[np.diag(cos), -np.diag(sin)], [np.diag(sin), np.diag(cos)]])
    scale = prompt.softmax_scale
    for q, layer in zip(queries, prompt.layers):
        group = len(q) // len(layer.k)
        first, second = q[..., :half], q[..., half:]
        plain = np.concatenate([first * np.cos(back) - second * np.sin(back),
                                second * np.cos(back) + first * np.sin(back)], -1)[:, num_sinks:]
        scores = np.zeros(layer.k.shape[:2])
        for head, one in enumerate(plain.astype(np.float64)):
            mean = one.mean(0)
            centred = one - mean
            covariance = turn @ (centred.T @ centred / len(one)) @ turn.T
            k = layer.k[head // group].astype(np.float64)
            logits = scale * k @ (turn @ mean) + scale**2 / 2 * np.einsum(
                "td,de,te->t", k, covariance, k)
            weights = np.exp(logits[num_sinks:] - logits[num_sinks:].max())
            scores[head // group, num_sinks:] += weights / weights.sum() / group
        scores *= np.linalg.norm(layer.v, axis=-1)
        scores[:, :num_sinks] = scores.max() + 1
        out.append(scores)
    return out


def expected_attention(prompt: HeadPrompt, budget: int, num_sinks: int = 4, num_future: int = 512
                       ) -> list[list[np.ndarray]]:
    """Positions that the queries of the next `num_future` positions are expected to attend to.

    They are taken to be normal, with mean and covariance of the prompt's own queries turned back by
    RoPE, and the mean rotation of the positions to come.
    """
    return [[cut(one, budget, prompt) for one in scores]
            for scores in _expected(prompt, num_sinks, num_future)]


def retrieval_scores(records: Iterable[pathlib.Path], model: ModelFingerprint) -> np.ndarray:
    """[L, Hkv]: the attention that the observing rows of a KV head's query heads have on what observation
    records say was needed; sums to 1."""
    found = np.zeros((model.num_layers, model.num_kv_heads))
    group = model.num_qo_heads // model.num_kv_heads
    for path in records:
        record = safetensors.numpy.load_file(path)
        need = record["need"] / record["need"].sum()
        for (layer, head), way, scores in zip(record["heads"], record["rows"], record["scores"]):
            if way == MEAN_ROWS:
                found[layer, head // group] += float(scores.astype(np.float32) @ need)
    return found / found.sum()


class HeadBudgets:
    """SnapKV's window scores under budgets of each KV head's own; their mean is the budget asked for.

    scores: of retrieval_scores.
    """

    def __init__(self, scores: np.ndarray):
        self._shares = scores
        self.identity = hashlib.sha256(scores.tobytes()).hexdigest()

    def __call__(self, prompt: HeadPrompt, budget: int) -> list[list[np.ndarray]]:
        protected = prompt.protect_sink + prompt.protect_window
        free = budget - protected
        own = free * (_EQUAL_SHARE + (1 - _EQUAL_SHARE) * self._shares * self._shares.size)
        counts = protected + np.floor(own + 1e-9).astype(int)
        return [[cut(scores, min(int(count), prompt.seq_len), prompt)
                 for scores, count in zip(of_layer, of_heads)]
                for of_layer, of_heads in zip(_window_scores(prompt), counts)]


def echo_and_induction(repetition: HeadPrompt, length: int) -> np.ndarray:
    """[L, Hkv]: attention of the last repetition's rows on the same token (echo) or the one after it
    (induction) in earlier repetitions, the larger of both; of a KV head its best query head."""
    rows = np.asarray(repetition.row_positions)[-length:]
    out = []
    for layer in repetition.layers:
        tile = attention(layer.q_window[:, -length:], layer.k, rows, repetition.softmax_scale)
        by_offset = [sum(np.take_along_axis(tile, (rows - back + offset)[None, :, None], 2)
                         for back in range(length, rows[0] + 1, length)).mean((1, 2))
                     for offset in (0, 1)]
        out.append(np.maximum(*by_offset).reshape(len(layer.k), -1).max(1))
    return np.stack(out)


class StreamingHeads:
    """The best heads by `scores` [L, Hkv] keep every position, as many as the bytes of the budget allow
    while every other head has what is protected; what is left is theirs, as equally many more of the last
    positions.

    DuoAttention learns a gate per head by training and RazorAttention adds to the other heads a token that
    stands for what they dropped: neither is done here.
    """

    def __init__(self, scores: np.ndarray):
        self._order = np.argsort(-scores, axis=None, kind="stable")
        self._shape = scores.shape
        self.identity = hashlib.sha256(scores.tobytes()).hexdigest()

    def __call__(self, prompt: HeadPrompt, budget: int) -> list[list[np.ndarray]]:
        protected = prompt.protect_sink + prompt.protect_window
        rest, whole = (budget - protected) * self._order.size, prompt.seq_len - protected
        full = min(rest // whole, self._order.size - 1)
        is_full = np.zeros(self._shape, bool)
        is_full.flat[self._order[:full]] = True
        recent = prompt.protect_window + (rest - full * whole) // (self._order.size - full)
        everything = np.arange(prompt.seq_len)
        streaming = np.concatenate([everything[: prompt.protect_sink],
                                    everything[prompt.seq_len - recent :]])
        return [[everything if one else streaming for one in layer] for layer in is_full]


@functools.lru_cache(maxsize=1)
def _window_scores(prompt: HeadPrompt) -> list[np.ndarray]:
    """Per layer [Hkv, T]: attention of the last rows, averaged over them and the group, pooled by 5."""
    rows = np.asarray(prompt.row_positions)
    used = (rows < prompt.seq_len) & (rows >= prompt.seq_len - prompt.window)
    out = []
    for layer in prompt.layers:
        tile = attention(layer.q_window[:, used], layer.k, rows[used], prompt.softmax_scale).mean(1)
        scores = tile.reshape(len(layer.k), -1, tile.shape[-1]).mean(1)
        out.append(np.stack([np.convolve(one, np.full(5, 0.2), "same") for one in scores]))
    return out
