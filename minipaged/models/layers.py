"""The little that several models share: activations by name, and the two-matrix feed-forward."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from minipaged.errors import UnsupportedModel
from minipaged.models.linear import Linear
from minipaged.utils.shapes import Float

Activation = Callable[[Tensor], Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# By the names that Hugging Face's config.json uses. "gelu_new" and "gelu_pytorch_tanh" are one
# function: the approximation by a tanh that GPT-2 was trained with.
ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}


def choose_activation(name: str) -> Activation:
    """The activation of this name. Raises UnsupportedModel."""
    if name not in ACTIVATIONS:
        raise UnsupportedModel(
            f"config.json asks for the activation {name!r}, and only {', '.join(ACTIVATIONS)} are "
            "built here: choose another checkpoint."
        )
    return ACTIVATIONS[name]


class MLP(nn.Module):
    """Widen, bend, narrow: the feed-forward of GPT-2 and OPT ("Attention Is All You Need", 3.3)."""

    def __init__(self, hidden_size: int, inner_size: int, activation: str) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, inner_size)
        self.down_proj = Linear(inner_size, hidden_size)
        self.activation = choose_activation(activation)

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        inner = self.activation(self.up_proj(x))  # [tokens, inner]
        return self.down_proj(inner)  # [tokens, hidden]
