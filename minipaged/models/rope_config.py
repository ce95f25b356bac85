"""The options of rotary positions, and how config.json gives them."""

from dataclasses import dataclass
from math import log
from typing import Any, Literal, cast, get_args

from minipaged.errors import CheckpointError, UnsupportedModel
from minipaged.models.base import HFConfig, read_float, read_int

Kind = Literal["default", "linear", "dynamic", "yarn", "llama3"]
MOST_GROWTH = 10_000  # published contexts were extended by at most a few hundred times


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """The frequencies of the rotary embedding, and its scaling to a longer context."""

    theta: float = 10_000.0
    kind: Kind = "default"
    factor: float = 1.0  # all but default: the context was extended by this factor
    old_context: int = 8192  # all but default: the original context, in tokens
    low_freq_factor: float = 1.0  # llama3: pairs with fewer turns in the old context are stretched
    high_freq_factor: float = 4.0  # llama3: pairs with more turns are left unchanged
    beta_slow: float = 1.0  # yarn: its counterpart of low_freq_factor
    beta_fast: float = 32.0  # yarn: its counterpart of high_freq_factor
    truncate: bool = True  # yarn: the range between the two is widened to whole pairs
    attention_factor: float = 1.0  # yarn: multiplies queries and keys

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "RopeConfig":
        """Read `rope_parameters`, or `rope_theta` and `rope_scaling` of older checkpoints.

        Raises:
            CheckpointError: a value of the scaling is missing or invalid.
            UnsupportedModel: the scaling, or rotating only a part of each head, is not supported.
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
                f"config.json rotates {part} of each head, but only whole heads are supported: "
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
        if kind in ("linear", "dynamic"):  # the factor multiplies max_position_embeddings
            return cls(theta=theta, kind=kind, factor=factor, old_context=read_int(hf, now))
        # As in transformers: the value outside the scaling takes precedence; without either, the
        # files do not state an extension.
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
        """Tokens in the longest sequence, where config.json gives this many positions.

        As in vLLM, it is factor times original context: files differ in whether their
        max_position_embeddings is the original context or the extended one. With "llama3" and
        without a scaling it is the extended one.
        """
        if self.kind in ("default", "llama3"):
            return max_position_embeddings
        return int(self.old_context * self.factor)


def _read_parameters(hf: HFConfig) -> dict[str, Any]:
    """Read the RoPE objects of config.json. Raises CheckpointError."""
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
            "config.json has several sets of RoPE parameters, one per kind of layer, but only one "
            "for all layers is supported: choose another checkpoint."
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
        f"config.json scales RoPE as {kind!r}, but only {', '.join(get_args(Kind))} are "
        "supported: choose another checkpoint, or remove the scaling and keep to the original "
        "context."
    )


def _read_scaling(rope: HFConfig, kind: str, name: str) -> float:
    if rope.get(name) is None:
        raise CheckpointError(f"config.json scales RoPE as {kind!r} but gives no {name!r}: add it.")
    return read_float(rope, name, 1.0)


def _read_yarn(rope: HFConfig) -> dict[str, Any]:
    """Read the options of YaRN other than factor and original context. Raises CheckpointError."""
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
    attention_factor = 0.1 * growth + 1.0  # the paper's recommendation
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
