"""Writes the small model as a Hugging Face model directory of the Llama family.

    python -m keepset.eval.export_llama --out DIRECTORY
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence

from safetensors.numpy import save_file

from keepset.eval.small_model import SmallModel


def export(model: SmallModel, directory: pathlib.Path) -> None:
    """Writes config.json and model.safetensors (fp32) into a directory that is made when missing."""
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config
    document = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32",
        "num_hidden_layers": config.num_layers, "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_qo_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size, "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": 1 << 16, "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": None,
        "pad_token_id": None,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    save_file(dict(model.weights()), directory / "model.safetensors", metadata={"format": "pt"})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    options = parser.parse_args(arguments)
    export(SmallModel.load(), options.out)


if __name__ == "__main__":
    main()
