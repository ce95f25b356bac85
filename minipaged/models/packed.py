"""Packed: forms in which a CPU keeps a large matrix, so that it is read and multiplied fast.

A decode step reads every weight to multiply it by a few vectors. Row-major matrices, as in a file,
are the wrong layout for that: the processor needs the elements that it uses at the same time to be
adjacent. `F.linear` either works with the wrong layout or converts it in every call. Two libraries
that come with PyTorch convert it once and keep it:

    InOneDNN     the elements as they are, reordered
    InFloat16    (FBGEMM) the elements in float16, multiplied as float32: half the bytes to read

A product with few rows takes as long as reading the matrix, so half the bytes take less time. Most
models are published in bfloat16 or float16. Their elements are numbers of float16 too, but for very
small and very large ones, so almost nothing is lost by keeping them so; `fits_float16` checks it.

The operators are not a public interface of PyTorch. Each form is therefore tested first; if its
operators are missing or differ from `F.linear`, it is not used.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minipaged.config import WeightDType
from minipaged.errors import InvalidOption
from minipaged.utils.shapes import Float

# Largest error of an element in float16, relative to the largest element of its matrix. What was
# saved in half precision is exact, except numbers below 2^-14: they get errors of up to 2^-25. A
# matrix saved in float32 has errors of up to 2^-12.
LARGEST_ERROR = 2**-16


class InOneDNN:
    """A matrix with its own elements, reordered by oneDNN."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = bias
        self.num_bytes = weight.numel() * weight.itemsize

    def multiply(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """Compute x W^T + b."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class InFloat16:
    """A matrix with elements in float16, for products in float32."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        bias = None if bias is None else bias.detach()
        self.packed: Any = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        self.num_bytes = weight.numel() * torch.float16.itemsize

    def multiply(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """Compute x W^T + b."""
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


Packed = InOneDNN | InFloat16


def choose_form(weight: Float[Tensor, "out in"], weight_dtype: WeightDType) -> type[Packed] | None:
    """Return the form to keep this matrix in; None: in none, because none works here.

    Raises:
        InvalidOption: an element is beyond the range of float16, which was asked for.
    """
    if weight_dtype == "float16":
        _refuse_beyond_float16(weight)
        return InFloat16
    is_half = weight_dtype == "auto" and weight.dtype == torch.float32 and works(InFloat16)
    if is_half and fits_float16(weight):
        return InFloat16
    return InOneDNN if works(InOneDNN, weight.dtype) else None


def _refuse_beyond_float16(weight: Tensor) -> None:
    largest = float(weight.abs().max())
    if largest > torch.finfo(torch.float16).max:
        raise InvalidOption(
            f"weight_dtype is 'float16', but a weight of this model is {largest:.3g}, and float16 "
            "ends at 65504: leave out weight_dtype.",
            "weight_dtype",
        )


def fits_float16(weight: Float[Tensor, "out in"]) -> bool:
    """Whether float16 keeps the elements as they are, but for a negligible difference."""
    error = weight.half().float().sub_(weight).abs_().max()  # inf for a number beyond its range
    return bool(error <= LARGEST_ERROR * weight.abs().max())


@lru_cache
def works(form: type[Packed], dtype: torch.dtype = torch.float32) -> bool:
    """Whether this form works here for this dtype and agrees with `F.linear`."""
    random = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, 80, generator=random), torch.randn(48, generator=random)
    weight, bias = weight.half().to(dtype), bias.to(dtype)
    try:
        packed = form(weight, bias)
        for rows in (1, 3, 33):
            x = torch.randn(rows, 80, generator=random).to(dtype)
            exact = F.linear(x.double(), weight.double(), bias.double())
            # torch.testing.assert_close would import sympy, which is large.
            if not packed.multiply(x).double().allclose(exact, rtol=0.01, atol=0.1):
                return False
    except (AttributeError, RuntimeError):
        return False
    return True
