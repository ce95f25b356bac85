# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
"""Add and normalise: adds a layer's result to its input, and normalises the sum (RMSNorm).

What it computes   total = x + delta, in the type of x; and total / sqrt(mean(total^2) + eps) *
                   weight, in float32, rounded once at the end. As in PyTorch, the sum is rounded
                   before it is normalised.
Grid               (tokens,): one program per token, which keeps the whole row in registers.
Bytes              4 * hidden elements per token: two are read and two written. An addition and a
                   norm apart need 5, because the norm reads the sum again. In a decode step, the
                   saving is in launches: one instead of two, twice per layer.
Operations         About 5 per element.

The paper's section 5.1 does not have this kernel; it is common in serving engines.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipaged.attention.triton.launch import on_its_gpu

ELEMENTS_OF_A_WARP = 512  # 16 per thread
MOST_WARPS = 16


@on_its_gpu
def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the sum of `x` and `delta`, and the norm of the sum; all are [tokens, hidden]."""
    assert x.shape == delta.shape, f"{tuple(delta.shape)} is added to {tuple(x.shape)}"
    assert weight.shape == x.shape[1:], f"the weight is {tuple(weight.shape)}"
    for tensor in (x, delta, weight):
        assert tensor.stride(-1) == 1, "the elements of a row are not contiguous"
    num_tokens, hidden = x.shape
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return total, normed
    width = triton.next_power_of_2(hidden)
    add_rms_norm_kernel[(num_tokens,)](
        total,
        normed,
        x,
        delta,
        weight,
        eps,
        x.stride(0),
        delta.stride(0),
        HIDDEN=hidden,
        WIDTH=width,
        num_warps=min(MOST_WARPS, max(1, width // ELEMENTS_OF_A_WARP)),
    )
    return total, normed


@triton.jit
def add_rms_norm_kernel(
    total,  # [tokens, hidden]
    normed,  # [tokens, hidden]
    x,  # [tokens, hidden]
    delta,  # [tokens, hidden]
    weight,  # [hidden]
    eps,
    x_stride,
    delta_stride,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,  # HIDDEN, or the next power of two
):
    """Add and normalise the row of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    mask = columns < HIDDEN
    old = tl.load(x + token * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    new = tl.load(delta + token * delta_stride + columns, mask=mask, other=0.0).to(tl.float32)
    rounded = (old + new).to(total.dtype.element_ty)
    tl.store(total + token * HIDDEN + columns, rounded, mask=mask)
    exact = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, axis=0) / HIDDEN + eps)
    weights = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    result = (exact * scale * weights).to(normed.dtype.element_ty)
    tl.store(normed + token * HIDDEN + columns, result, mask=mask)
