"""Small random checkpoints of every family, written by `transformers` itself.

Not a test: a helper for tests. `transformers` is imported inside the functions, so that importing
this module costs nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 101
_COMMON = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}
_LLAMA = _COMMON | {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GPT2 = _COMMON | {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}
_OPT = _COMMON | {
    "hidden_size": 48,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # So short that with 12 numbers in a head all three ranges of frequencies occur.
    "original_max_position_embeddings": 32,
}
LINEAR_SCALING = {"rope_type": "linear", "factor": 4.0}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {  # config class, model class, options
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "mistral": ("MistralConfig", "MistralForCausalLM", _LLAMA | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _LLAMA | {"head_dim": 16}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "opt": ("OPTConfig", "OPTForCausalLM", _OPT),
}


def make_checkpoint(
    family: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Save a small random model of this family; `overrides` are options of its config class.

    Every parameter is random, norms and biases too, and large enough that a parameter left out or
    put into the wrong place shows clearly in the logits.
    """
    import transformers

    config_class, model_class, options = FAMILIES[family]
    config = getattr(transformers, config_class)(**(options | overrides))
    model = getattr(transformers, model_class)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name or ".ln_" in name else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(centre * (parameter.dim() == 1) + 0.3 * noise)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def make_checkpoints(
    variants: Mapping[str, tuple[str, dict[str, Any]]], root: Path
) -> dict[str, Path]:
    """One checkpoint per variant, which names a family and options, in folders below `root`."""
    return {
        variant: make_checkpoint(family, root / str(number), **options)
        for number, (variant, (family, options)) in enumerate(variants.items())
    }
