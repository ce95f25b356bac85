"""How the next token is chosen: from what was asked for and a row of logits, by sampling or beams.

Read it in this order: params (what was asked for), sampler (from logits to tokens), adjust (what
changes logits before that), beam (from candidates to sequences).
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
