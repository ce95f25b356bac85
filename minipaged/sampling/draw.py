"""The random stages of the sampler: temperature, min_p, top_k, top_p, and the draw of a token.

The same seed gives the same tokens. A draw needs one random number, which is a hash of the row's
seed and the number of generated tokens (`uniform`). There is no generator whose state could depend
on the batch, or would have to be saved when a sequence is preempted.

The draw uses integers. Weights are rounded once, element by element, so their sums are exact in any
order. The same row of logits therefore gives the same token in any batch, a token of weight zero is
never drawn, and no rounding can move the draw past the last token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minipaged.sampling.row_tensors import asking, column
from minipaged.sampling.rows import SamplingRow
from minipaged.sampling.truncate import keep_min_p, keep_top_k, keep_top_p
from minipaged.utils.device import to_device
from minipaged.utils.shapes import Float, Int

WEIGHT_OF_LIKELIEST = 2**40
"""Tokens 2^40 times less likely than the likeliest are never drawn. 2^23 tokens still sum up to
less than 2^63."""


def draw(logits: Float[Tensor, "rows vocab"], rows: Sequence[SamplingRow]) -> Int[Tensor, " rows"]:
    """Draw one token per row, by a random number's place in the cumulative sum of weights.

    A row of broken logits gets an arbitrary token, so that the other rows continue.
    """
    random = [uniform(row.seed, row.position) for row in rows]
    ends = draw_weights(logits, rows).cumsum(-1)  # [rows, vocab]
    total = ends[:, -1:]  # [rows, 1]
    target = column(random, logits.device, torch.float64) * total
    # In [0, total): a double may round the product up to the total itself.
    target = torch.minimum(target.long(), total - 1)
    return torch.searchsorted(ends, target, right=True)[:, 0]  # the first that ends beyond it


def draw_weights(
    logits: Float[Tensor, "rows vocab"], rows: Sequence[SamplingRow]
) -> Int[Tensor, "rows vocab"]:
    """Return integers in proportion to the probabilities of the tokens."""
    device, params = logits.device, [row.params for row in rows]
    logits = logits / column([p.temperature for p in params], device)
    if some := asking(rows, lambda p: p.min_p > 0):
        floor = column([params[i].min_p for i in some], device)
        places = to_device(some, device)
        logits[places] = keep_min_p(logits[places], floor)
    if some := asking(rows, lambda p: p.top_k > 0):
        places = to_device(some, device)
        logits[places] = keep_top_k(logits[places], [params[i].top_k for i in some])
    relative = (logits - logits.amax(-1, keepdim=True)).exp()  # the likeliest is 1
    weights = (relative.nan_to_num(0) * WEIGHT_OF_LIKELIEST).long()
    if some := asking(rows, lambda p: p.top_p < 1):
        top_p = column([params[i].top_p for i in some], device, torch.float64)
        places = to_device(some, device)
        most = [params[i].top_k for i in some]
        weights[places] = keep_top_p(weights[places], top_p, max(most) if min(most) > 0 else None)
    return weights


_64_BITS = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """Return the random number in [0, 1) of the token at this position of the output.

    The seed is mixed before the position is added. Otherwise the numbers of seed 1 would be those
    of seed 0, shifted by one position.
    """
    return (_mix(_mix(seed) + position) >> 11) * 2.0**-53  # 53 bits, the precision of a float


def _mix(x: int) -> int:
    """splitmix64 (Steele et al. 2014): a bijection of 64 bits in which each bit affects all."""
    x = (x + 0x9E3779B97F4A7C15) & _64_BITS
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _64_BITS
    return x ^ (x >> 31)
