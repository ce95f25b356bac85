"""How the next token is chosen: from what was asked for and a row of logits, by sampling or beams.

Read it in this order: params (what was asked for), sampler (from logits to tokens), beam (from
candidates to sequences).
"""

from minipaged.sampling.beam import Beam, BeamSearch
from minipaged.sampling.params import BeamSearchParams, Params, SamplingParams, one_for_each

__all__ = ["Beam", "BeamSearch", "BeamSearchParams", "Params", "SamplingParams", "one_for_each"]
