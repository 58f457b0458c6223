"""What stands between a transformers model and its attention function while Keepset runs it.

transformers lets attention functions be registered by name (AttentionInterface, with the masks they ask
for in AttentionMaskInterface). Ours see queries and keys as the model's own function would (after RoPE
and q-norm), may replace the mask of one layer, and then call that very function. What they report to
travels as a keyword from the model's forward, so nothing is remembered between calls and no module is
changed; only the name in the model's configuration is, inside `interposed`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SUPPORTED = ("eager", "sdpa")
# The keyword of the model's forward that carries an Interposer.
KEYWORD = "keepset_interposer"
_PREFIX = "keepset_"


class Interposer(Protocol):
    """Called by every attention layer of one forward pass, in order."""

    def attend(self, layer_index: int, query: torch.Tensor, key: torch.Tensor,
               mask: torch.Tensor | None, scaling: float) -> torch.Tensor | None:
        """Returns the mask to use: the given one or another; see `mask_of` for its form.

        query [batch, num_qo_heads, n, d], key [batch, num_kv_heads, past + n, d].
        """


@contextlib.contextmanager
def interposed(model: PreTrainedModel) -> Iterator[None]:
    """Routes the attention of `model` through this module; as it was on leaving, whatever happened."""
    own = model.config._attn_implementation
    if own not in SUPPORTED:
        raise ValueError(f"attention implementation {own}, want {' or '.join(SUPPORTED)}: load the "
                         "model with attn_implementation=\"sdpa\"")
    _register(own)
    try:
        model.set_attn_implementation(_PREFIX + own)
        yield
    finally:
        model.set_attn_implementation(own)


def mask_of(visible: torch.Tensor, query: torch.Tensor, own: str) -> torch.Tensor:
    """The form of mask that an attention implementation takes, of visible (bool, broadcastable to
    [batch, num_qo_heads, n, keys])."""
    if own == "sdpa":
        return visible
    hidden = torch.finfo(query.dtype).min
    return torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, hidden)


def _register(own: str) -> None:
    name = _PREFIX + own
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
        AttentionInterface.register(name, _function(own))


def _function(own: str) -> Callable:
    def forward(module, query, key, value, attention_mask, **kwargs):
        # Eager attention is a function of each model's own file; the others are transformers'.
        attention = (sys.modules[type(module).__module__].eager_attention_forward
                     if own == "eager" else ALL_ATTENTION_FUNCTIONS[own])
        interposer: Interposer | None = kwargs.pop(KEYWORD, None)
        if interposer is not None:
            for name in ("softcap", "s_aux"):
                if kwargs.get(name) is not None:
                    raise ValueError(f"layer {module.layer_idx}: attention with {name}: not softmax "
                                     "over scaled logits, which every policy reckons with")
            attention_mask = interposer.attend(module.layer_idx, query, key, attention_mask,
                                               kwargs["scaling"])
        return attention(module, query, key, value, attention_mask, **kwargs)

    return forward
