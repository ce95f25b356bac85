"""The workload of `minipaged bench engine`: a model with random weights, and requests.

The cost of a token does not depend on its value. No sequence ends early, so every run generates
exactly the requested number of tokens.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from minipaged.evaluation.bench.load import make_checkpoint

Request = tuple[list[int], int]  # a prompt, and the number of tokens to generate


@dataclass(frozen=True)
class Lengths:
    """A lognormal distribution of token counts, cut off at both ends."""

    mean: int
    sigma: float
    shortest: int
    longest: int

    def draw(self, random: np.random.Generator) -> list[int]:
        """Draw 64 lengths: always 64, so that longer traces start with the same ones."""
        mu = np.log(self.mean) - self.sigma**2 / 2
        drawn = random.lognormal(mu, self.sigma, 64).astype(int)
        return np.clip(drawn, self.shortest, self.longest).tolist()


@dataclass(frozen=True)
class Workload:
    """A model, a batch of equal sequences to decode, and a mixed trace of requests."""

    hf: dict[str, Any]  # the content of config.json
    batches: tuple[int, ...]  # that decode: all sequences equally long
    prompt_len: int
    new_tokens: int  # of each, after the first
    num_requests: int  # of the mixed trace
    prompts: Lengths
    outputs: Lengths
    static_batches: tuple[int, int]  # batch sizes, for a library that forms batches in advance

    def decode_requests(self, batch: int) -> list[Request]:
        """Make `batch` prompts of equal length, with one token more than is timed."""
        prompts = np.random.default_rng(1).integers(
            0, self.hf["vocab_size"], (batch, self.prompt_len)
        )
        return [(prompt, self.new_tokens + 1) for prompt in prompts.tolist()]

    def mixed_requests(self) -> list[Request]:
        """Make requests of very different lengths, as users send them; always the same ones."""
        random = np.random.default_rng(0)
        lengths = list(zip(self.prompts.draw(random), self.outputs.draw(random), strict=True))
        chosen = lengths[: self.num_requests]
        vocab_size = self.hf["vocab_size"]
        return [(random.integers(0, vocab_size, p).tolist(), o) for p, o in chosen]


_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}
FULL = Workload(
    hf={
        **_LLAMA,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    batches=(1, 8, 32),
    prompt_len=64,
    new_tokens=64,
    num_requests=24,
    prompts=Lengths(160, 0.7, 8, 512),
    outputs=Lengths(100, 0.8, 4, 256),
    static_batches=(8, 16),
)
# The same matrices with 12 query heads of 48, not 9 of 64, so that ranks can divide the heads.
DIVISIBLE = replace(
    FULL, hf={**FULL.hf, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 48}
)
QUICK = Workload(
    hf={
        **_LLAMA,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    batches=(1, 3),
    prompt_len=9,
    new_tokens=5,
    num_requests=5,
    prompts=Lengths(12, 0.7, 2, 40),
    outputs=Lengths(6, 0.8, 2, 12),
    static_batches=(2, 3),
)


def make_model(workload: Workload, folder: Path) -> int:
    """Write the checkpoint; return the number of weights that a decode step reads.

    Matrices preserve the magnitude of their input, so attention is spread over many tokens,
    activations stay finite, and greedy tokens differ. The last norm spreads the logits.
    """
    torch.manual_seed(0)
    make_checkpoint(workload.hf, folder, torch.float32)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensor *= tensor.shape[1] ** -0.5
        else:
            tensor *= 0.1
            tensor += 4 if name == "model.norm.weight" else 1
    save_file(tensors, file, {"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())
