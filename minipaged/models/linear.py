"""Linear layers: several merged into one, and weights packed for fast multiplication on a CPU.

A decode step reads every weight to multiply it by a few vectors. Row-major matrices, as in a file,
are the wrong layout for that: the processor needs the elements that it uses at the same time to be
adjacent. `F.linear` either works with the wrong layout or converts it in every call. oneDNN, which
comes with PyTorch, can convert it once and keep it. `pack_weights` does this.

The two operators are used by `torch.compile` itself, but they are not a public interface. They are
therefore tested first; if they are missing or differ from `F.linear`, nothing is packed.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipaged.models.base import Model
from minipaged.utils.shapes import Float

# Elements. A smaller matrix stays in the processor's cache in any layout: not worth packing.
SMALLEST_TO_PACK = 2**18


class Linear(nn.Linear):
    """Computes x W^T + b, with W in row-major layout or packed."""

    packed_weight: Tensor | None = None  # if set, `weight` is deleted

    def forward(self, input: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        if self.packed_weight is None:
            return F.linear(input, self.weight, self.bias)
        return _packed_linear(input, self.packed_weight, self.bias)

    def pack(self) -> None:
        """Pack the weight, if the matrix is large enough and the processor supports it."""
        if self.packed_weight is not None:
            return
        if self.weight.numel() >= SMALLEST_TO_PACK and can_pack(self.weight.dtype):
            self.packed_weight = _pack(self.weight)
            del self.weight  # do not keep a second copy


class MergedLinear(Linear):
    """Several linear layers with the same input, whose matrices are stacked into one.

    Reading one large matrix takes less time than reading several small ones.
    """

    def __init__(self, in_features: int, sizes: tuple[int, ...], bias: bool = True) -> None:
        super().__init__(in_features, sum(sizes), bias)
        self.sizes = sizes  # number of outputs of each

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Float[Tensor, "rows in"]
    ) -> tuple[Tensor, ...]:
        """Return the outputs of each layer, [rows, size]."""
        return super().forward(input).split(self.sizes, dim=-1)


def pack_weights(model: Model) -> None:
    """Pack the large matrices of a model for inference on a CPU."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack()
    if model.head is None:
        # The embedding is looked up by rows, so it stays unpacked. If the output matrix is tied to
        # it, packing makes a separate copy.
        vocab_size, hidden_size = model.embedding.weight.shape
        head = Linear(hidden_size, vocab_size, bias=False, device="meta")
        head.weight = model.embedding.weight
        head.pack()
        model.head = None if head.packed_weight is None else head


@lru_cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether packed weights of this dtype work here and agree with `F.linear`."""
    random = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, 80, generator=random), torch.randn(48, generator=random)
    weight, bias = weight.to(dtype), bias.to(dtype)
    try:
        packed = _pack(weight)
        for rows in (1, 3, 33):
            x = torch.randn(rows, 80, generator=random).to(dtype)
            exact = F.linear(x.double(), weight.double(), bias.double())
            # torch.testing.assert_close would import sympy, which is large.
            if not _packed_linear(x, packed, bias).double().allclose(exact, rtol=0.01, atol=0.1):
                return False
    except (AttributeError, RuntimeError):
        return False
    return True


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def _packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
