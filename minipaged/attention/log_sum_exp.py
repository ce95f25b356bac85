"""Attention over a part of the keys, and merging the results of two parts.

Let S be the sum of exp(score) over the keys of one part, the denominator of the paper's Equation 4,
and o the output of attention over that part alone. Over the keys of parts 1 and 2 the output is

    (S1 o1 + S2 o2) / (S1 + S2)  =  o1 + share (o2 - o1),    share = S2 / (S1 + S2)

S may overflow, so a part returns its logarithm, the log-sum-exp of its scores. The share of the
second part is then sigmoid(log S2 - log S1). `blockwise` merges by the same rule, one block after
another, with the maximum and the sum apart.
"""

from functools import lru_cache

import torch
from torch import Tensor

from minipaged.utils.shapes import Float

Part = tuple[Float[Tensor, "... head_dim"], Float[Tensor, "..."]]  # output and log-sum-exp


def merge(one: Part, two: Part) -> Float[Tensor, "... head_dim"]:
    """The output of attention over the keys of both parts."""
    (out_one, lse_one), (out_two, lse_two) = one, two
    share = (lse_two - lse_one).sigmoid()[..., None]
    merged = torch.lerp(out_one.to(share.dtype), out_two.to(share.dtype), share)
    return merged.to(out_one.dtype)


def attend_with_lse(
    q: Float[Tensor, "batch kv_heads queries head_dim"],
    keys: Float[Tensor, "batch kv_heads positions head_dim"],
    values: Float[Tensor, "batch kv_heads positions head_dim"],
    mask: Float[Tensor, "batch 1 1 positions"] | None,
    scale: float,
) -> tuple[
    Float[Tensor, "batch kv_heads queries head_dim"], Float[Tensor, "batch kv_heads queries"]
]:
    """Attention over a part of the keys, with the log-sum-exp of the scores."""
    if q.device.type == "cpu" and can_fuse(q.dtype):
        return _fused(q, keys, values, mask, scale)
    return _step_by_step(q, keys, values, mask, scale)


def _step_by_step(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(q * scale, keys.mT)  # [batch, kv_heads, queries, positions]
    weights, lse = softmax_with_lse(scores if mask is None else scores + mask)
    return torch.matmul(weights, values), lse


def softmax_with_lse(
    scores: Float[Tensor, "*batch positions"],
) -> tuple[Float[Tensor, "*batch positions"], Float[Tensor, "*batch"]]:
    """The weights of softmax, and the logarithm of their denominator."""
    exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = exact.softmax(-1)
    # The largest weight is exp(0) / S, and its score is the maximum that softmax subtracted.
    lse = exact.amax(-1) - weights.amax(-1).log()
    return weights.to(scores.dtype), lse


def _fused(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attention(q, keys, values, attn_mask=mask, scale=scale)


@lru_cache
def can_fuse(dtype: torch.dtype) -> bool:
    """Whether PyTorch's attention returns a log-sum-exp here that agrees with plain attention.

    The operator is the one that SDPA calls on a CPU, but it is not a public interface.
    """
    random = torch.Generator().manual_seed(0)
    q, keys, values = (torch.randn(2, 3, n, 8, generator=random).double() for n in (5, 40, 40))
    mask = torch.zeros(2, 1, 1, 40).masked_fill(torch.arange(40) > 30, -torch.inf)
    try:
        for hidden in (None, mask):
            expected = _step_by_step(q, keys, values, hidden, 0.3)
            hidden = None if hidden is None else hidden.to(dtype)
            found = _fused(q.to(dtype), keys.to(dtype), values.to(dtype), hidden, 0.3)
            pairs = zip(found, expected, strict=True)
            if not all(a.double().allclose(b, rtol=0.01, atol=0.05) for a, b in pairs):
                return False
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return True
