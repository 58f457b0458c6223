"""Tiny randomly initialised models of each family, on the CPU in fp32."""

from __future__ import annotations

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from keepset.adapters.hf import HfModel

SHAPE = dict(num_hidden_layers=4, hidden_size=48, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=64, vocab_size=96, max_position_embeddings=512, pad_token_id=0)
WINDOW = 24
IMPLEMENTATIONS = ("eager", "sdpa")

FULL = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    # head_dim other than hidden_size / heads, and norms of q and k.
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
}
# Full-attention layers among sliding-window ones.
MIXED = {
    "qwen2-mixed": (lambda: Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=WINDOW,
                                        max_window_layers=2), (0, 1)),
    "gemma3": (lambda: Gemma3TextConfig(
        **SHAPE, head_dim=16, query_pre_attn_scalar=20, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2), (1, 3)),
}
FAMILIES = [*FULL, *MIXED]


def config_of(family: str):
    return FULL[family]() if family in FULL else MIXED[family][0]()


def windowed_everywhere() -> MistralConfig:
    return MistralConfig(**SHAPE, sliding_window=WINDOW)


def soft_capped() -> Gemma2Config:
    return Gemma2Config(**SHAPE, head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW)


def plain_model(config, implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        # The initial weights are so small that attention would be flat.
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(8 if "self_attn" in name else 2)
            elif name.endswith("bias"):
                weight.normal_()
    return model


def model_of(family: str, implementation: str) -> HfModel:
    return HfModel(plain_model(config_of(family), implementation), "random-0")
