"""Choosing the next token from a row of logits, by sampling or beam search.

Reading order: params (a request's parameters), sampler (from logits to tokens), adjust (changes to
logits before that), beam (from candidates to sequences).
"""

from minipaged.sampling.beam import Beam, BeamSearch
from minipaged.sampling.beam_params import BeamSearchParams
from minipaged.sampling.each_prompt import Params, one_for_each
from minipaged.sampling.params import RequestOutputKind, SamplingParams

__all__ = [
    "Beam",
    "BeamSearch",
    "BeamSearchParams",
    "Params",
    "RequestOutputKind",
    "SamplingParams",
    "one_for_each",
]
