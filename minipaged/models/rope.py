"""Rotary position embedding, RoPE (arXiv 2104.09864): positions as rotation angles.

Each head of a query or key is split into pairs of elements, points in a plane, and each point is
rotated by its token's position times the pair's own frequency. The product of a query and a key
then depends on their distance. Keys are rotated before they are cached, so a cached key is final.
"""

from math import ceil, floor, log, pi

import torch
from torch import Tensor, nn

from minipaged.models.rope_config import RopeConfig
from minipaged.utils.shapes import Float, Int


class Rotary(nn.Module):
    """Computes the rotation angles of tokens: position times the frequency of each pair."""

    frequencies: Float[Tensor, " half"]

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        super().__init__()
        frequencies = rope_frequencies(rope, head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(
        self, positions: Int[Tensor, " tokens"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "tokens 1 half"], Float[Tensor, "tokens 1 half"]]:
        """Cosines and sines, with a dimension that broadcasts over the heads."""
        # In float32 for every model: bfloat16 cannot represent both position 257 and 258.
        angles = positions.float()[:, None, None] * self.frequencies.float()  # [tokens, 1, half]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Float[Tensor, " half"]:
    """Radians by which each pair of elements rotates from one position to the next.

    "linear" slows all pairs, as if positions were closer together. "dynamic" slows the slow pairs
    most, by a larger theta. "llama3" and "yarn" slow only the pairs that did not complete enough
    turns within the original context, with a blend in between. All agree with Hugging Face's
    `modeling_rope_utils`, with one exception:

    In Hugging Face, the theta of "dynamic" grows with the sequence. Cached keys were rotated with
    an earlier theta and would no longer match. Therefore theta is, as in vLLM, the one that Hugging
    Face uses for a sequence as long as the extended context. At shorter lengths the logits differ
    from Hugging Face's, even within the original context, where Hugging Face does not scale.
    """
    theta = rope.theta
    if rope.kind == "dynamic":
        growth = rope.context(rope.old_context) / rope.old_context
        # With a head_dim of 2, the only pair rotates by 1 radian for any theta.
        theta *= (rope.factor * growth - rope.factor + 1) ** (head_dim / max(1, head_dim - 2))
    # An explicit device, because a model may be built under `torch.device("meta")`.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / theta**exponents  # [half]
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind in ("llama3", "yarn"):
        blend = _kept_by_llama3 if rope.kind == "llama3" else _kept_by_yarn
        kept = blend(rope, frequencies)  # [half] 1: unchanged, 0: stretched
        return frequencies * (kept + (1.0 - kept) / rope.factor)
    return frequencies


def _kept_by_llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """The blend is linear in the number of turns within the original context."""
    turns = rope.old_context * frequencies / (2 * pi)  # [half]
    span = rope.high_freq_factor - rope.low_freq_factor
    return ((turns - rope.low_freq_factor) / span).clamp(0.0, 1.0)


def _kept_by_yarn(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """The blend is linear in the pair's index (arXiv 2309.00071; the values follow its code)."""
    half = len(frequencies)

    def pair_with(turns: float) -> float:
        """The fractional index of the pair with this many turns in the original context."""
        return half * log(rope.old_context / (2 * pi * turns)) / log(rope.theta)

    first, last = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        first, last = floor(first), ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    pairs = torch.arange(half, dtype=torch.float32, device="cpu")
    return 1.0 - ((pairs - first) / (last - first or 0.001)).clamp(0.0, 1.0)


def rotate(
    x: Float[Tensor, "tokens any_heads head_dim"],
    cos: Float[Tensor, "tokens 1 half"],
    sin: Float[Tensor, "tokens 1 half"],
) -> Float[Tensor, "tokens any_heads head_dim"]:
    """Rotate each pair by its angle; element i is paired with i + head_dim / 2, as in Hugging Face.

    The paper pairs neighbours; Hugging Face's converted weights have their rows reordered.
    """
    first, second = x.chunk(2, dim=-1)  # [tokens, any_heads, half]
    new_first = (first * cos).addcmul_(second, sin, value=-1)  # first cos - second sin
    new_second = (second * cos).addcmul_(first, sin)  # second cos + first sin
    return torch.cat((new_first, new_second), dim=-1)
