"""A transformers cache that holds the kept tokens only, each at its original position.

A compacted layer tells transformers the length of the prompt, not the number of its rows, so the next
token's position is right, as sliding-window layers do it. Which layers are compacted is decided by the
type of the cache's layer; sliding-window layers stay as they are.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Union

import numpy as np
import numpy.typing as npt
import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from keepset.adapters.hf.attention import mask_of
from keepset.types import LayerGroup

Positions = npt.NDArray[np.int64]
# One keep set for all KV heads [n], or one per KV head, each [n_g].
KeepSet = Union[npt.NDArray[np.integer], Sequence[npt.NDArray[np.integer]]]


def full_attention_layers(config: PretrainedConfig) -> tuple[int, ...]:
    """The layers of a model that may be compacted, at least one; the model windows the others itself."""
    found = tuple(index for index, layer in enumerate(DynamicCache(config=config).layers)
                  if _may_be_compacted(index, layer))
    if not found:
        raise ValueError("every layer has a sliding window: there is nothing to compact")
    return found


def layer_groups(config: PretrainedConfig) -> tuple[LayerGroup, ...]:
    """What a request states of the model's layers: the sliding-window ones are left out.

    Empty for a model without any, whose layers all attend fully.
    """
    full = full_attention_layers(config)
    config = config.get_text_config(decoder=True)
    sliding = tuple(layer for layer in range(config.num_hidden_layers) if layer not in full)
    if not sliding:
        return ()
    return (LayerGroup(full), LayerGroup(sliding, "sliding_window", config.sliding_window, left_out=True))


def _may_be_compacted(index: int, layer: CacheLayerMixin) -> bool:
    if type(layer) is DynamicLayer:
        return True
    if isinstance(layer, DynamicLayer) and layer.is_sliding:
        return False
    raise ValueError(f"layer {index}: cache layer {type(layer).__name__}, want a full or a "
                     "sliding-window one")


class CompactedLayer(DynamicLayer):
    """Rows of some positions of a prompt; grows by whole tokens as decoding goes on.

    keys, values: [batch, num_kv_heads, rows + appended, d]. rows: the largest count of a head; a head
    with fewer has unused rows at its end, told by `used` [1 or batch, 1 or num_kv_heads, rows], None when
    all are used.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, used: torch.Tensor | None,
                 next_position: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.used = used
        self.next_position = next_position

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
               ) -> tuple[torch.Tensor, torch.Tensor]:
        self.next_position += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        return self.next_position

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # As if the rows were the last positions: all of them are past, which is all a mask asks.
        rows = self.keys.shape[-2]
        return rows + query_length, self.next_position - rows

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a compacted cache cannot be rolled back; decode from a fresh fork")


@dataclasses.dataclass(frozen=True)
class HfCache:
    """What a prompt left in a model. Immutable: decoding works on a fork, so that a second question
    finds the same cache.

    layers: one per layer of the model. positions[l]: original positions per KV head of a full-attention
    layer, each [n_g] ascending; None for a layer that is left alone.
    """

    layers: tuple[CacheLayerMixin, ...]
    positions: tuple[tuple[Positions, ...] | None, ...]
    next_position: int

    @classmethod
    def of_prefill(cls, cache: Cache, seq_len: int) -> HfCache:
        """Takes over the cache of a prefill of seq_len tokens, batch 1."""
        positions = []
        for index, layer in enumerate(cache.layers):
            full = _may_be_compacted(index, layer)
            positions.append((np.arange(seq_len),) * layer.keys.shape[1] if full else None)
        return cls(tuple(cache.layers), tuple(positions), seq_len)

    @property
    def compacted_layers(self) -> tuple[int, ...]:
        return tuple(index for index, one in enumerate(self.positions) if one is not None)

    def compact(self, keep_sets: Sequence[KeepSet]) -> HfCache:
        """Keeps the positions of keep_sets[i] in the i-th full-attention layer."""
        full = self.compacted_layers
        if len(keep_sets) != len(full):
            raise ValueError(f"{len(keep_sets)} keep sets, want {len(full)}: one per layer with full "
                             "attention")
        layers, positions = list(self.layers), list(self.positions)
        for index, keep in zip(full, keep_sets):
            held = positions[index]
            wanted = _per_head(index, keep, len(held))
            rows = [_rows_of(index, head, one) for head, one in zip(held, wanted)]
            layers[index] = _select(layers[index], rows, self.next_position)
            positions[index] = tuple(wanted)
        return HfCache(tuple(layers), tuple(positions), self.next_position)

    def before(self, position: int) -> HfCache:
        """Without the tokens at `position` and after, so that the rest can be fed again."""
        if not 0 < position <= self.next_position:
            raise ValueError(f"position={position}, want 1..{self.next_position}")
        removed = self.next_position - position
        layers, positions = list(self.layers), list(self.positions)
        for index, held in enumerate(positions):
            if held is None:
                layers[index] = _cropped(index, layers[index], removed)
                continue
            positions[index] = tuple(head[head < position] for head in held)
            rows = [np.arange(len(head)) for head in positions[index]]
            layers[index] = _select(layers[index], rows, position)
        return HfCache(tuple(layers), tuple(positions), position)

    def fork(self, batch: int = 1) -> Cache:
        """A transformers cache of `batch` equal sequences, to decode with and throw away."""
        # Layers grow by concatenation, never in place: the tensors may be shared.
        return Cache(layers=[_expanded(layer, batch) for layer in self.layers])

    @staticmethod
    def fork_of(caches: Sequence[HfCache], batch: int) -> Cache:
        """One fork with `batch` sequences of each cache, one cache after the other.

        The caches come of one prefill, end at the same position and have compacted what they may.
        """
        if len({one.next_position for one in caches}) != 1:
            raise ValueError(f"{len(caches)} caches, want at least one and the same end")
        layers = []
        for index, same in enumerate(zip(*(one.layers for one in caches))):
            if all(isinstance(one, CompactedLayer) for one in same):
                layers.append(_expanded(_stacked(same), batch))
            elif any(held.positions[index] is not None for held in caches):
                raise ValueError(f"layer {index}: not compacted in every cache")
            else:
                layers.append(_expanded(same[0], len(caches) * batch))
        return Cache(layers=layers)

    def num_tokens(self) -> list[list[int]]:
        """Tokens held per layer and KV head; in layers that are left alone, rows."""
        return [[len(head) for head in held] if held is not None
                else [layer.keys.shape[-2]] * layer.keys.shape[1]
                for layer, held in zip(self.layers, self.positions)]

    def num_bytes(self) -> int:
        """Allocated bytes of K and V, the unused rows of shorter heads included."""
        return sum(one.numel() * one.element_size()
                   for layer in self.layers for one in (layer.keys, layer.values))


class CompactedAttention:
    """Gives every compacted layer of a fork the mask of its own rows; an Interposer."""

    def __init__(self, cache: Cache, own_implementation: str):
        self._layers = cache.layers
        self._own = own_implementation

    def attend(self, layer_index: int, query: torch.Tensor, key: torch.Tensor,
               mask: torch.Tensor | None, scaling: float) -> torch.Tensor | None:
        layer = self._layers[layer_index]
        if not isinstance(layer, CompactedLayer):
            return mask
        num_new, num_keys = query.shape[2], key.shape[2]
        if num_new == 1 and layer.used is None:
            return None
        visible = torch.ones(1, 1, num_new, num_keys, dtype=torch.bool, device=key.device)
        visible = visible.tril(num_keys - num_new)
        if layer.used is not None:
            group = query.shape[1] // key.shape[1]
            used = torch.nn.functional.pad(layer.used, (0, num_keys - layer.used.shape[2]), value=True)
            if used.shape[1] > 1:
                used = used.repeat_interleave(group, 1)
            visible = visible & used[:, :, None, :]
        return mask_of(visible, query, self._own)


def whole_numbers(values: npt.ArrayLike, dtype: type, what: str) -> npt.NDArray:
    """An array of `dtype`; nothing is rounded or cut off."""
    array = np.asarray(values)
    if not array.size:
        return array.astype(dtype)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what}: {array.dtype}, want integers")
    limits = np.iinfo(dtype)
    if not limits.min <= int(array.min()) <= int(array.max()) <= limits.max:
        raise ValueError(f"{what}: {int(array.min())}..{int(array.max())}, want "
                         f"{limits.min}..{limits.max}")
    return array.astype(dtype)


def _per_head(layer: int, keep: KeepSet, num_kv_heads: int) -> list[Positions]:
    if isinstance(keep, np.ndarray) and keep.ndim == 1:
        return [whole_numbers(keep, np.int64, f"layer {layer}: keep set")] * num_kv_heads
    if len(keep) != num_kv_heads:
        raise ValueError(f"layer {layer}: keep set of {len(keep)} KV heads, want {num_kv_heads}")
    return [whole_numbers(head, np.int64, f"layer {layer}: keep set") for head in keep]


def _rows_of(layer: int, held: Positions, wanted: Positions) -> Positions:
    """Where the positions `wanted` stand among those held."""
    rows = np.searchsorted(held, wanted)
    if np.any(np.diff(wanted) <= 0):
        raise ValueError(f"layer {layer}: keep set not ascending")
    found = rows < len(held)
    found[found] = held[rows[found]] == wanted[found]
    if not found.all():
        raise ValueError(f"layer {layer}: position {wanted[~found][0]}, not in the cache")
    return rows


def _select(layer: CacheLayerMixin, rows: Sequence[Positions], next_position: int) -> CompactedLayer:
    """A layer with rows[g] of KV head g."""
    device = layer.keys.device
    if all(np.array_equal(rows[0], one) for one in rows[1:]):
        index = torch.as_tensor(rows[0], device=device)
        return CompactedLayer(layer.keys.index_select(2, index), layer.values.index_select(2, index),
                              None, next_position)
    used = np.arange(max(map(len, rows))) < np.array([len(one) for one in rows])[:, None]
    padded = np.zeros(used.shape, np.int64)
    padded[used] = np.concatenate(rows)
    index = torch.as_tensor(padded, device=device)[None, :, :, None]
    keys, values = (one.gather(2, index.expand(1, -1, -1, one.shape[3]))
                    for one in (layer.keys, layer.values))
    return CompactedLayer(keys, values, torch.as_tensor(used, device=device)[None], next_position)


def _expanded(layer: CacheLayerMixin, batch: int) -> CacheLayerMixin:
    """Every sequence of the layer `batch` times, in turn; shares memory where that is one sequence."""
    own = copy.copy(layer)
    if layer.keys.shape[0] == 1:
        own.keys, own.values = (one.expand(batch, -1, -1, -1) for one in (layer.keys, layer.values))
    elif batch > 1:
        own.keys, own.values = (one.repeat_interleave(batch, 0) for one in (layer.keys, layer.values))
        if isinstance(own, CompactedLayer) and own.used is not None:
            own.used = own.used.repeat_interleave(batch, 0)
    return own


def _stacked(layers: Sequence[CompactedLayer]) -> CompactedLayer:
    """One layer with the sequence of each of `layers`, shorter ones with unused rows at their end."""
    rows = max(one.keys.shape[2] for one in layers)
    first = layers[0]
    shape = (len(layers), first.keys.shape[1], rows, first.keys.shape[3])
    keys, values = first.keys.new_zeros(shape), first.values.new_zeros(shape)
    heads = 1 if all(one.used is None for one in layers) else shape[1]
    used = torch.zeros(len(layers), heads, rows, dtype=torch.bool, device=keys.device)
    for index, one in enumerate(layers):
        held = one.keys.shape[2]
        keys[index, :, :held], values[index, :, :held] = one.keys[0], one.values[0]
        used[index, :, :held] = True if one.used is None else one.used[0]
    return CompactedLayer(keys, values, None if used.all() else used, first.next_position)


def _cropped(index: int, layer: CacheLayerMixin, removed: int) -> CacheLayerMixin:
    if not removed:
        return layer
    if layer.get_seq_length() > layer.keys.shape[-2]:
        raise ValueError(f"layer {index}: its sliding window has dropped what the tokens before would "
                         "see; ask after the prompt instead")
    own = copy.copy(layer)
    own.crop(-removed)
    return own
