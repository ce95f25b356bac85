"""The workload of `minipaged bench engine`: a model with random weights, and requests.

The cost of a token does not depend on its value. No sequence ends early, so every run generates
exactly the requested number of tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

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
class Case:
    """One workload of the comparison.

    The prompts of every round are fresh, so that no engine finds them in its prefix cache.
    """

    name: str
    kind: Literal["decode", "prefill", "prefix", "mixed"]
    requests: Callable[[int], list[Request]]  # of a round
    reads_weights: bool = False  # each token takes a read of all weights: a lower bound


@dataclass(frozen=True)
class Workload:
    """A model, and the requests of all cases."""

    hf: dict[str, Any]  # the content of config.json
    batches: tuple[int, ...]  # that decode: all sequences equally long
    prompt_len: int
    new_tokens: int  # of each, after the first
    prefills: tuple[tuple[int, int], ...]  # number of prompts, and their length
    prefix_len: int  # shared by all requests of a case
    own_len: int  # tokens of each of these prompts after the prefix
    num_sharing: int
    num_requests: int  # of the mixed trace
    prompts: Lengths
    outputs: Lengths
    static_batches: tuple[int, int]  # batch sizes, for a library that forms batches in advance

    def cases(self) -> list[Case]:
        """List all cases, in the order in which they are measured."""
        decodes = [
            Case(f"decode, batch {n}", "decode", lambda r, n=n: self.decode_requests(n, r), n == 1)
            for n in self.batches
        ]
        prefills = [
            Case(
                f"prefill, {n} x {length:,}",
                "prefill",
                lambda r, n=n, length=length: [(p, 1) for p in self._prompts(n, length, r)],
            )
            for n, length in self.prefills
        ]
        prefix = Case(
            f"prefix {self.prefix_len}, {self.num_sharing} requests",
            "prefix",
            self.sharing_requests,
        )
        return [*decodes, *prefills, prefix, Case("mixed trace", "mixed", self.mixed_requests)]

    def decode_requests(self, batch: int, round_number: int = 0) -> list[Request]:
        """Make `batch` prompts of equal length, with one token more than is timed."""
        prompts = self._prompts(batch, self.prompt_len, round_number)
        return [(prompt, self.new_tokens + 1) for prompt in prompts]

    def sharing_requests(self, round_number: int = 0) -> list[Request]:
        """Make requests whose prompts begin with the same tokens, as of a system prompt."""
        [prefix] = self._prompts(1, self.prefix_len, round_number)
        owns = self._prompts(self.num_sharing, self.own_len, round_number)
        return [(prefix + own, self.new_tokens) for own in owns]

    def mixed_requests(self, round_number: int = 0) -> list[Request]:
        """Make requests of very different lengths, as users send them; in every round the same."""
        random = np.random.default_rng(0)
        lengths = list(zip(self.prompts.draw(random), self.outputs.draw(random), strict=True))
        random = np.random.default_rng([round_number, self.num_requests])
        vocab_size = self.hf["vocab_size"]
        return [
            (random.integers(0, vocab_size, prompt).tolist(), output)
            for prompt, output in lengths[: self.num_requests]
        ]

    def _prompts(self, count: int, length: int, round_number: int) -> list[list[int]]:
        random = np.random.default_rng([round_number, count, length])
        return random.integers(0, self.hf["vocab_size"], (count, length)).tolist()


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
        "max_position_embeddings": 4096,
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
    prefills=((1, 2048), (8, 512)),
    prefix_len=512,
    own_len=16,
    num_sharing=16,
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
        "hidden_size": 128,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    batches=(1, 3),
    prompt_len=9,
    new_tokens=5,
    prefills=((1, 40), (3, 20)),
    prefix_len=24,
    own_len=3,
    num_sharing=3,
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
