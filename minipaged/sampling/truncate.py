"""Cuts unlikely tokens from a distribution: min_p, top_k and top_p.

Ties are resolved the same way on every device, so the same seed gives the same tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minipaged.utils.device import to_device
from minipaged.utils.shapes import Float, Int


def keep_min_p(
    logits: Float[Tensor, "rows vocab"], min_p: Float[Tensor, "rows 1"]
) -> Float[Tensor, "rows vocab"]:
    """Cut tokens less likely than `min_p` times the likeliest."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + min_p.log(), -torch.inf)


def keep_top_k(
    logits: Float[Tensor, "rows vocab"], top_k: Sequence[int]
) -> Float[Tensor, "rows vocab"]:
    """Cut all tokens less likely than the k-th likeliest; ties stay, as in vLLM."""
    ranks = [min(k, logits.shape[-1]) - 1 for k in top_k]
    likeliest = logits.topk(max(ranks) + 1, dim=-1).values  # [rows, largest k]
    kth = likeliest.gather(-1, to_device(ranks, logits.device)[:, None])
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(
    weights: Int[Tensor, "rows vocab"], top_p: Float[Tensor, "rows 1"], likely: int | None = None
) -> Int[Tensor, "rows vocab"]:
    """Keep the likeliest tokens until their weights sum to `top_p` of the total; cut the others.

    The likeliest always stays; of equal ones, the lower id comes first.

    Sorting the vocabulary would take longer than the rest of sampling. It is enough to find the
    least weight that is kept, which is most often among the thousand largest.

    Args:
        likely: apart from tokens as likely as the last of them, only this many have a weight.
    """
    enough = top_p * weights.sum(-1, keepdim=True)
    largest = _largest(weights, enough, likely)
    before = largest.cumsum(-1) - largest
    last = (before < enough).sum(-1, keepdim=True) - 1
    least = largest.gather(-1, last.clamp(min=0))  # -1 only if no token has a weight
    is_larger, is_least = weights > least, weights == least
    sum_larger = weights.where(is_larger, 0).sum(-1, keepdim=True)
    before = sum_larger + (is_least.cumsum(-1) - 1) * least  # of the tokens with the least weight
    return weights.where(is_larger | (is_least & (before < enough)), 0)


def _largest(weights: Tensor, enough: Tensor, likely: int | None) -> Tensor:
    """The largest weights of each row, in descending order, so many that their sum is enough."""
    vocab_size = weights.shape[-1]
    if likely is not None:
        return weights.topk(min(likely, vocab_size), dim=-1).values
    if not weights.is_cuda:  # where the host would have to wait for the answer
        largest = weights.topk(min(1024, vocab_size), dim=-1).values
        if vocab_size <= 1024 or bool((largest.sum(-1, keepdim=True) >= enough).all()):
            return largest
    return weights.sort(dim=-1, descending=True).values
