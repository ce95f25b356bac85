"""How a request begins: what is refused, its first sequence, and the object that serves it."""

from collections.abc import Callable, Container
from dataclasses import dataclass

from minipaged.engine.beam_request import BeamRequest
from minipaged.engine.request import Arrival, ModelTraits, Request
from minipaged.errors import InvalidRequest, MissingTokenizer
from minipaged.sampling import BeamSearchParams, Params, SamplingParams
from minipaged.sequence import Sequence, SequenceGroup
from minipaged.tokenizer.prompts import TokenizedPrompt
from minipaged.utils.options import require_type, shown


def refuse_id(request_id: str, taken: Container[str]) -> None:
    """Raise InvalidOption for what is no name, InvalidRequest for one that is taken."""
    require_type("request_id", request_id, str)
    if request_id in taken:
        raise InvalidRequest(f"request {request_id!r} is being served: choose another id.")


def refuse_request(
    prompt: TokenizedPrompt,
    params: Params,
    model: ModelTraits,
    vocab_size: int,
    max_logprobs: int,
) -> None:
    """Raise InvalidRequest, InvalidOption or MissingTokenizer for what the model cannot serve."""
    outside = [t for t in prompt.token_ids if not 0 <= t < vocab_size]
    if outside:
        raise InvalidRequest(
            f"the prompt holds token id {shown(outside[0])}, and the model knows ids from 0 to "
            f"{vocab_size - 1}: was it encoded for another model?"
        )
    if isinstance(params, SamplingParams):
        params.check_model(vocab_size, max_logprobs)
        if params.stop_strings and model.tokenizer is None:
            raise MissingTokenizer(
                "stop strings need text, but the model's folder holds no tokenizer: "
                "use stop_token_ids."
            )
    elif isinstance(params, BeamSearchParams):  # pyright: ignore[reportUnnecessaryIsInstance]
        params.check_vocab(vocab_size, len(model.eos_token_ids))
    else:
        raise InvalidRequest(
            f"{shown(params)} is no SamplingParams: give SamplingParams(...) or "
            "BeamSearchParams(...)."
        )


def first_group(
    request_id: str, prompt: TokenizedPrompt, params: Params, seq_id: int
) -> SequenceGroup:
    """The group of a new request: one sequence, from which its samples or beams will fork."""
    if isinstance(params, SamplingParams):
        width, wants_prompt = params.num_samples, params.prompt_logprobs is not None
    else:
        width, wants_prompt = params.beam_width, False
    seq = Sequence(
        seq_id,
        prompt.token_ids,
        max_output_len=params.max_tokens,
        cache_salt=prompt.cache_salt,
        reads_cache=not wants_prompt,  # for the logits of the prompt, all of it is computed
    )
    return SequenceGroup(request_id, [seq], width=width)


@dataclass(frozen=True)
class RequestBuilder:
    """Builds a request with these parameters, and builds the same one each time.

    Args:
        seed: for parameters that have none of their own.
        sampling_request: the part of that name.
    """

    params: Params
    seed: int
    sampling_request: Callable[[Arrival, SamplingParams, int], Request]

    def __call__(self, arrival: Arrival) -> Request:
        params = self.params
        if isinstance(params, BeamSearchParams):
            return BeamRequest(arrival, params)
        seed = self.seed if params.seed is None else params.seed
        return self.sampling_request(arrival, params, seed)
