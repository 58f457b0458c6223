"""Runs the small model with numpy alone: prefill with what a retention service needs, and decode.

A Llama: RMSNorm, half-split RoPE, grouped-query attention, SwiGLU, no biases, untied head. Weights
are stored as f16 and widened once; everything is computed in fp32. A loaded model is immutable and
may be shared between threads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors

from keepset.eval.kv_cache import FloatArray, HeadCache, KeepSet, KvCache
from keepset.eval.vocabulary import Vocabulary

CHECKPOINT = pathlib.Path(__file__).parent / "data" / "small_model.safetensors"
CHECKPOINT_DIGEST = CHECKPOINT.with_suffix(".sha256")
METADATA_KEY = "keepset_small_model"
# Rows of one step of the attention; bounds the logits held at a time.
_BLOCK_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Config:
    num_layers: int
    hidden_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float

    @property
    def softmax_scale(self) -> float:
        return float(self.head_dim**-.5)


@dataclasses.dataclass(frozen=True)
class LayerObservation:
    """What one layer of a prefill shows; W observed rows, T tokens."""

    q_window: FloatArray  # [num_qo_heads, W, head_dim], post-RoPE
    k: FloatArray  # [num_kv_heads, T, head_dim], post-RoPE
    v: FloatArray  # [num_kv_heads, T, head_dim]
    window_lse: FloatArray  # [num_qo_heads, W], natural log of the sum of exp(scaled logits)


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Result of a prefill of T tokens."""

    input_ids: npt.NDArray[np.int32]  # [T]
    row_positions: npt.NDArray[np.int64]  # [W], ascending
    layers: tuple[LayerObservation, ...]
    token_logprobs: FloatArray  # [T], log p(token t | tokens before t); element 0 is NaN
    logits_last: FloatArray  # [vocab_size], after the last token

    @property
    def seq_len(self) -> int:
        return len(self.input_ids)

    @property
    def softmax_scale(self) -> float:
        return float(self.layers[0].k.shape[-1]**-.5)

    def perplexity(self, window: int) -> float:
        """Returns exp(-mean log p) over the last `window` tokens; the first token has no p."""
        if not 1 <= window < self.seq_len:
            raise ValueError(f"window={window}, want 1..{self.seq_len - 1}")
        return float(np.exp(-self.token_logprobs[-window:].mean(dtype=np.float64)))

    def full_cache(self) -> KvCache:
        """Returns a cache that holds every token."""
        return self.compact([np.arange(self.seq_len)] * len(self.layers))

    def compact(self, keep_sets: Sequence[KeepSet]) -> KvCache:
        """Returns a cache with the rows of keep_sets[l]: [n_l], or one [n_g] per KV head."""
        return KvCache.select(keep_sets, [layer.k for layer in self.layers],
                              [layer.v for layer in self.layers])


class SmallModel:
    """The shipped model, or any checkpoint that the training script wrote."""

    def __init__(self, config: Config, words: Vocabulary, weights: dict[str, FloatArray],
                 revision: str, document: dict[str, Any]) -> None:
        self.config = config
        self.words = words
        self.revision = revision
        self.document = document
        self._weights = weights

    @classmethod
    def load(cls, path: str | pathlib.Path | None = None) -> SmallModel:
        """Reads a checkpoint; without `path` the one of the package."""
        path = CHECKPOINT if path is None else pathlib.Path(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        with safetensors.safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            if METADATA_KEY not in metadata:
                raise ValueError(f"{path}: no {METADATA_KEY} in the metadata")
            weights = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}
        document = json.loads(metadata[METADATA_KEY])
        config = Config(**document["config"])
        # The digest of the file stands for the weights: what was learned about one training run
        # says nothing about the heads of another.
        revision = f"{document['revision']}-{digest[:12]}"
        return cls(config, Vocabulary(document["vocabulary"]), weights, revision, document)

    def fingerprint(self) -> dict[str, Any]:
        """Returns the model facts that captures, tables and requests carry."""
        return {
            "architecture": "llama",
            "num_layers": self.config.num_layers,
            "num_qo_heads": self.config.num_qo_heads,
            "num_kv_heads": self.config.num_kv_heads,
            "head_dim": self.config.head_dim,
            "rope": {"theta": self.config.rope_theta},
            "revision": self.revision,
        }

    def weights(self) -> Mapping[str, FloatArray]:
        """The fp32 weights, named as in Hugging Face's Llama; read only."""
        return types.MappingProxyType(self._weights)

    def tokenize(self, words: Iterable[str]) -> npt.NDArray[np.int32]:
        """Returns ids [num_words]; unknown words become `<unk>`."""
        return self.words.tokenize(words)

    def detokenize(self, ids: Iterable[int]) -> list[str]:
        return self.words.detokenize(ids)

    def prefill(self, input_ids: npt.ArrayLike, window: int = 64,
                row_positions: npt.ArrayLike | None = None) -> Prefill:
        """Reads a prompt of ids [T] and observes its last min(window, T) rows, or the given rows.

        `row_positions` are ascending positions below T and win over `window`.
        """
        ids = np.asarray(input_ids, np.int32)
        if ids.ndim != 1 or not len(ids):
            raise ValueError(f"input_ids {list(ids.shape)}, want [T] with T >= 1")
        if row_positions is None:
            if window < 1:
                raise ValueError(f"window={window}, want at least 1")
            rows = np.arange(max(0, len(ids) - window), len(ids))
        else:
            rows = np.asarray(row_positions, np.int64)
            if rows.ndim != 1 or not len(rows) or np.any(np.diff(rows) <= 0) or (
                    rows[0] < 0 or rows[-1] >= len(ids)):
                raise ValueError(f"row_positions: want ascending positions in 0..{len(ids) - 1}")
        x = self._embed(ids)
        positions = np.arange(len(ids))
        layers = []
        for layer in range(self.config.num_layers):
            q, k, v = self._project(layer, x, positions)
            attention, lse = self._causal_attention(q, k, v)
            x = self._finish_layer(layer, x, attention)
            layers.append(
                LayerObservation(np.ascontiguousarray(q[:, rows]), k, v,
                                 np.ascontiguousarray(lse[:, rows])))
        logits = self._logits(x)
        logprobs = np.full(len(ids), np.nan, np.float32)
        before = logits[:-1]
        logprobs[1:] = before[np.arange(len(ids) - 1), ids[1:]] - _log_sum_exp(before)
        return Prefill(ids, rows, tuple(layers), logprobs, logits[-1].copy())

    def decode(self, cache: KvCache, input_ids: npt.ArrayLike, position: int,
               num_new_tokens: int) -> list[int]:
        """Feeds ids [n] at position, position + 1, ... through `cache`, then decodes greedily.

        `position` is counted in the original prompt (T after a prompt of T tokens), however few
        tokens the cache holds, and lies above every position in it. The ids are fed one by one.
        Returns the `num_new_tokens` most likely ids, each fed back before the next.
        """
        fed = [int(token) for token in np.asarray(input_ids).reshape(-1)]
        if not fed or num_new_tokens < 1:
            raise ValueError(f"{len(fed)} input ids, num_new_tokens={num_new_tokens}, want at "
                             "least 1 each")
        decoder = _Decoder(self, cache, position, len(fed) + num_new_tokens)
        for token in fed:
            logits = decoder.feed(token)
        new = [int(logits.argmax())]
        while len(new) < num_new_tokens:
            new.append(int(decoder.feed(new[-1]).argmax()))
        return new

    def score(self, cache: KvCache, input_ids: npt.ArrayLike, position: int) -> FloatArray:
        """Feeds ids [n] as `decode` does and returns the logits after each [n, vocab_size]."""
        fed = [int(token) for token in np.asarray(input_ids).reshape(-1)]
        decoder = _Decoder(self, cache, position, len(fed))
        return np.stack([decoder.feed(token) for token in fed])

    def score_many(self, cache: KvCache, input_ids: npt.ArrayLike, position: int) -> FloatArray:
        """Scores continuations ids [num, n] of the same cache, each on its own, in one pass.

        Row [i] of the result [num, n, vocab_size] is what `score` returns for ids [i].
        """
        ids = np.asarray(input_ids, np.int32)
        if ids.ndim != 2 or not ids.size:
            raise ValueError(f"input_ids {list(ids.shape)}, want [num, n] with both >= 1")
        num, length = ids.shape
        group = self.config.num_qo_heads // self.config.num_kv_heads
        future = np.triu(np.ones((length, length), bool), 1)
        positions = np.tile(position + np.arange(length), num)
        x = self._embed(ids.reshape(-1))
        for layer, heads in enumerate(cache.layers):
            q, k, v = self._project(layer, x, positions)
            q *= self.config.softmax_scale
            attention = np.empty_like(q)
            for head in range(self.config.num_qo_heads):
                kv_head = head // group
                kept = heads[kv_head]
                past = q[head] @ kept.k.T
                own_q, own_k, own_v = (one.reshape(num, length, -1)
                                       for one in (q[head], k[kv_head], v[kv_head]))
                own = own_q @ own_k.transpose(0, 2, 1)
                own[:, future] = -np.inf
                logits = np.concatenate([past, own.reshape(num * length, length)], 1)
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                own_weights = weights[:, len(kept.positions):].reshape(num, length, length)
                attention[head] = weights[:, :len(kept.positions)] @ kept.v + (
                    own_weights @ own_v).reshape(num * length, -1)
            x = self._finish_layer(layer, x, attention)
        return self._logits(x).reshape(num, length, -1)

    def score_caches(self, caches: Sequence[KvCache], input_ids: npt.ArrayLike, position: int, last: int
                     ) -> Iterator[FloatArray]:
        """For each cache in turn the last `last` rows of what `score_many` returns."""
        for cache in caches:
            yield self.score_many(cache, input_ids, position)[:, -last:]

    def observe_after(self, prefill: Prefill, input_ids: npt.ArrayLike, position: int
                      ) -> tuple[LayerObservation, ...]:
        """What a prefill of the prompt's tokens before `position` and ids [n] shows of the last n rows."""
        ids = np.concatenate([prefill.input_ids[:position], np.asarray(input_ids, np.int32)])
        return self.prefill(ids, row_positions=np.arange(position, len(ids))).layers

    def queries(self, input_ids: npt.ArrayLike) -> list[FloatArray]:
        """Of every token of a prompt [T], per layer [num_qo_heads, T, head_dim]."""
        ids = np.asarray(input_ids, np.int32)
        return [one.q_window for one in self.prefill(ids, row_positions=np.arange(len(ids))).layers]

    def _embed(self, ids: npt.NDArray[np.integer]) -> FloatArray:
        rows: FloatArray = self._weights["model.embed_tokens.weight"][ids]
        return rows

    def _norm(self, name: str, x: FloatArray) -> FloatArray:
        scale = 1 / np.sqrt(np.square(x).mean(-1, keepdims=True) + self.config.rms_norm_eps)
        scaled: FloatArray = x * scale * self._weights[name]
        return scaled

    def _linear(self, layer: int, name: str, x: FloatArray) -> FloatArray:
        return x @ self._weights[f"model.layers.{layer}.{name}.weight"].T

    def _project(self, layer: int, x: FloatArray, positions: npt.NDArray[np.integer]
                 ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Returns q, k (post-RoPE) and v [heads, rows, head_dim] for x [rows, hidden_size]."""
        normed = self._norm(f"model.layers.{layer}.input_layernorm.weight", x)
        half = self.config.head_dim // 2
        frequencies = self.config.rope_theta**(-np.arange(half, dtype=np.float64) / half)
        angles = positions[:, None] * frequencies
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

        def heads(name: str) -> FloatArray:
            out = self._linear(layer, f"self_attn.{name}", normed)
            return np.ascontiguousarray(
                out.reshape(len(x), -1, self.config.head_dim).transpose(1, 0, 2))

        def rotate(y: FloatArray) -> FloatArray:
            first, second = y[..., :half], y[..., half:]
            return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

        return rotate(heads("q_proj")), rotate(heads("k_proj")), heads("v_proj")

    def _causal_attention(self, q: FloatArray, k: FloatArray,
                          v: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Returns the output [num_qo_heads, T, head_dim] and the LSE [num_qo_heads, T]."""
        group = self.config.num_qo_heads // self.config.num_kv_heads
        out = np.empty_like(q)
        lse = np.empty(q.shape[:2], np.float32)
        for begin in range(0, q.shape[1], _BLOCK_ROWS):
            end = min(begin + _BLOCK_ROWS, q.shape[1])
            future = np.triu(np.ones((end - begin, end - begin), bool), 1)
            for head in range(self.config.num_qo_heads):
                logits = (q[head, begin:end] * self.config.softmax_scale) @ k[head // group, :end].T
                logits[:, begin:][future] = -np.inf
                top = logits.max(-1, keepdims=True)
                np.exp(np.subtract(logits, top, out=logits), out=logits)
                total = logits.sum(-1, keepdims=True)
                out[head, begin:end] = logits @ v[head // group, :end] / total
                lse[head, begin:end] = (top + np.log(total))[:, 0]
        return out, lse

    def _finish_layer(self, layer: int, x: FloatArray, attention: FloatArray) -> FloatArray:
        """Adds attention [num_qo_heads, rows, head_dim] and the feed-forward part to x."""
        merged = attention.transpose(1, 0, 2).reshape(len(x), -1)
        x = x + self._linear(layer, "self_attn.o_proj", merged)
        normed = self._norm(f"model.layers.{layer}.post_attention_layernorm.weight", x)
        gate = self._linear(layer, "mlp.gate_proj", normed)
        gated = gate / (1 + np.exp(-gate)) * self._linear(layer, "mlp.up_proj", normed)
        return x + self._linear(layer, "mlp.down_proj", gated)

    def _logits(self, x: FloatArray) -> FloatArray:
        return self._norm("model.norm.weight", x) @ self._weights["lm_head.weight"].T


class _Decoder:
    """Feeds tokens one by one through a private copy of a cache."""

    def __init__(self, model: SmallModel, cache: KvCache, position: int, max_tokens: int) -> None:
        if len(cache.layers) != model.config.num_layers:
            raise ValueError(f"cache of {len(cache.layers)} layers, want "
                             f"{model.config.num_layers}")
        self._model = model
        self._position = position
        self._layers = [[_GrowingHead(head, position, max_tokens) for head in heads]
                        for heads in cache.layers]

    def feed(self, token: int) -> FloatArray:
        """Returns the logits [vocab_size] after `token`."""
        model, config = self._model, self._model.config
        group = config.num_qo_heads // config.num_kv_heads
        x = model._embed(np.asarray([token]))
        for layer, heads in enumerate(self._layers):
            q, k, v = model._project(layer, x, np.asarray([self._position]))
            attention = []
            for index, head in enumerate(heads):
                head.append(k[index, 0], v[index, 0])
                logits = q[index * group:(index + 1) * group, 0] @ head.k.T
                logits *= config.softmax_scale
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                attention.append(weights @ head.v / weights.sum(-1, keepdims=True))
            x = model._finish_layer(layer, x, np.concatenate(attention)[:, None])
        self._position += 1
        return np.asarray(model._logits(x)[0])


class _GrowingHead:
    """A copy of one KV head with room for the tokens that are fed."""

    def __init__(self, head: HeadCache, position: int, room: int) -> None:
        if len(head.positions) and head.positions[-1] >= position:
            raise ValueError(f"position={position}, want more than {head.positions[-1]}, the last "
                             "position in the cache")
        empty = np.empty((room, head.k.shape[1]), np.float32)
        self._k = np.concatenate([head.k, empty])
        self._v = np.concatenate([head.v, empty])
        self._count = len(head.positions)

    def append(self, k: FloatArray, v: FloatArray) -> None:
        self._k[self._count] = k
        self._v[self._count] = v
        self._count += 1

    @property
    def k(self) -> FloatArray:
        return self._k[:self._count]

    @property
    def v(self) -> FloatArray:
        return self._v[:self._count]


def _log_sum_exp(logits: FloatArray) -> FloatArray:
    """Returns [rows] for logits [rows, n]."""
    top = logits.max(-1, keepdims=True)
    lse: FloatArray = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[:, 0]
    return lse
