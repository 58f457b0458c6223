"""Runs a Hugging Face causal LM: prefill with what a retention service needs, and decode from what was
kept. The same methods as the small model's runner (keepset.eval.small_model), so tasks take either."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from keepset.adapters.hf.attention import KEYWORD, Interposer, interposed
from keepset.adapters.hf.cache import (
    CompactedAttention,
    HfCache,
    KeepSet,
    full_attention_layers,
    layer_groups,
    whole_numbers,
)
from keepset.eval.kv_cache import FloatArray
from keepset.eval.small_model import LayerObservation
from keepset.types import BFLOAT16, InputNeeds, Layer

# Continuations that are scored in one pass; each holds a copy of the cache.
_BATCH = 8
# Tokens of several caches in one pass: enough for matrix products at full speed.
_BATCH_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class HfPrefill:
    """Result of a prefill of T tokens. Layers are the model's full-attention layers, L of them.

    needs: what of it was observed; None: every layer.
    """

    input_ids: npt.NDArray[np.int32]  # [T]
    row_positions: npt.NDArray[np.int64]  # [W], ascending; from T on those of a probe
    token_logprobs: FloatArray  # [T], log p(token t | tokens before t); NaN where it was not computed
    logits_last: FloatArray  # [vocab_size], after the last token
    softmax_scale: float
    cache: HfCache  # holds every token
    # Per layer [heads, W, head_dim], after RoPE; None where the needs list no queries.
    q_windows: tuple[torch.Tensor | None, ...]
    needs: InputNeeds | None = None

    @property
    def seq_len(self) -> int:
        return len(self.input_ids)

    @functools.cached_property
    def layers(self) -> tuple[LayerObservation, ...]:
        """What each of the L layers shows, fp32; shares the cache's memory where that is fp32 in
        ordinary memory."""
        if self.needs is not None:
            raise ValueError("layers: the prefill observed what its needs list, want a prefill without "
                             "needs")
        return tuple(self._observation(index, q) for index, q in
                     zip(self.cache.compacted_layers, self.q_windows))

    @property
    def kv_dtype(self) -> str:
        """Of `inputs`."""
        dtype = self.cache.layers[self.cache.compacted_layers[0]].keys.dtype
        return {torch.bfloat16: BFLOAT16, torch.float16: "float16"}.get(dtype, "float32")

    def inputs(self, gather: bool = False) -> dict[int, Layer]:
        """What an operation on this prompt brings, by layer, in the model's own type; shares the cache's
        memory where that is ordinary memory.

        The tensors that `needs` list; without needs queries, keys and values of every layer. gather: K
        and V of every layer too, for a service that moves their rows; `compact` moves them here.
        """
        listed = None if self.needs is None else {one.layer: one for one in self.needs.layers}
        found = {}
        for index, (number, q) in enumerate(zip(self.cache.compacted_layers, self.q_windows)):
            one = None if listed is None else listed.get(index)
            if listed is not None and one is None and not gather:
                continue
            held = self.cache.layers[number]
            keys = gather or one is None or one.keys
            values = gather or one is None or one.values
            found[index] = Layer(
                q_window=None if q is None else _bits(q), k=_bits(held.keys[0]) if keys else None,
                v=_bits(held.values[0]) if values else None, dtype=self.kv_dtype,
                qo_heads=one.qo_heads or None if one is not None and q is not None else None)
        return found

    def perplexity(self, window: int) -> float:
        """Returns exp(-mean log p) over the last `window` tokens."""
        known = int(np.isfinite(self.token_logprobs).sum())
        if not 1 <= window <= known:
            raise ValueError(f"window={window}, want 1..{known}")
        return float(np.exp(-self.token_logprobs[-window:].mean(dtype=np.float64)))

    def full_cache(self) -> HfCache:
        return self.cache

    def compact(self, keep_sets: Sequence[KeepSet]) -> HfCache:
        """Returns a cache with the positions of keep_sets[l]: [n_l], or one [n_g] per KV head."""
        return self.cache.compact(keep_sets)

    def _observation(self, layer_index: int, q: torch.Tensor) -> LayerObservation:
        layer = self.cache.layers[layer_index]
        return _observation(q, layer.keys[0], layer.values[0], self.row_positions, self.softmax_scale)


def _bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """float32, float16, or uint16 bits of bfloat16; the last axis contiguous."""
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        tensor = tensor.float()
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).cpu().numpy().view(np.uint16)
    return tensor.cpu().numpy()


class HfModel:
    """A causal LM in evaluation mode; use from one thread.

    The model is changed only inside a call of this class: see keepset.adapters.hf.attention.
    """

    def __init__(self, model: PreTrainedModel, revision: str) -> None:
        """revision: stands for the weights in fingerprints."""
        if model.training:
            raise ValueError("the model is in training mode: call model.eval() first")
        self.model = model
        self.revision = revision
        self.full_layers = full_attention_layers(model.config)
        self.layer_groups = layer_groups(model.config)  # for requests: which layers are left out

    @classmethod
    def load(cls, directory: str | pathlib.Path, *, dtype: torch.dtype | str = "auto",
             attn_implementation: str = "sdpa", device: str = "cpu") -> HfModel:
        """Reads a model directory (config.json and safetensors files); nothing is downloaded."""
        path = pathlib.Path(directory)
        return cls(
            AutoModelForCausalLM.from_pretrained(
                path, local_files_only=True, use_safetensors=True, dtype=dtype,
                attn_implementation=attn_implementation).to(device).eval(), revision_of(path))

    def fingerprint(self) -> dict[str, Any]:
        """Returns the model facts that captures, tables and requests carry.

        num_layers counts the layers with full attention: those that Keepset sees.
        """
        return fingerprint_of(self.model.config, self.revision)

    @torch.no_grad()
    def prefill(self, input_ids: npt.ArrayLike, window: int = 64,
                row_positions: npt.ArrayLike | None = None, needs: InputNeeds | None = None
                ) -> HfPrefill:
        """Reads a prompt of ids [T] and observes its last min(window, T) rows, or the given rows.

        `row_positions` are ascending positions below T and win over `window`. Log-probabilities are
        those of the last W tokens, W the number of observed rows. needs: only the layers, heads and rows
        that it lists are observed; rows of its probe are `with_probe`'s.
        """
        ids = whole_numbers(input_ids, np.int32, "input_ids")
        if ids.ndim != 1 or not len(ids):
            raise ValueError(f"input_ids {list(ids.shape)}, want [T] with T >= 1")
        rows = _rows_read(_rows(len(ids), window, row_positions), needs)
        cache = DynamicCache(config=self.model.config)
        observer = self._observer(rows, needs)
        with self._running(observer):
            logits = self._forward(ids[None], cache, 0, observer, logits_to_keep=len(rows) + 1)[0]
        logprobs = np.full(len(ids), np.nan, np.float32)
        told = logits[:-1].log_softmax(-1)
        known = torch.as_tensor(ids[len(ids) - len(told):], device=told.device).long()
        logprobs[len(ids) - len(told):] = told.gather(1, known[:, None])[:, 0].cpu().numpy()
        return HfPrefill(ids, rows, logprobs, logits[-1].cpu().numpy(), observer.softmax_scale(),
                         HfCache.of_prefill(cache, len(ids)), observer.q_windows(), needs)

    @torch.no_grad()
    def with_probe(self, prefill: HfPrefill, probe_ids: npt.ArrayLike) -> HfPrefill:
        """The prefill with the rows of a probe: what ids [n] after the prompt see of it.

        They stand at T, T + 1, ...; their keys and values are dropped.
        """
        ids = whole_numbers(probe_ids, np.int32, "probe_ids").reshape(1, -1)
        if not ids.size:
            raise ValueError("probe_ids: none, want at least one")
        with self._decoding(prefill.full_cache(), prefill.seq_len) as (fork, attention):
            observer = self._observer(np.arange(ids.size), prefill.needs, attention)
            self._forward(ids, fork, prefill.seq_len, observer, 1)
        q_windows = tuple(
            None if of_prompt is None or of_probe is None else torch.cat([of_prompt, of_probe], 1)
            for of_prompt, of_probe in zip(prefill.q_windows, observer.q_windows()))
        rows = np.concatenate([prefill.row_positions, prefill.seq_len + np.arange(ids.size)])
        return dataclasses.replace(prefill, row_positions=rows, q_windows=q_windows)

    @torch.no_grad()
    def decode(self, cache: HfCache, input_ids: npt.ArrayLike, position: int,
               num_new_tokens: int) -> list[int]:
        """Feeds ids [n] at position, position + 1, ... through `cache`, then decodes greedily.

        `position` is counted in the original prompt (T after a prompt of T tokens), however few tokens
        the cache holds. Returns the `num_new_tokens` most likely ids, each fed back before the next.
        """
        fed = whole_numbers(input_ids, np.int32, "input_ids").reshape(1, -1)
        if not fed.size or num_new_tokens < 1:
            raise ValueError(f"{fed.size} input ids, num_new_tokens={num_new_tokens}, want at least 1 "
                             "each")
        new: list[int] = []
        with self._decoding(cache, position) as (fork, attention):
            while True:
                logits = self._forward(fed, fork, position, attention, logits_to_keep=1)
                new.append(int(logits[0, -1].argmax()))
                if len(new) == num_new_tokens:
                    return new
                position += fed.shape[1]
                fed = np.asarray([[new[-1]]], np.int32)

    def score(self, cache: HfCache, input_ids: npt.ArrayLike, position: int) -> FloatArray:
        """Feeds ids [n] as `decode` does and returns the logits after each [n, vocab_size]."""
        return self.score_many(cache, np.asarray(input_ids).reshape(1, -1), position)[0]

    @torch.no_grad()
    def score_many(self, cache: HfCache, input_ids: npt.ArrayLike, position: int) -> FloatArray:
        """Scores continuations ids [num, n] of the same cache, each on its own.

        Row [i] of the result [num, n, vocab_size] is what `score` returns for ids [i].
        """
        ids = whole_numbers(input_ids, np.int32, "input_ids")
        if ids.ndim != 2 or not ids.size:
            raise ValueError(f"input_ids {list(ids.shape)}, want [num, n] with both >= 1")
        out = []
        for begin in range(0, len(ids), _BATCH):
            batch = ids[begin : begin + _BATCH]
            with self._decoding(cache, position, len(batch)) as (fork, attention):
                out.append(self._forward(batch, fork, position, attention).cpu().numpy())
        return np.concatenate(out)

    @torch.no_grad()
    def score_caches(self, caches: Sequence[HfCache], input_ids: npt.ArrayLike, position: int,
                     last: int) -> Iterator[FloatArray]:
        """For each cache in turn what `score_many` returns for ids [num, n], its last `last` rows alone
        [num, last, vocab_size].

        The caches are of one prefill, compacted and cut (`HfCache.before`) alike; many go through the
        model together.
        """
        ids = whole_numbers(input_ids, np.int32, "input_ids")
        if ids.ndim != 2 or not ids.size or not 1 <= last <= ids.shape[1]:
            raise ValueError(f"input_ids {list(ids.shape)}, last={last}, want [num, n] with both >= 1 "
                             "and last in 1..n")
        at_once = max(1, _BATCH_TOKENS // ids.size)
        for begin in range(0, len(caches), at_once):
            part = caches[begin : begin + at_once]
            self._check_position(part[0], position)
            fork = HfCache.fork_of(part, len(ids))
            attention = CompactedAttention(fork, self.model.config._attn_implementation)
            with self._running(attention):
                logits = self._forward(np.tile(ids, (len(part), 1)), fork, position, attention, last)
            yield from logits.reshape(len(part), *ids.shape[:1], last, -1).cpu().numpy()

    @torch.no_grad()
    def observe_after(self, prefill: HfPrefill, input_ids: npt.ArrayLike, position: int
                      ) -> tuple[LayerObservation, ...]:
        """What a prefill of the prompt's tokens before `position` and ids [n] shows of the last n rows.

        Only the ids are computed. The prefill holds every token; a sliding-window layer may have
        dropped what is needed, which is refused.
        """
        ids = whole_numbers(input_ids, np.int32, "input_ids").reshape(1, -1)
        with self._decoding(prefill.full_cache().before(position), position) as (fork, attention):
            observer = self._observer(np.arange(ids.size), None, attention)
            self._forward(ids, fork, position, observer, 1)
        positions = np.arange(position, position + ids.size)
        return tuple(
            _observation(q, fork.layers[index].keys[0], fork.layers[index].values[0], positions,
                         prefill.softmax_scale)
            for index, q in zip(self.full_layers, observer.q_windows()))

    @torch.no_grad()
    def queries(self, input_ids: npt.ArrayLike) -> list[FloatArray]:
        """Of every token of a prompt [T], per full-attention layer [num_qo_heads, T, head_dim], fp32."""
        ids = whole_numbers(input_ids, np.int32, "input_ids").reshape(1, -1)
        observer = self._observer(np.arange(ids.size))
        with self._running(observer):
            self._forward(ids, DynamicCache(config=self.model.config), 0, observer, 1)
        return [one.float().cpu().numpy() for one in observer.q_windows() if one is not None]

    def _observer(self, rows: npt.NDArray[np.int64], needs: InputNeeds | None = None,
                  masks: Interposer | None = None) -> _Observer:
        heads: dict[int, tuple[int, ...]] = dict.fromkeys(self.full_layers, ())
        if needs is not None:
            beyond = [one.layer for one in needs.layers if one.layer >= len(self.full_layers)]
            if beyond:
                raise ValueError(f"needs of layers {beyond}, want 0..{len(self.full_layers) - 1}: those of "
                                 "another model")
            heads = {self.full_layers[one.layer]: one.qo_heads for one in needs.layers if one.queries}
        return _Observer(self.full_layers, heads, torch.as_tensor(rows, device=self.model.device), masks)

    @contextlib.contextmanager
    def _decoding(self, cache: HfCache, position: int, batch: int = 1
                  ) -> Iterator[tuple[Cache, CompactedAttention]]:
        self._check_position(cache, position)
        fork = cache.fork(batch)
        attention = CompactedAttention(fork, self.model.config._attn_implementation)
        with self._running(attention):
            yield fork, attention

    @staticmethod
    def _check_position(cache: HfCache, position: int) -> None:
        if position != cache.next_position:
            raise ValueError(f"position={position}, want {cache.next_position}: what follows the cache")

    @contextlib.contextmanager
    def _running(self, interposer: Interposer) -> Iterator[None]:
        if self.model.training:
            raise ValueError("the model is in training mode: call model.eval() first")
        with interposed(self.model):
            yield

    def _forward(self, ids: npt.NDArray[np.int32], cache: Cache, position: int,
                 interposer: Interposer, logits_to_keep: int = 0) -> torch.Tensor:
        """Logits [batch, n or the last logits_to_keep, vocab_size], fp32, after ids [batch, n]."""
        positions = torch.arange(position, position + ids.shape[1], device=self.model.device)
        found = self.model(
            input_ids=torch.as_tensor(ids, dtype=torch.long, device=self.model.device),
            position_ids=positions.expand(len(ids), -1), past_key_values=cache, use_cache=True,
            logits_to_keep=logits_to_keep, **{KEYWORD: interposer})
        return found.logits.float()


def _observation(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row_positions: npt.NDArray[np.int64],
                 scale: float) -> LayerObservation:
    """Of rows q [H, n, d] over every position's k and v [Hkv, T, d]."""
    q, k, v = (one.float() for one in (q, k, v))
    rows = torch.as_tensor(row_positions, device=q.device)
    future = torch.arange(k.shape[1], device=q.device) > rows[:, None]
    group = len(q) // len(k)
    lse = torch.stack([
        (scale * (one @ k[head // group].T)).masked_fill(future, -torch.inf).logsumexp(-1)
        for head, one in enumerate(q)])
    return LayerObservation(*(one.cpu().numpy() for one in (q, k, v, lse)))


class _Observer:
    """Keeps the queries of some rows of a pass; an Interposer.

    layers: those with full attention. heads: which of each layer that is observed; empty: all.
    masks: who says what the rows see, None for the model itself.
    """

    def __init__(self, layers: Sequence[int], heads: Mapping[int, Sequence[int]], rows: torch.Tensor,
                 masks: Interposer | None = None):
        self._layers = tuple(layers)
        self._heads = heads
        self._rows = rows
        self._masks = masks
        self._found: dict[int, torch.Tensor] = {}
        self._scales: dict[int, float] = {}

    def attend(self, layer_index: int, query: torch.Tensor, key: torch.Tensor,
               mask: torch.Tensor | None, scaling: float) -> torch.Tensor | None:
        if layer_index in self._layers:
            self._scales[layer_index] = float(scaling)
        if layer_index in self._heads:
            heads = list(self._heads[layer_index])
            q = query[0, heads] if heads else query[0]
            self._found[layer_index] = q.index_select(1, self._rows)
        if self._masks is not None:
            return self._masks.attend(layer_index, query, key, mask, scaling)
        return mask

    def q_windows(self) -> tuple[torch.Tensor | None, ...]:
        """Of each layer; None where none was to be observed."""
        unseen = [layer for layer in self._layers if layer not in self._scales]
        if unseen:
            raise ValueError(f"layers {unseen}: their attention does not go through transformers' "
                             "AttentionInterface")
        return tuple(self._found.get(layer) for layer in self._layers)

    def softmax_scale(self) -> float:
        scales = set(self._scales.values())
        if len(scales) != 1:
            raise ValueError(f"softmax scales {sorted(scales)}, want one for all layers")
        return scales.pop()


def fingerprint_of(config: Any, revision: str) -> dict[str, Any]:
    """The fingerprint of a model that is not loaded; see HfModel.fingerprint."""
    config = config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    return {
        "architecture": config.model_type,
        "num_layers": len(full_attention_layers(config)),
        "num_qo_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": (getattr(config, "head_dim", None)
                     or config.hidden_size // config.num_attention_heads),
        "rope": _rope(rope),
        "revision": revision,
    }


def directory_fingerprint(directory: str | pathlib.Path) -> dict[str, Any]:
    """The fingerprint of a model directory; reads no weights but for their digest."""
    path = pathlib.Path(directory)
    return fingerprint_of(AutoConfig.from_pretrained(path, local_files_only=True), revision_of(path))


def revision_of(directory: pathlib.Path) -> str:
    """Twelve hex digits over configuration and weights: what was learned about one training run says
    nothing about the heads of another."""
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    if not files[0].is_file() or len(files) == 1:
        raise FileNotFoundError(f"{directory}: want a directory with config.json and *.safetensors")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            while block := opened.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:12]


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    plain = {"rope_theta": "theta", "rope_type": "type"}
    return {plain.get(name, name): value for name, value in parameters.items()
            if isinstance(value, (int, float, str)) and (name, value) != ("rope_type", "default")}


def _rows(seq_len: int, window: int, row_positions: npt.ArrayLike | None) -> npt.NDArray[np.int64]:
    if row_positions is None:
        if window < 1:
            raise ValueError(f"window={window}, want at least 1")
        return np.arange(max(0, seq_len - window), seq_len)
    rows = whole_numbers(row_positions, np.int64, "row_positions")
    if rows.ndim != 1 or not len(rows) or np.any(np.diff(rows) <= 0) or (
            rows[0] < 0 or rows[-1] >= seq_len):
        raise ValueError(f"row_positions: want ascending positions in 0..{seq_len - 1}")
    return rows


def _rows_read(rows: npt.NDArray[np.int64], needs: InputNeeds | None) -> npt.NDArray[np.int64]:
    """Those of the prompt's observed rows that an operation with these needs reads."""
    if needs is None:
        return rows
    if "observed_rows" in needs.rows:
        return rows[-needs.max_rows:]
    return rows[-1:] if "last_row" in needs.rows else rows[:0]
