"""Linear layers: several merged into one, and weights packed for fast multiplication on a CPU."""

import torch.nn.functional as F
from torch import Tensor, nn

from minipaged.config import WeightDType
from minipaged.models.base import Model
from minipaged.models.packed import Packed, choose_form
from minipaged.utils.shapes import Float

# Elements. A smaller matrix stays in the processor's cache in any layout: not worth packing.
SMALLEST_TO_PACK = 2**18


class Linear(nn.Linear):
    """Computes x W^T + b, with W in row-major layout or packed."""

    packed: Packed | None = None  # if set, `weight` is deleted

    def forward(self, input: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        if self.packed is None:
            return F.linear(input, self.weight, self.bias)
        return self.packed.multiply(input)

    def pack(self, weight_dtype: WeightDType = "auto") -> None:
        """Pack the weight, if the matrix is large enough and the processor supports it.

        Raises:
            InvalidOption: see `choose_form`.
        """
        if self.packed is not None:
            return
        if self.weight.numel() < SMALLEST_TO_PACK and weight_dtype != "float16":
            return
        weight = self.weight.detach()
        if form := choose_form(weight, weight_dtype):
            self.packed = form(weight, self.bias)
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


def pack_weights(model: Model, weight_dtype: WeightDType = "auto") -> None:
    """Pack the large matrices of a model for inference on a CPU.

    Args:
        weight_dtype: "float32" keeps the elements as they are, "float16" rounds those of all
            matrices, also small ones. "auto" uses float16 for matrices that fit in it.

    Raises:
        InvalidOption: an element is beyond the range of float16, which was asked for.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack(weight_dtype)
    if model.head is None:
        # The embedding is looked up by rows, so it stays unpacked. If the output matrix is tied to
        # it, packing makes a separate copy.
        vocab_size, hidden_size = model.embedding.weight.shape
        head = Linear(hidden_size, vocab_size, bias=False, device="meta")
        head.weight = model.embedding.weight
        head.pack(weight_dtype)
        model.head = None if head.packed is None else head
