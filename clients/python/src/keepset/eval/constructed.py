"""Models whose weights are written down instead of learned, so that the right keep set is known.

A prompt is filler with facts in it: `key v1 .. vL`, one value per layer. Layer 0 of the construction
is a sliding-window layer that nobody compresses: exact "n tokens back" heads. The L layers after it are
full attention; in layer l the retrieval head looks for the token l + 1 steps back (the key) and returns
the token found (value l). Asked a key, the model answers with the L values; the answer is right when all
are. Compression of layer l must keep its N value tokens; everything else is useless.

Every embedding lies on the 48 slowest of 64 RoPE pairs and hardly turns; the fastest 16 carry the
"n tokens back" heads, whose logit depends on the distance alone.

`retriever` and `marker_model` choose the heads:

* retrieval: finds the answers; its queries are quiet on filler (marker models) or always on (retriever);
* marker: stands out at the value tokens of its layer, in the norm of its values (contrast "norm") or in
  its attention, out of real q and k (contrast "mass");
* distractor: stands out more, at useless filler. With equal head weights distractors fill the budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

HEAD_DIM = 128
ROPE_BASE = 1e9
_HALF = HEAD_DIM // 2
_FAST_PAIRS = 16
_EMBED_DIM = 2 * (_HALF - _FAST_PAIRS)
_EMBED_INDEX = np.concatenate([np.arange(_FAST_PAIRS, _HALF), _HALF + np.arange(_FAST_PAIRS, _HALF)])
_CONSTANT = _EMBED_DIM // 2 - 1  # the slowest pair: a constant there turns by 1e-9 per token
_FREQUENCIES = ROPE_BASE ** (-np.arange(_HALF) / _HALF)

NUM_KEYS, NUM_VALUES, NUM_FILLERS = 128, 128, 256
VOCAB_SIZE = NUM_KEYS + NUM_VALUES + NUM_FILLERS
_FIRST_VALUE, _FIRST_FILLER = NUM_KEYS, NUM_KEYS + NUM_VALUES
_IDS_PER_DISTRACTOR = 4

WINDOW = 32  # observed rows
_BACK_SCALE = 30.0
_BACK_WINDOW = 32  # tokens the sliding-window layer sees
_RETRIEVAL_SCALE = 40.0
_NOISE_HEAD_SCALE = 25.0
_READOUT_SCALE = 20.0
_NORM_SPREAD = 0.05
_MARKER_NORM, _DISTRACTOR_NORM = 3.0, 4.0
_MARKER_LOGIT, _DISTRACTOR_LOGIT = 6.0, 9.0

Contrast = Literal["none", "norm", "mass"]


@dataclasses.dataclass(frozen=True)
class Facts:
    """ids [T]; fact i: keys[i], then values[i, :] on the positions after it."""

    ids: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int64]  # [N]
    values: npt.NDArray[np.int64]  # [N, num_layers]
    key_positions: npt.NDArray[np.int64]  # [N]


@dataclasses.dataclass(frozen=True)
class LayerObservation:
    q_window: FloatArray  # [num_qo_heads, WINDOW, HEAD_DIM], post-RoPE
    k: FloatArray  # [num_kv_heads, T, HEAD_DIM], post-RoPE
    v: FloatArray  # [num_kv_heads, T, HEAD_DIM]


@dataclasses.dataclass(frozen=True)
class Prefill:
    facts: Facts
    layers: tuple[LayerObservation, ...]
    ppl: float  # over the last WINDOW tokens

    @property
    def seq_len(self) -> int:
        return len(self.facts.ids)


@dataclasses.dataclass(frozen=True)
class Answers:
    correct: npt.NDArray[np.bool_]  # [facts], all values of the fact right
    loss: float  # mean negative log-likelihood of the values


# Of each layer: k and v [n, HEAD_DIM] of the retrieval head at the positions that are left.
RetrievalCache = list[tuple[FloatArray, FloatArray]]


class ConstructedModel:
    """Immutable. `roles[l][g]` names KV head g of layer l; softmax scale is 1, scales sit in the weights."""

    softmax_scale = 1.0

    def __init__(self, name: str, roles: Sequence[Sequence[str]], *, group_size: int, contrast: Contrast,
                 noise: float, seed: int, always_on: bool, tokens_per_distractor: int):
        self.name = name
        self.roles = tuple(tuple(layer) for layer in roles)
        self.num_layers, self.num_kv_heads = len(roles), len(roles[0])
        self.group_size = group_size
        self.contrast = contrast
        self.tokens_per_distractor = tokens_per_distractor
        self.num_distractors = sum(role.startswith("distractor") for role in self.roles[0])
        if self._first_neutral() >= VOCAB_SIZE or self.num_layers > NUM_VALUES:
            raise ValueError(f"{self.num_layers} layers of {self.num_distractors} distractors, want at "
                             f"most {NUM_FILLERS // _IDS_PER_DISTRACTOR - 1} distractors in all")
        rng = np.random.default_rng([seed, 1])
        self.embedding: FloatArray = _unit(
            rng.standard_normal((VOCAB_SIZE, _EMBED_DIM))).astype(np.float32)
        self._layers = [self._make_layer(rng, layer, noise, always_on)
                        for layer in range(self.num_layers)]

    def fingerprint(self) -> dict:
        return {
            "architecture": f"constructed-{self.name}",
            "num_layers": self.num_layers,
            "num_qo_heads": self.num_kv_heads * self.group_size,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": HEAD_DIM,
            "rope": {"theta": ROPE_BASE},
        }

    def value_ids(self, layer: int) -> npt.NDArray[np.int64]:
        """The tokens that stand as value `layer` of a fact."""
        share = NUM_VALUES // self.num_layers
        return _FIRST_VALUE + layer * share + np.arange(share)

    def distractor_ids(self, layer: int, distractor: int) -> npt.NDArray[np.int64]:
        first = _FIRST_FILLER + (layer * self.num_distractors + distractor) * _IDS_PER_DISTRACTOR
        return first + np.arange(_IDS_PER_DISTRACTOR)

    def make_facts(self, seed: int, seq_len: int, num_facts: int, query_last: bool = False) -> Facts:
        """Facts at random places below T - 40; each distractor's tokens occur equally often.

        query_last: the last token is the key of fact 0, asked inside the prompt.
        """
        rng = np.random.default_rng([seed, 2])
        stride = 1 + self.num_layers
        slots = np.arange(1, seq_len - 40 - stride, stride)
        if num_facts > min(len(slots), NUM_KEYS):
            raise ValueError(f"num_facts={num_facts}, want 1..{min(len(slots), NUM_KEYS)}")
        positions = np.sort(rng.choice(slots, num_facts, replace=False))
        keys = rng.choice(NUM_KEYS, num_facts, replace=False)
        values = np.stack([rng.choice(self.value_ids(layer), num_facts)
                           for layer in range(self.num_layers)], 1)
        ids = rng.integers(self._first_neutral(), VOCAB_SIZE, seq_len)
        taken = positions[:, None] + np.arange(stride)
        free = rng.permutation(np.setdiff1d(np.arange(seq_len - 1), taken))
        for index in range(self.num_layers * self.num_distractors):
            where, free = np.split(free, [self.tokens_per_distractor])
            if len(where) < self.tokens_per_distractor:
                raise ValueError(f"seq_len={seq_len}, too short for all distractor tokens")
            ids[where] = rng.choice(
                self.distractor_ids(*divmod(index, self.num_distractors)), len(where))
        ids[positions] = keys
        ids[taken[:, 1:]] = values
        if query_last:
            ids[-1] = keys[0]
        return Facts(ids, keys, values, positions)

    def prefill(self, facts: Facts) -> Prefill:
        """K, V of every layer and the queries of the last WINDOW rows."""
        seq_len = len(facts.ids)
        rows = np.arange(seq_len - WINDOW, seq_len)
        layers = []
        for layer in range(self.num_layers):
            q_table, k_table, v_table, _ = self._layers[layer]
            keys = k_table[:, facts.ids]
            keys[self.retrieval_head(layer)] = self._tokens_back(facts.ids, layer + 1)
            layers.append(LayerObservation(
                rotate(_spread(q_table[:, facts.ids[rows]]), rows),
                rotate(_spread(keys), np.arange(seq_len)),
                _spread(v_table[:, facts.ids])))
        return Prefill(facts, tuple(layers), self._perplexity(facts, layers[0]))

    def retrieval_cache(self, prefill: Prefill, keep_sets: Sequence[npt.NDArray[np.integer]] | None
                        = None) -> RetrievalCache:
        """What the retrieval heads keep: all, or the positions keep_sets[l] of layer l."""
        out = []
        for layer, one in enumerate(prefill.layers):
            head = self.retrieval_head(layer)
            keep = slice(None) if keep_sets is None else keep_sets[layer]
            out.append((one.k[head][keep], one.v[head][keep]))
        return out

    def answer(self, facts: Facts, cache: RetrievalCache,
               which: Sequence[int] | None = None) -> Answers:
        """Asks the keys of the facts (or of `which`) after the prompt, each on its own."""
        chosen = np.arange(len(facts.keys)) if which is None else np.asarray(which)
        correct = np.ones(len(chosen), bool)
        losses = []
        for layer, (k, v) in enumerate(cache):
            logits = self._retrieve(layer, facts.ids, facts.keys[chosen], k, v)
            wanted = facts.values[chosen, layer]
            correct &= logits.argmax(-1) == wanted
            losses.append(_log_sum_exp(logits) - logits[np.arange(len(chosen)), wanted])
        return Answers(correct, float(np.mean(losses)))

    def retrieval_head(self, layer: int) -> int:
        """The KV head that finds the answers."""
        return self.roles[layer].index("retrieval")

    def marker_heads(self) -> list[int]:
        """The KV head of each layer whose weight should be high."""
        return [layer.index("marker") for layer in self.roles]

    def _first_neutral(self) -> int:
        return _FIRST_FILLER + self.num_layers * self.num_distractors * _IDS_PER_DISTRACTOR

    def _make_layer(self, rng, layer: int, noise: float, always_on: bool):
        """Tables by token: q [H, V, e], k and v [Hkv, V, e]; q of the retrieval head alone [V, e]."""
        q_groups, k_table, v_table, retrieval_q = [], [], [], None
        for role in self.roles[layer]:
            k = _unit(rng.standard_normal((VOCAB_SIZE, _EMBED_DIM)))
            v = _unit(rng.standard_normal((VOCAB_SIZE, _EMBED_DIM)))
            q = noise * rng.standard_normal((self.group_size, VOCAB_SIZE, _EMBED_DIM))
            v *= 1 + _NORM_SPREAD * rng.standard_normal((VOCAB_SIZE, 1))
            special: Sequence[int] | npt.NDArray = ()
            norm = logit = 1.0
            if role == "retrieval":
                v = self.embedding * np.linalg.norm(v, axis=-1, keepdims=True)
                asked = slice(None) if always_on else slice(0, NUM_KEYS)
                q[0, asked] = _RETRIEVAL_SCALE * self.embedding[asked]
                retrieval_q = q[0].astype(np.float32)
            elif role == "marker":
                special, norm, logit = self.value_ids(layer), _MARKER_NORM, _MARKER_LOGIT
            elif role.startswith("distractor"):
                special = self.distractor_ids(layer, int(role.removeprefix("distractor")))
                norm, logit = _DISTRACTOR_NORM, _DISTRACTOR_LOGIT
            else:
                project_q, project_k = rng.standard_normal((2, _EMBED_DIM, _EMBED_DIM)) / np.sqrt(
                    _EMBED_DIM)
                q[0] = _NOISE_HEAD_SCALE * self.embedding @ project_q
                k = self.embedding @ project_k
            if self.contrast == "norm" and len(special):
                v[special] *= norm
            if self.contrast == "mass" and len(special):
                q[..., _CONSTANT], k[:, _CONSTANT] = 1, 0
                k[special, _CONSTANT] = logit
            q_groups.append(q)
            k_table.append(k)
            v_table.append(v)
        return (np.concatenate(q_groups).astype(np.float32), np.asarray(k_table, np.float32),
                np.asarray(v_table, np.float32), retrieval_q)

    def _tokens_back(self, ids: npt.NDArray, steps: int) -> FloatArray:
        """Layer 0: the embedding `steps` tokens back [T, e], by attention over distances 0..31."""
        weights = np.exp(back_logits(steps) - back_logits(steps).max())
        out = np.zeros((len(ids), _EMBED_DIM))
        total = np.zeros((len(ids), 1))
        for distance, weight in enumerate(weights):
            out[distance:] += weight * self.embedding[ids[: len(ids) - distance]]
            total[distance:] += weight
        return (out / total).astype(np.float32)

    def _retrieve(self, layer: int, ids: npt.NDArray, asked: npt.NDArray, k: FloatArray,
                  v: FloatArray) -> FloatArray:
        """Logits [n, VOCAB_SIZE] of tokens `asked` [n], each fed at position T."""
        position = np.asarray([len(ids)])
        _, _, v_table, retrieval_q = self._layers[layer]
        head = self.retrieval_head(layer)
        q = rotate(_spread(retrieval_q[asked]), position)
        # The fed token's own key: what stands `layer + 1` steps before it.
        own_k = rotate(_spread(self._tokens_back(np.append(ids[-_BACK_WINDOW:], asked[0]), layer + 1)
                               )[-1:], position)
        own_v = _spread(v_table[head, asked])
        logits = np.concatenate([q @ k.T, q @ own_k.T], 1)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = weights[:, :-1] @ v + weights[:, -1:] * own_v
        return _READOUT_SCALE * out[:, _EMBED_INDEX] @ self.embedding.T

    def _perplexity(self, facts: Facts, first: LayerObservation) -> float:
        """exp of the mean loss of the last WINDOW tokens, predicted from the rows before them."""
        rows = np.arange(len(facts.ids) - WINDOW - 1, len(facts.ids) - 1)
        head = self.retrieval_head(0)
        q = rotate(_spread(self._layers[0][3][facts.ids[rows]]), rows)
        logits = q @ first.k[head].T
        logits[np.arange(len(facts.ids)) > rows[:, None]] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out = weights / weights.sum(-1, keepdims=True) @ first.v[head]
        readout = _READOUT_SCALE * out[:, _EMBED_INDEX] @ self.embedding.T
        losses = _log_sum_exp(readout) - readout[np.arange(WINDOW), facts.ids[rows + 1]]
        return float(np.exp(losses.mean(dtype=np.float64)))


def retriever(seed: int = 0) -> ConstructedModel:
    """One retrieval head that is always on and three heads of random projections."""
    return ConstructedModel("retriever", [["retrieval", "noise", "noise", "noise"]], group_size=1,
                            contrast="none", noise=0.0, seed=seed, always_on=True,
                            tokens_per_distractor=0)


def marker_model(contrast: Contrast = "norm", *, num_layers: int = 1, group_size: int = 1,
                 num_distractors: int = 6, noise: float = 0.3, permute_heads: bool = False,
                 seed: int = 0) -> ConstructedModel:
    """Retrieval, marker and distractor heads, per layer in a random order with permute_heads."""
    plain = ["retrieval", "marker"] + [f"distractor{i}" for i in range(num_distractors)]
    rng = np.random.default_rng([seed, 3])
    roles = [[plain[i] for i in rng.permutation(len(plain))] if permute_heads else plain
             for _ in range(num_layers)]
    # Mass contrast: exp(9) over 30 tokens is 1.25 times exp(6) over the values of 32 facts.
    return ConstructedModel(f"marker-{contrast}", roles, group_size=group_size, contrast=contrast,
                            noise=noise, seed=seed, always_on=False,
                            tokens_per_distractor=30 if contrast == "mass" else 40)


def back_logits(steps: int) -> npt.NDArray[np.float64]:
    """Logit of the "`steps` tokens back" head by distance 0.._BACK_WINDOW - 1.

    k is 1 on the first component of the fastest pairs, q the same vector turned back by `steps`.
    """
    distance = np.arange(_BACK_WINDOW)
    return _BACK_SCALE * np.cos((distance[:, None] - steps) * _FREQUENCIES[:_FAST_PAIRS]).sum(1)


def rotate(x: FloatArray, positions: npt.NDArray[np.integer]) -> FloatArray:
    """RoPE of x [..., n, HEAD_DIM] at positions [n], half-split."""
    angles = positions[:, None] * _FREQUENCIES
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = x[..., :_HALF], x[..., _HALF:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _spread(x: FloatArray) -> FloatArray:
    """[..., e] onto the slow pairs of a head vector."""
    out = np.zeros((*x.shape[:-1], HEAD_DIM), np.float32)
    out[..., _EMBED_INDEX] = x
    return out


def _unit(x: npt.NDArray) -> npt.NDArray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _log_sum_exp(logits: FloatArray) -> FloatArray:
    top = logits.max(-1, keepdims=True)
    return (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[:, 0]
