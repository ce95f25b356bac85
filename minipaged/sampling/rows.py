"""The sampler's input for one row of logits, and its result."""

from collections.abc import Sequence
from typing import NamedTuple

from minipaged.sampling.params import SamplingParams


class SamplingRow(NamedTuple):
    """The sampler's input for the sequence of one row of logits.

    `output_token_ids` grows after the step: copy it to keep it.
    """

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    seed: int  # the request's, or one that the engine chose
    end_token_ids: Sequence[int] = ()  # end of sequence and stops, forbidden before min_tokens
    bad_words: Sequence[Sequence[int]] = ()  # in token ids
    num_pending: int = 0  # 1 if another token was sampled whose id is not known yet

    @property
    def position(self) -> int:
        """The position in the output of the token to sample."""
        return len(self.output_token_ids) + self.num_pending


class SampledToken(NamedTuple):
    """One token and its log-probability before any option changed its logits.

    `top_logprobs` contains the requested number of tokens, likeliest first, and always the token
    itself. `rank` is its rank among all tokens, 1 for the likeliest. `error` explains why no token
    could be chosen, or is an exception of a logits processor; the other fields are then undefined.
    """

    token_id: int
    logprob: float
    top_logprobs: dict[int, float] | None = None
    error: str | Exception | None = None
    rank: int | None = None  # as top_logprobs, only if logprobs were requested
