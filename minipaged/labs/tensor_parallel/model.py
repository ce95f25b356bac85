"""A small LLaMA in one process: the reference for the ranks of lab 11.

There is no KV cache: every step computes all tokens again, so that the lab is only about sharding.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import minipaged
from minipaged.attention.reference import causal_attention
from minipaged.errors import InvalidOption
from minipaged.models.rope import Rotary, rotate
from minipaged.models.rope_config import RopeConfig
from minipaged.models.safetensors_reader import copy_tensors, find_weight_files, read_headers
from minipaged.utils.files import read_json_object
from minipaged.utils.shapes import Float, Int


@dataclass(frozen=True)
class Config:
    """The hyperparameters that cannot be read off the weights.

    Args:
        max_tokens: the longest sequence, in tokens.
        theta: the base of the rotary positions.
    """

    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_tokens: int = 64
    theta: float = 10_000.0
    eps: float = 1e-5


@dataclass(frozen=True)
class Linear:
    """A linear layer, or a rank's share of one. The weight has one row per output."""

    weight: Float[Tensor, "outputs inputs"]
    bias: Float[Tensor, " outputs"] | None = None

    def __call__(self, x: Float[Tensor, "tokens inputs"]) -> Float[Tensor, "tokens outputs"]:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Layer:
    """The weights of one transformer layer."""

    attention_norm: Float[Tensor, " hidden"]
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    mlp_norm: Float[Tensor, " hidden"]
    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True)
class Weights:
    """The weights of the whole model. The embedding is also the output matrix."""

    config: Config
    embedding: Float[Tensor, "vocab hidden"]
    layers: tuple[Layer, ...]
    norm: Float[Tensor, " hidden"]


def share(size: int, rank: int, num_ranks: int) -> range:
    """A rank's equal share of range(size): consecutive indices, in the order of the ranks.

    Raises:
        InvalidOption: `num_ranks` does not divide `size`.
    """
    if size % num_ranks:
        raise InvalidOption(
            f"{num_ranks} ranks cannot share {size} equally: choose a number of ranks that divides "
            f"{size}."
        )
    length = size // num_ranks
    return range(rank * length, (rank + 1) * length)


def norm(
    config: Config, x: Float[Tensor, "*tokens hidden"], weight: Float[Tensor, " hidden"]
) -> Float[Tensor, "*tokens hidden"]:
    """RMSNorm: divide each vector by its root mean square, then multiply by `weight`."""
    return F.rms_norm(x, weight.shape, weight, config.eps)


def attend(
    config: Config,
    q: Float[Tensor, "tokens q_outputs"],
    k: Float[Tensor, "tokens kv_outputs"],
    v: Float[Tensor, "tokens kv_outputs"],
) -> Float[Tensor, "tokens q_outputs"]:
    """Causal attention with rotary positions, over any number of heads of one sequence."""
    split = len(q), -1, config.head_dim
    positions = torch.arange(len(q))
    cos, sin = Rotary(RopeConfig(theta=config.theta), config.head_dim)(positions, q.dtype)
    queries, keys = rotate(q.view(split), cos, sin), rotate(k.view(split), cos, sin)
    scale = config.head_dim**-0.5
    return causal_attention(queries, keys, v.view(split), 0, scale).flatten(1)


def whole_logits(weights: Weights, token_ids: list[int]) -> Float[Tensor, " vocab"]:
    """The logits of the next token, computed in one process."""
    config = weights.config
    ids: Int[Tensor, " tokens"] = torch.tensor(token_ids)
    x = weights.embedding[ids]  # [tokens, hidden]
    for layer in weights.layers:
        normed = norm(config, x, layer.attention_norm)
        x = x + layer.o(attend(config, layer.q(normed), layer.k(normed), layer.v(normed)))
        normed = norm(config, x, layer.mlp_norm)
        x = x + layer.down(F.silu(layer.gate(normed)) * layer.up(normed))
    return weights.embedding @ norm(config, x[-1], weights.norm)  # [vocab]


def storyteller() -> Weights:
    """The model that ships with the library."""
    folder = Path(minipaged.__file__).parent / "assets" / "storyteller"
    stored = read_headers(find_weight_files(folder), "model.")
    described = read_json_object(folder / "config.json")

    def tensor(name: str) -> Tensor:
        ours = torch.empty(stored[name].shape)
        copy_tensors([(stored[name], ours)])
        return ours

    def layer(number: int) -> Layer:
        def named(name: str) -> Tensor:
            return tensor(f"layers.{number}.{name}.weight")

        q, k, v, o = (Linear(named(f"self_attn.{each}_proj")) for each in "qkvo")
        gate, up, down = (Linear(named(f"mlp.{each}_proj")) for each in ("gate", "up", "down"))
        norms = named("input_layernorm"), named("post_attention_layernorm")
        return Layer(norms[0], q, k, v, o, norms[1], gate, up, down)

    config = Config(
        vocab_size=described["vocab_size"],
        num_heads=described["num_attention_heads"],
        num_kv_heads=described["num_key_value_heads"],
        head_dim=described["head_dim"],
        max_tokens=described["max_position_embeddings"],
        theta=described["rope_theta"],
        eps=described["rms_norm_eps"],
    )
    layers = tuple(layer(number) for number in range(described["num_hidden_layers"]))
    return Weights(config, tensor("embed_tokens.weight"), layers, tensor("norm.weight"))
