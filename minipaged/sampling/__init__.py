"""How the next token is chosen.

params (what was asked for), sampler (from logits to tokens), beam (from candidates to sequences).
"""

from minipaged.sampling.beam import Beam, BeamSearch
from minipaged.sampling.params import BeamSearchParams, Params, SamplingParams, one_for_each
from minipaged.sampling.sampler import SampledToken, Sampler, SamplingRow, score

__all__ = [
    "Beam",
    "BeamSearch",
    "BeamSearchParams",
    "Params",
    "SampledToken",
    "Sampler",
    "SamplingParams",
    "SamplingRow",
    "one_for_each",
    "score",
]
