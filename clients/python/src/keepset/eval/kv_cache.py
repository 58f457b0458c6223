"""A KV cache that may hold a different set of tokens in every layer and every KV head."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Union

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
# One keep set for all KV heads [n_l], or one per KV head, each [n_g].
KeepSet = Union[npt.NDArray[np.integer], Sequence[npt.NDArray[np.integer]]]


@dataclasses.dataclass(frozen=True)
class HeadCache:
    """One KV head: ascending original positions [n], k (post-RoPE) and v [n, head_dim]."""

    positions: IntArray
    k: FloatArray
    v: FloatArray

    def __post_init__(self) -> None:
        count = len(self.positions)
        if self.k.shape != self.v.shape or self.k.ndim != 2 or len(self.k) != count:
            raise ValueError(f"positions [{count}], k {list(self.k.shape)}, v {list(self.v.shape)}:"
                             f" want k and v [{count}, head_dim]")
        if count and (self.positions[0] < 0 or np.any(np.diff(self.positions) <= 0)):
            raise ValueError("positions: not ascending, want distinct positions from 0")


class KvCache:
    """Immutable; layers[l][g] is KV head g of layer l. Decoding from it never changes it."""

    def __init__(self, layers: Sequence[Sequence[HeadCache]]) -> None:
        self.layers = tuple(tuple(heads) for heads in layers)

    @classmethod
    def from_compacted(cls, keep_sets: Sequence[KeepSet],
                       k: Sequence[Sequence[npt.NDArray[np.floating]]],
                       v: Sequence[Sequence[npt.NDArray[np.floating]]]) -> KvCache:
        """Takes rows that were gathered already, by the service for example.

        keep_sets[l] is [n_l] or a list of [n_g] per KV head; k[l] and v[l] are
        [num_kv_heads, n_l, head_dim] or a list of [n_g, head_dim].
        """
        if not len(keep_sets) == len(k) == len(v):
            raise ValueError(f"{len(keep_sets)} keep sets, {len(k)} k, {len(v)} v: want one each "
                             "per layer")
        layers = []
        for keep, k_layer, v_layer in zip(keep_sets, k, v):
            layers.append([
                HeadCache(positions, np.asarray(k_head, np.float32), np.asarray(v_head, np.float32))
                for positions, k_head, v_head in zip(
                    _per_head(keep, len(k_layer)), k_layer, v_layer)
            ])
        return cls(layers)

    @classmethod
    def select(cls, keep_sets: Sequence[KeepSet], k: Sequence[FloatArray],
               v: Sequence[FloatArray]) -> KvCache:
        """Gathers the rows of `keep_sets` from full k[l] and v[l] [num_kv_heads, seq_len, d]."""
        sets = [_per_head(keep, len(k_layer)) for keep, k_layer in zip(keep_sets, k)]
        return cls.from_compacted(
            sets, [[head[keep] for head, keep in zip(k_layer, layer_sets)]
                   for k_layer, layer_sets in zip(k, sets)],
            [[head[keep] for head, keep in zip(v_layer, layer_sets)]
             for v_layer, layer_sets in zip(v, sets)])

    def before(self, position: int) -> KvCache:
        """Returns the tokens at positions below `position`, so that the rest can be fed again."""
        layers = []
        for heads in self.layers:
            ends = [int(np.searchsorted(head.positions, position)) for head in heads]
            layers.append([
                HeadCache(head.positions[:end], head.k[:end], head.v[:end])
                for head, end in zip(heads, ends)
            ])
        return KvCache(layers)

    def num_tokens(self) -> list[list[int]]:
        """Returns the number of tokens held, per layer and KV head."""
        return [[len(head.positions) for head in heads] for heads in self.layers]

    def num_bytes(self, bytes_per_element: int = 4) -> int:
        """Returns the size of K and V."""
        return sum(2 * head.k.size * bytes_per_element for heads in self.layers for head in heads)


def _per_head(keep: KeepSet, num_kv_heads: int) -> list[IntArray]:
    if isinstance(keep, np.ndarray) and keep.ndim == 1:
        return [keep.astype(np.int64)] * num_kv_heads
    heads = [np.asarray(head, np.int64) for head in keep]
    if len(heads) != num_kv_heads:
        raise ValueError(f"keep set of {len(heads)} KV heads, want {num_kv_heads}")
    return heads
