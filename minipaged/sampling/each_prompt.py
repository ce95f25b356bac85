"""Parameters for each of several prompts: one for all, or one for each."""

from collections.abc import Iterable, Mapping
from typing import Any

from minipaged.errors import InvalidRequest
from minipaged.sampling.beam_params import BeamSearchParams
from minipaged.sampling.checks import several
from minipaged.sampling.params import SamplingParams
from minipaged.utils.counts import counted
from minipaged.utils.options import shown

Params = SamplingParams | BeamSearchParams


def one_for_each(params: Any, num_prompts: int) -> list[Params]:
    """Return parameters for each of `num_prompts` prompts, given one for all or a list.

    Raises InvalidRequest if they are neither, or if the list has another length.
    """
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams | BeamSearchParams):
        return [params] * num_prompts
    if isinstance(params, Mapping | str) or not isinstance(params, Iterable):
        raise InvalidRequest(
            f"{shown(params)} is not a SamplingParams: give SamplingParams(...) or "
            "BeamSearchParams(...)."
        )
    each = several("sampling_params", params)
    for number, one in enumerate(each, start=1):
        if not isinstance(one, SamplingParams | BeamSearchParams):
            raise InvalidRequest(
                f"sampling_params number {number} of {len(each)} is {shown(one)}: give "
                "SamplingParams(...) or BeamSearchParams(...)."
            )
    if len(each) != num_prompts:
        raise InvalidRequest(
            f"{counted(num_prompts, 'prompt')} came with {len(each)} sampling_params: give one "
            "for all, or one for each."
        )
    return list(each)
