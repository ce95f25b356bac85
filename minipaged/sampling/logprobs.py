"""`Logprob`: the log-probability of one possible token, in vLLM's form."""

from dataclasses import dataclass

from minipaged.sampling.rows import SampledToken
from minipaged.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Logprob:
    """The log-probability of one token at one position, before any option changed its logits."""

    logprob: float
    rank: int | None = None  # 1 is the likeliest token of the vocabulary
    decoded_token: str | None = None  # decoded alone: half a character is U+FFFD; None: no text


Logprobs = dict[int, Logprob]  # by token id


def logprobs_of(
    sampled: SampledToken, num_top: int | None, tokenizer: Tokenizer | None
) -> Logprobs:
    """Return the token itself, then the `num_top` likeliest, likeliest first, as in vLLM."""
    assert sampled.top_logprobs is not None, "the sampler was not asked for logprobs"
    num_top = len(sampled.top_logprobs) if num_top in (None, -1) else num_top
    found: Logprobs = {sampled.token_id: Logprob(sampled.logprob)}  # in its place already
    for rank, (token_id, logprob) in enumerate(sampled.top_logprobs.items(), start=1):
        text = None
        if tokenizer is not None:
            text = tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")
        found[token_id] = Logprob(logprob, rank if rank <= num_top else sampled.rank, text)
    return found
