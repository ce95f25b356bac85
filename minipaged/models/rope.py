"""Rotary position embedding, RoPE (arXiv 2104.09864): a position is an angle, or rather many.

Each head of a query or key is cut into pairs of numbers, points in a plane, and each point is
turned by its token's position times the pair's own frequency. The product of a query and a key then
depends on their distance. Keys are turned before they are cached, so a cached key never
has to be touched again.
"""

from dataclasses import dataclass
from math import ceil, floor, log, pi
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from minipaged.errors import CheckpointError, UnsupportedModel
from minipaged.models.base import HFConfig, read_float, read_int
from minipaged.utils.shapes import Float, Int

Kind = Literal["default", "linear", "dynamic", "yarn", "llama3"]
MOST_GROWTH = 10_000  # no published context grew by more than a few hundred


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How fast the rotary embedding turns, and how it was stretched to a longer context."""

    theta: float = 10_000.0
    kind: Kind = "default"
    factor: float = 1.0  # all but default: the context grew by this factor
    old_context: int = 8192  # all but default: the context, in tokens, before it grew
    low_freq_factor: float = 1.0  # llama3: fewer turns than this within the old context: stretch
    high_freq_factor: float = 4.0  # llama3: more turns than this: leave alone
    beta_slow: float = 1.0  # yarn: what low_freq_factor is to llama3
    beta_fast: float = 32.0  # yarn: what high_freq_factor is to llama3
    truncate: bool = True  # yarn: the range between the two is widened to whole pairs
    attention_factor: float = 1.0  # yarn: multiplies queries and keys

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "RopeConfig":
        """Read `rope_parameters`, or `rope_theta` and `rope_scaling` of older checkpoints.

        Raises:
            CheckpointError: the scaling lacks one of its numbers, or has one that cannot be.
            UnsupportedModel: a scaling, or rotating a part of each head, that is not built here.
        """
        rope = _read_parameters(hf)
        theta = read_float(rope if rope.get("rope_theta") else hf, "rope_theta", 10_000.0)
        if theta <= 1:
            raise CheckpointError(
                f"config.json gives rope_theta as {theta:g}: correct it to a number above 1."
            )
        part = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
        if part != 1.0:
            raise UnsupportedModel(
                f"config.json rotates {part} of each head, and only whole heads are rotated here: "
                "choose a checkpoint with partial_rotary_factor 1."
            )
        kind = _read_kind(rope)
        if kind == "default":
            return cls(theta=theta)
        factor = _read_scaling(rope, kind, "factor")
        if not 1 <= factor <= MOST_GROWTH:
            raise CheckpointError(
                f"config.json scales RoPE by the factor {factor:g}: correct it to a number from 1 "
                f"to {MOST_GROWTH:,}."
            )
        old, now = "original_max_position_embeddings", "max_position_embeddings"
        if kind in ("linear", "dynamic"):  # max_position_embeddings is what they multiply
            return cls(theta=theta, kind=kind, factor=factor, old_context=read_int(hf, now))
        # As in transformers: the number outside the scaling counts first, and without any the
        # context was not extended in writing.
        source = hf if hf.get(old) else rope
        old_context = read_int(source, old) if source.get(old) else read_int(hf, now)
        if kind == "yarn":
            return cls(theta=theta, factor=factor, old_context=old_context, **_read_yarn(rope))
        return cls(
            theta=theta,
            kind="llama3",
            factor=factor,
            low_freq_factor=_read_scaling(rope, kind, "low_freq_factor"),
            high_freq_factor=_read_scaling(rope, kind, "high_freq_factor"),
            old_context=old_context,
        )

    def context(self, max_position_embeddings: int) -> int:
        """Tokens in the longest sequence, when config.json gives this many positions.

        As in vLLM, factor and old context decide: files differ in whether their
        max_position_embeddings is the old context or the extended one. For "llama3" and without a
        scaling it is the extended one.
        """
        if self.kind in ("default", "llama3"):
            return max_position_embeddings
        return int(self.old_context * self.factor)


def _read_parameters(hf: HFConfig) -> dict[str, Any]:
    """All that config.json has on RoPE in objects of their own. Raises CheckpointError."""
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = hf.get(name) or {}  # many files have null for "not scaled"
        if not isinstance(value, dict):
            raise CheckpointError(
                f"config.json gives {name} as {value!r}: correct it to an object such as "
                '{"rope_type": "linear", "factor": 2.0}, or to null.'
            )
        rope |= cast(dict[str, Any], value)
    if any(isinstance(value, dict) for value in rope.values()):
        raise UnsupportedModel(
            "config.json has several sets of RoPE parameters, one per kind of layer, and only one "
            "for all layers is built here: choose another checkpoint."
        )
    return rope


def _read_kind(rope: HFConfig) -> Kind:
    kind: Any = rope.get("rope_type") or rope.get("type")
    if kind is None and rope.get("factor") is not None:
        raise CheckpointError(
            "config.json scales RoPE by a factor but names no rope_type: add one of "
            f"{', '.join(get_args(Kind)[1:])}."
        )
    if kind is None or kind in get_args(Kind):
        return kind or "default"
    raise UnsupportedModel(
        f"config.json scales RoPE as {kind!r}, and only {', '.join(get_args(Kind))} are built "
        "here: choose another checkpoint, or remove the scaling and keep to the old context."
    )


def _read_scaling(rope: HFConfig, kind: str, name: str) -> float:
    if rope.get(name) is None:
        raise CheckpointError(f"config.json scales RoPE as {kind!r} but gives no {name!r}: add it.")
    return read_float(rope, name, 1.0)


def _read_yarn(rope: HFConfig) -> dict[str, Any]:
    """The options of YaRN other than factor and old context. Raises CheckpointError."""
    slow, fast = read_float(rope, "beta_slow", 1.0), read_float(rope, "beta_fast", 32.0)
    if fast < slow:
        raise CheckpointError(
            f"config.json gives beta_fast as {fast:g}, below beta_slow, which is {slow:g}: correct "
            "one of them."
        )
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise CheckpointError(
            f"config.json gives truncate as {truncate!r}: correct it to true or false."
        )
    growth = log(_read_scaling(rope, "yarn", "factor"))
    attention_factor = 0.1 * growth + 1.0  # what the paper recommends
    if rope.get("mscale") and rope.get("mscale_all_dim"):  # DeepSeek's
        whole, part = (read_float(rope, name, 1.0) for name in ("mscale", "mscale_all_dim"))
        attention_factor = (0.1 * whole * growth + 1.0) / (0.1 * part * growth + 1.0)
    return {
        "kind": "yarn",
        "beta_slow": slow,
        "beta_fast": fast,
        "truncate": truncate,
        "attention_factor": read_float(rope, "attention_factor", attention_factor),
    }


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

    "linear" slows all of them, as if positions were closer. "dynamic" slows the slow pairs most, by
    a larger theta. "llama3" and "yarn" slow only those that turned too seldom within the old
    context to have been seen all round, and blend in between. All agree with Hugging Face's
    `modeling_rope_utils`, except for one choice:

    Hugging Face lets the theta of "dynamic" grow with the sequence. Keys in the cache were turned
    with the theta of their time, and would no longer fit. So theta is, as in vLLM, the one that
    Hugging Face uses for a sequence as long as the extended context; at shorter lengths the logits
    differ from Hugging Face's, also below the old context, where it does not scale at all.
    """
    theta = rope.theta
    if rope.kind == "dynamic":
        growth = rope.context(rope.old_context) / rope.old_context
        # Of two numbers in a head the only pair turns by 1 radian, whatever theta is.
        theta *= (rope.factor * growth - rope.factor + 1) ** (head_dim / max(1, head_dim - 2))
    # The device is named since a model may be built under `torch.device("meta")`.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / theta**exponents  # [half]
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind in ("llama3", "yarn"):
        blend = _kept_by_llama3 if rope.kind == "llama3" else _kept_by_yarn
        kept = blend(rope, frequencies)  # [half] 1: as it was, 0: stretched
        return frequencies * (kept + (1.0 - kept) / rope.factor)
    return frequencies


def _kept_by_llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """The blend is linear in turns within the old context."""
    turns = rope.old_context * frequencies / (2 * pi)  # [half]
    span = rope.high_freq_factor - rope.low_freq_factor
    return ((turns - rope.low_freq_factor) / span).clamp(0.0, 1.0)


def _kept_by_yarn(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """The blend is linear in the pair's number (arXiv 2309.00071; the numbers follow its code)."""
    half = len(frequencies)

    def pair_with(turns: float) -> float:
        """The number of the pair that turns so often in the old context, rarely a whole one."""
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
    """Turn each pair of numbers by its angle; i is paired with i + head_dim / 2, as HF stores it.

    The paper pairs neighbours; Hugging Face's converted weights have their rows reordered for this.
    """
    first, second = x.chunk(2, dim=-1)  # [tokens, any_heads, half]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
