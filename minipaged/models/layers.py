"""Shared by several models: activations by name, a feed-forward, and multi-head attention."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from minipaged.attention.backend import AttentionBackend
from minipaged.attention.batch import Batch
from minipaged.attention.kv_cache import KVPair
from minipaged.errors import UnsupportedModel
from minipaged.models.linear import Linear, MergedLinear
from minipaged.utils.shapes import Float

Activation = Callable[[Tensor], Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# Keys are the names in Hugging Face's config.json. "gelu_new" and "gelu_pytorch_tanh" are the same
# function: the tanh approximation that GPT-2 was trained with.
ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}


def choose_activation(name: str) -> Activation:
    """Return the activation with this name. Raises UnsupportedModel."""
    if name not in ACTIVATIONS:
        raise UnsupportedModel(
            f"config.json names the activation {name!r}, but only {', '.join(ACTIVATIONS)} are "
            "supported: choose another checkpoint."
        )
    return ACTIVATIONS[name]


class MLP(nn.Module):
    """The feed-forward of GPT-2 and OPT: linear, activation, linear (arXiv 1706.03762, 3.3)."""

    def __init__(self, hidden_size: int, inner_size: int, activation: str) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, inner_size)
        self.down_proj = Linear(inner_size, hidden_size)
        self.activation = choose_activation(activation)

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        inner = self.activation(self.up_proj(x))  # [tokens, inner]
        return self.down_proj(inner)  # [tokens, hidden]


class MultiHeadAttention(nn.Module):
    """Attention of GPT-2 and OPT over the paged cache; one matrix computes q, k and v."""

    def __init__(self, hidden_size: int, head_dim: int, attention: AttentionBackend) -> None:
        super().__init__()
        self.qkv_proj = MergedLinear(hidden_size, 3 * (hidden_size,))
        self.o_proj = Linear(hidden_size, hidden_size)
        self.head_dim = head_dim
        self.backend = attention

    def forward(
        self, x: Float[Tensor, "tokens hidden"], kv: KVPair, batch: Batch
    ) -> Float[Tensor, "tokens hidden"]:
        # -1, not the number of heads: with tensor parallelism, a rank has only its share of them.
        split = (x.shape[0], -1, self.head_dim)
        q, k, v = (part.view(split) for part in self.qkv_proj(x))  # [tokens, heads, head_dim]
        k_cache, v_cache = kv
        # Stored first, because a token also attends to itself, through the cache.
        self.backend.store_kv(k, v, k_cache, v_cache, batch)
        scale = self.head_dim**-0.5
        out = self.backend.paged_attention(q, k_cache, v_cache, batch, scale)
        return self.o_proj(out.flatten(1))  # [tokens, hidden]
