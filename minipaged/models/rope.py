"""Rotary position embedding, RoPE (arXiv 2104.09864): a position is an angle, or rather many.

Each head of a query or key is cut into pairs of numbers, points in a plane, and each point is
turned by its token's position times the pair's own frequency. The product of a query and a key then
depends on how far apart they stand. Keys are turned before they are cached, so a cached key never
has to be touched again.
"""

from dataclasses import dataclass
from math import pi
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minipaged.errors import CheckpointError, UnsupportedModel
from minipaged.models.base import HFConfig, read_float, read_int
from minipaged.utils.shapes import Float, Int


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How fast the rotary embedding turns, and how it was stretched to a longer context."""

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0  # linear, llama3: the context grew by this factor
    low_freq_factor: float = 1.0  # llama3: fewer turns than this within the old context: stretch
    high_freq_factor: float = 4.0  # llama3: more turns than this: leave alone
    old_context: int = 8192  # llama3: the context, in tokens, before it grew

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "RopeConfig":
        """Read `rope_parameters`, or `rope_theta` and `rope_scaling` of older checkpoints.

        Raises:
            CheckpointError: the scaling lacks one of its numbers.
            UnsupportedModel: a scaling, or rotating a part of each head, that is not built here.
        """
        # Many files say null for "not scaled".
        rope: dict[str, Any] = (hf.get("rope_scaling") or {}) | (hf.get("rope_parameters") or {})
        theta = read_float(rope if rope.get("rope_theta") else hf, "rope_theta", 10_000.0)
        part = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
        if part != 1.0:
            raise UnsupportedModel(
                f"config.json rotates {part} of each head, and only whole heads are rotated here: "
                "choose a checkpoint with partial_rotary_factor 1."
            )
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return cls(theta=theta)
        if kind == "linear":
            return cls(theta=theta, kind="linear", factor=_read_scaling(rope, kind, "factor"))
        if kind == "llama3":
            old, now = "original_max_position_embeddings", "max_position_embeddings"
            return cls(
                theta=theta,
                kind="llama3",
                factor=_read_scaling(rope, kind, "factor"),
                low_freq_factor=_read_scaling(rope, kind, "low_freq_factor"),
                high_freq_factor=_read_scaling(rope, kind, "high_freq_factor"),
                old_context=read_int(rope, old) if rope.get(old) else read_int(hf, now),
            )
        raise UnsupportedModel(
            f"config.json scales RoPE as {kind!r}, and only default, linear and llama3 are built "
            "here: choose another checkpoint, or remove the scaling and keep to the old context."
        )


def _read_scaling(rope: HFConfig, kind: str, name: str) -> float:
    if rope.get(name) is None:
        raise CheckpointError(f"config.json scales RoPE as {kind!r} but gives no {name!r}: add it.")
    return read_float(rope, name, 1.0)


class Rotary(nn.Module):
    """The angles by which a token is turned: its position times a frequency for each pair."""

    frequencies: Float[Tensor, " half"]

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        super().__init__()
        frequencies = rope_frequencies(rope, head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(
        self, positions: Int[Tensor, " tokens"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "tokens 1 half"], Float[Tensor, "tokens 1 half"]]:
        """Cosines and sines, with a dimension to be repeated over the heads."""
        # In float32 whatever the model's own: bfloat16 cannot tell position 257 from 258.
        angles = positions.float()[:, None, None] * self.frequencies.float()  # [tokens, 1, half]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Float[Tensor, " half"]:
    """Radians that each pair of numbers turns from one position to the next.

    "linear" slows all of them, as if positions lay closer. "llama3" slows only those that turned
    too seldom within the old context to have been seen all round, and blends in between (as
    Hugging Face's `_compute_llama3_parameters` has it, put in turns rather than wavelengths).
    """
    # The device is named since a model may be built under `torch.device("meta")`.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / rope.theta**exponents  # [half]
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        turns = rope.old_context * frequencies / (2 * pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        kept = ((turns - rope.low_freq_factor) / span).clamp(0.0, 1.0)
        return frequencies * (kept + (1.0 - kept) / rope.factor)
    return frequencies


def rotate(
    x: Float[Tensor, "tokens any_heads head_dim"],
    cos: Float[Tensor, "tokens 1 half"],
    sin: Float[Tensor, "tokens 1 half"],
) -> Float[Tensor, "tokens any_heads head_dim"]:
    """Turn each pair of numbers by its angle; i is paired with i + head_dim / 2, as HF stores it.

    The paper pairs neighbours; Hugging Face's converted weights have their rows reordered for this.
    """
    first, second = x.chunk(2, dim=-1)  # [tokens, any_heads, half]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
