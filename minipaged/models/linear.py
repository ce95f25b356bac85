"""Linear layers, several of one input as one, and their weights laid out as a CPU multiplies best.

A decode step reads every weight to multiply it with a few vectors. Rows of a matrix, as a file
holds them, are the wrong form for that: the processor wants the numbers side by side that it needs
at the same time. `F.linear` either makes do or lays them out anew in every call. oneDNN, which
comes with PyTorch, can pack them once and keep them so. That is what `pack_weights` does.

The two operators are those that `torch.compile` itself uses, but no public interface. So they are
tried out first, and where they are absent or do not give what `F.linear` gives, nothing is packed.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipaged.models.base import Model
from minipaged.utils.shapes import Float

# A matrix of fewer numbers stays in the processor's cache, in whatever form: not worth packing.
SMALLEST_TO_PACK = 2**18


class Linear(nn.Linear):
    """x W^T + b, with W as it was trained, or packed."""

    packed_weight: Tensor | None = None  # once there is one, `weight` is gone

    def forward(self, input: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        if self.packed_weight is None:
            return F.linear(input, self.weight, self.bias)
        return _packed_linear(input, self.packed_weight, self.bias)

    def pack(self) -> None:
        """Replace the weight by its packed form, if this processor has one for it."""
        if self.packed_weight is not None:
            return
        if self.weight.numel() >= SMALLEST_TO_PACK and can_pack(self.weight.dtype):
            self.packed_weight = _pack(self.weight)
            del self.weight  # there shall be no second copy


class MergedLinear(Linear):
    """Several linear layers of one input, with their matrices stacked into one.

    Reading one large matrix takes less time than reading several small ones.
    """

    def __init__(self, in_features: int, sizes: tuple[int, ...], bias: bool = True) -> None:
        super().__init__(in_features, sum(sizes), bias)
        self.sizes = sizes  # how many outputs each of them has

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Float[Tensor, "rows in"]
    ) -> tuple[Tensor, ...]:
        """The outputs of each, [rows, size]."""
        return super().forward(input).split(self.sizes, dim=-1)


def pack_weights(model: Model) -> None:
    """Pack the large matrices of a model that only generates from now on, on a CPU."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack()
    if model.head is None:
        # An embedding is looked up by rows, an output matrix is multiplied with: where they are
        # one, packing makes them two.
        vocab_size, hidden_size = model.embedding.weight.shape
        head = Linear(hidden_size, vocab_size, bias=False, device="meta")
        head.weight = model.embedding.weight
        head.pack()
        model.head = None if head.packed_weight is None else head


@lru_cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether packed weights of this type work here, and give what `F.linear` gives."""
    random = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, 80, generator=random), torch.randn(48, generator=random)
    weight, bias = weight.to(dtype), bias.to(dtype)
    try:
        packed = _pack(weight)
        for rows in (1, 3, 33):
            x = torch.randn(rows, 80, generator=random).to(dtype)
            exact = F.linear(x.double(), weight.double(), bias.double())
            torch.testing.assert_close(
                _packed_linear(x, packed, bias).double(), exact, rtol=0.01, atol=0.1
            )
    except (AttributeError, RuntimeError, AssertionError):
        return False
    return True


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def _packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
