"""Hugging Face causal language models: what a prefill shows, compacted caches, decoding from them.

Extra `hf` (torch, transformers). Families: Llama, Qwen2, Qwen3, Mistral, and others whose attention goes
through transformers' AttentionInterface; attention implementations eager and sdpa.
"""

from keepset.adapters.hf.cache import HfCache
from keepset.adapters.hf.model import HfModel, HfPrefill
from keepset.adapters.hf.retention import EngineRetention, Retention, ServiceRetention

__all__ = ["EngineRetention", "HfCache", "HfModel", "HfPrefill", "Retention", "ServiceRetention"]
