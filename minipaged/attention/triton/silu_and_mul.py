# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
"""SiLU and multiply: the gate of a feed-forward (SwiGLU), silu(gate) * up.

What it computes   gate / (1 + e^-gate) in float32, rounded to the model's type as in PyTorch, times
                   up.
Grid               (tokens, chunks of a row).
Bytes              3 * inner elements per token: two are read and one is written. Two operations
                   need 5, because the product reads the activation again. Both inputs are halves of
                   one matrix product's result, and are not copied.
Operations         About 4 per element.

The paper's section 5.1 does not have this kernel; it is common in serving engines.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipaged.attention.triton.launch import on_its_gpu

CHUNK = 1024  # elements per program


@on_its_gpu
def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up; all are [tokens, inner]."""
    assert gate.shape == up.shape, f"{tuple(gate.shape)} of gate, {tuple(up.shape)} of up"
    for tensor in (gate, up):
        assert tensor.stride(-1) == 1, "the elements of a row are not contiguous"
    num_tokens, inner = gate.shape
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if num_tokens == 0:
        return out
    chunk = min(CHUNK, triton.next_power_of_2(inner))
    silu_and_mul_kernel[(num_tokens, triton.cdiv(inner, chunk))](
        out, gate, up, gate.stride(0), up.stride(0), INNER=inner, CHUNK=chunk
    )
    return out


@triton.jit
def silu_and_mul_kernel(
    out,  # [tokens, inner]
    gate,  # [tokens, inner]
    up,  # [tokens, inner]
    gate_stride,
    up_stride,
    INNER: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Compute one chunk of one token's row."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    mask = columns < INNER
    gates = tl.load(gate + token * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    ups = tl.load(up + token * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    power = tl.exp(-tl.abs(gates))  # at most 1: it cannot overflow
    activation = gates * tl.where(gates < 0, power, 1.0) / (1 + power)
    activation = activation.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * INNER + columns, (activation * ups).to(out.dtype.element_ty), mask=mask)
