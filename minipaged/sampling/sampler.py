"""From a row of logits to one token, for all rows of a step at once.

A request's row passes these stages, in this order, as in vLLM and in transformers:

    what `adjust` changes, a custom part  change which token is likeliest
    argmax                                a greedy row ends here
    temperature, min_p, top_k, top_p      shape and cut what is drawn from
    draw                                  one token, by one random number

A stage works on those rows alone that ask for it and is not entered if none does: a batch of plain
greedy requests costs one argmax, and no row can notice how its neighbours are sampled.

Same seed, same tokens. A draw needs one random number, and that is a hash of the row's seed and of
how many tokens the sequence has generated (`uniform`). There is no generator whose state could
depend on the batch, or would have to be saved when a sequence is preempted.

The draw itself counts in whole numbers. Weights are rounded to integers once, element by element;
from there on sums are exact, whatever order the device adds in. So the same row of logits yields
the same token alone or in any company, a token of weight zero is never drawn, and no rounding can
push the draw past the last token.

On a GPU nothing here waits for it but the very end, where all results come to the host at once.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minipaged.sampling.adjust import adjust
from minipaged.sampling.explain import explain_error
from minipaged.sampling.params import GREEDY_BELOW
from minipaged.sampling.row_tensors import asking, column
from minipaged.sampling.rows import SampledToken, SamplingRow
from minipaged.utils.device import to_device
from minipaged.utils.shapes import Bool, Float, Int

WEIGHT_OF_LIKELIEST = 2**40
"""Tokens 2^40 times less likely than the likeliest are never drawn. 2^23 tokens still sum up to
less than 2^63."""


AdjustLogits = Callable[[Tensor, Sequence[SamplingRow]], Tensor]
"""A custom part: the logits of all rows, [rows, vocab], to others of the same shape."""


class Sampler:
    """Chooses the next token of every row. Holds nothing between steps.

    Args:
        adjust_logits: a custom part, called after `adjust` with the logits of all rows.
    """

    def __init__(self, adjust_logits: AdjustLogits | None = None) -> None:
        self._adjust_logits = adjust_logits

    def sample(
        self, logits: Float[Tensor, "rows vocab"], rows: Sequence[SamplingRow]
    ) -> list[SampledToken]:
        """The next token of each row; row i of the logits belongs to `rows[i]`. Keeps `logits`."""
        assert len(rows) == logits.shape[0], f"{len(rows)} rows for {logits.shape[0]} of logits"
        raw = adjusted = logits.float()
        faults: dict[int, Exception] = {}
        params = [row.params for row in rows]
        if any(each.adjusts_logits for each in params):
            adjusted, faults = adjust(raw, rows)
        if self._adjust_logits is not None:
            adjusted = self._adjust_logits(adjusted.clone(), rows)
        token_ids = adjusted.argmax(-1)  # [rows]; the lowest id of equals
        has_choice = None if adjusted is raw else adjusted.gather(-1, token_ids[:, None]).isfinite()
        chance = [i for i, each in enumerate(params) if each.temperature >= GREEDY_BELOW]
        if chance:
            places = to_device(chance, logits.device)
            token_ids[places] = draw(adjusted[places], [rows[i] for i in chance])
        sampled = score(raw, token_ids, [each.logprobs for each in params], has_choice)
        for i, token in enumerate(sampled):
            if math.isnan(token.logprob):
                sampled[i] = token._replace(error=explain_error(raw[i], adjusted[i]))
        for i, fault in faults.items():
            sampled[i] = sampled[i]._replace(error=fault)
        return sampled


# -- Logprobs ---------------------------------------------------------------------------------


def score(
    logits: Float[Tensor, "rows vocab"],
    token_ids: Sequence[int] | Int[Tensor, " rows"],
    num_top: Sequence[int | None],
    has_choice: Bool[Tensor, "rows 1"] | None = None,
) -> list[SampledToken]:
    """How likely the model found one token in each row, and which others it found likeliest.

    Serves prompts too: with the logits of prompt positions and the tokens that came next there, it
    gives `prompt_logprobs`. `num_top[i]` is how many of the likeliest are wanted; -1: all, None:
    none, nor the rank.
    The logprob is NaN where `has_choice` is False, and in rows with NaN, +inf or nothing but -inf.
    """
    logprobs = logits.float().log_softmax(-1)
    chosen = to_device(token_ids, logits.device, torch.long)[:, None]  # [rows, 1]
    results = [chosen, logprobs.gather(-1, chosen)]
    if has_choice is not None:
        results[1] = results[1].where(has_choice, torch.nan)
    vocab_size = logits.shape[-1]
    asked = [vocab_size if n == -1 else min(n, vocab_size) for n in num_top if n is not None]
    most = max(asked, default=0)
    if asked:
        results.append((logprobs > results[1]).sum(-1, keepdim=True) + 1)  # the rank
    if most > 0:
        values, top_ids = logprobs.topk(most, dim=-1)  # [rows, most], of rows that do not ask too
        results += [top_ids, values]
    # All in one table, for each transfer waits for the GPU. Doubles hold any id exactly.
    table = torch.cat([result.double() for result in results], dim=-1).tolist()
    if not asked:
        return [SampledToken(int(token_id), logprob) for token_id, logprob in table]
    sampled: list[SampledToken] = []
    for (token_id, logprob, rank, *top), count in zip(table, num_top, strict=True):
        token = int(token_id)
        if count is None:
            sampled.append(SampledToken(token, logprob))
            continue
        num_found = most if count == -1 else min(count, most)
        found = {int(top[k]): top[most + k] for k in range(num_found)}
        found.setdefault(token, logprob)  # if it is new, then it is the least likely
        sampled.append(SampledToken(token, logprob, found, rank=int(rank)))
    return sampled


# -- Stages of chance -------------------------------------------------------------------------


def draw(logits: Float[Tensor, "rows vocab"], rows: Sequence[SamplingRow]) -> Int[Tensor, " rows"]:
    """Draw a token a row: where a random number falls among the tokens' weights laid end to end.

    A row of broken logits gets some token of the vocabulary, so that the other rows go on.
    """
    random = [uniform(row.seed, len(row.output_token_ids)) for row in rows]
    ends = draw_weights(logits, rows).cumsum(-1)  # [rows, vocab]
    total = ends[:, -1:]  # [rows, 1]
    target = column(random, logits.device, torch.float64) * total
    # In [0, total): a double may round the product up to the total itself.
    target = torch.minimum(target.long(), total - 1)
    return torch.searchsorted(ends, target, right=True)[:, 0]  # the first that ends beyond it


def draw_weights(
    logits: Float[Tensor, "rows vocab"], rows: Sequence[SamplingRow]
) -> Int[Tensor, "rows vocab"]:
    """The distribution that is drawn from, as whole numbers in proportion to the probabilities."""
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
        weights[places] = keep_top_p(weights[places], top_p)
    return weights


def keep_min_p(
    logits: Float[Tensor, "rows vocab"], min_p: Float[Tensor, "rows 1"]
) -> Float[Tensor, "rows vocab"]:
    """Cut tokens less likely than `min_p` times the likeliest: a fixed distance between logits."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + min_p.log(), -torch.inf)


def keep_top_k(
    logits: Float[Tensor, "rows vocab"], top_k: Sequence[int]
) -> Float[Tensor, "rows vocab"]:
    """Cut all tokens after the k-th likeliest. Equals of that one stay, as in vLLM."""
    ranks = [min(k, logits.shape[-1]) - 1 for k in top_k]
    likeliest = logits.topk(max(ranks) + 1, dim=-1).values  # [rows, largest k]
    kth = likeliest.gather(-1, to_device(ranks, logits.device)[:, None])
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(
    weights: Int[Tensor, "rows vocab"], top_p: Float[Tensor, "rows 1"]
) -> Int[Tensor, "rows vocab"]:
    """Cut each token before which, likeliest first, `top_p` of all weight is reached already.

    The likeliest has nothing before it and always stays; of equals the lower id comes first.
    """
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    ends = ordered.cumsum(-1)
    kept = ends - ordered < top_p * ends[:, -1:]
    return torch.zeros_like(weights).scatter(-1, order, ordered * kept)


# -- Randomness -------------------------------------------------------------------------------

_64_BITS = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of the token at this position of the output.

    The seed is mixed before the position is added, else the numbers of seed 1 would be those of
    seed 0, one place later.
    """
    return (_mix(_mix(seed) + position) >> 11) * 2.0**-53  # 53 bits: all that a float holds


def _mix(x: int) -> int:
    """splitmix64 (Steele et al. 2014): one to one on 64 bits, any bit of x stirs all of them."""
    x = (x + 0x9E3779B97F4A7C15) & _64_BITS
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _64_BITS
    return x ^ (x >> 31)
