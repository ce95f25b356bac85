"""One row of logits: what the sampler must know of it, and what it answers."""

from collections.abc import Sequence
from typing import NamedTuple

from minipaged.sampling.params import SamplingParams


class SamplingRow(NamedTuple):
    """What the sampler needs to know of the sequence that one row of logits belongs to.

    `output_token_ids` grows after the step: copy it to keep it.
    """

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    seed: int  # the request's own, or the one that the engine chose for it
    end_token_ids: Sequence[int] = ()  # end of sequence and stops: not before min_tokens
    bad_words: Sequence[Sequence[int]] = ()  # in token ids


class SampledToken(NamedTuple):
    """One token and how likely the model itself found it, before any option changed its logits.

    `top_logprobs` holds what the request asked for, likeliest first, and always the token itself,
    whose place among all tokens is its `rank`, 1 for the likeliest. `error` says why there was no
    token to choose, or is what a logits processor raised; the other fields mean nothing then.
    """

    token_id: int
    logprob: float
    top_logprobs: dict[int, float] | None = None
    error: str | Exception | None = None
    rank: int | None = None  # as top_logprobs, only if logprobs were asked for
