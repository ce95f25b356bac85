"""How the next token is chosen: params (what was asked for), sampler (from logits to tokens)."""

from minipaged.sampling.params import SamplingParams, one_for_each
from minipaged.sampling.sampler import SampledToken, Sampler, SamplingRow, score

__all__ = ["SampledToken", "Sampler", "SamplingParams", "SamplingRow", "one_for_each", "score"]
