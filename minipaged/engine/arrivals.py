"""Accepting a request: its checks, its first sequence, and the object that serves it."""

from collections.abc import Callable, Container
from dataclasses import dataclass, replace

from minipaged.engine.beam_request import BeamRequest
from minipaged.engine.request import Arrival, ModelTraits, Request
from minipaged.errors import InvalidRequest, MissingTokenizer
from minipaged.sampling import BeamSearchParams, Params, SamplingParams
from minipaged.sequence import Sequence, SequenceGroup
from minipaged.tokenizer.prompts import Prompt, TokenizedPrompt, read_prompt
from minipaged.utils.options import require_type, shown


def own_copy(params: object) -> Params:
    """Copy the parameters, which the caller may change later, and check them again.

    Raises InvalidRequest if they are not parameters, InvalidOption for an invalid value.
    """
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams | BeamSearchParams):
        raise InvalidRequest(
            f"{shown(params)} is not a SamplingParams: give SamplingParams(...) or "
            "BeamSearchParams(...)."
        )
    return params.clone()


def refuse_id(request_id: str, taken: Container[str]) -> None:
    """Raise InvalidOption if the id is not a string, InvalidRequest if it is in use."""
    require_type("request_id", request_id, str)
    if request_id in taken:
        raise InvalidRequest(f"request {request_id!r} is being served: choose another id.")


@dataclass(frozen=True)
class CheckedRequest:
    """A request that the model can serve: its tokens and its copy of the parameters."""

    prompt: TokenizedPrompt
    params: Params

    @property
    def width(self) -> int:
        """The number of its samples or beams."""
        params = self.params
        return params.num_samples if isinstance(params, SamplingParams) else params.beam_width

    def first_group(self, request_id: str, seq_id: int) -> SequenceGroup:
        """Build a group of one sequence, from which samples or beams will fork."""
        prompt, params = self.prompt, self.params
        samples = isinstance(params, SamplingParams)
        wants_prompt = samples and params.prompt_logprobs is not None
        seq = Sequence(
            seq_id,
            prompt.token_ids,
            max_output_len=params.max_tokens,
            cache_salt=prompt.cache_salt,
            reads_cache=not wants_prompt,  # the logits of the prompt need all of it computed
        )
        return SequenceGroup(request_id, [seq], width=self.width)


def check_request(
    prompt: Prompt, params: Params | None, model: ModelTraits, max_logprobs: int
) -> CheckedRequest:
    """Encode the prompt, and check it and the parameters. Any thread may call this.

    Raises InvalidRequest, PromptTooLong, InvalidOption or MissingTokenizer if the model cannot
    serve the request.
    """
    params = own_copy(params)
    return CheckedRequest(_read_prompt(prompt, params, model, max_logprobs), params)


def _read_prompt(
    prompt: Prompt, params: Params, model: ModelTraits, max_logprobs: int
) -> TokenizedPrompt:
    """Return the prompt's tokens, or the last `truncate_prompt_tokens` of them."""
    keep = params.truncate_prompt_tokens if isinstance(params, SamplingParams) else None
    most = model.max_model_len if keep is None else None
    read = read_prompt(prompt, model.tokenizer, most)
    if keep is not None:
        keep = model.max_model_len - 1 if keep == -1 else keep  # room for one more token
        read = replace(read, token_ids=read.token_ids[-keep:])
    outside = [t for t in read.token_ids if not 0 <= t < model.vocab_size]
    if outside:
        raise InvalidRequest(
            f"the prompt contains token id {shown(outside[0])}, but the model has ids from 0 to "
            f"{model.vocab_size - 1}: was it encoded for another model?"
        )
    if isinstance(params, BeamSearchParams):
        params.check_vocab(model.vocab_size, len(model.eos_token_ids))
        return read
    params.check_model(model.vocab_size, max_logprobs)
    if model.tokenizer is None:
        _refuse_text(params)
    return read


def _refuse_text(params: SamplingParams) -> None:
    if params.stop_strings:
        raise MissingTokenizer(
            "stop strings need text, but the model has no tokenizer: use stop_token_ids."
        )
    if params.bad_words:
        raise MissingTokenizer(
            "bad_words are text, but the model has no tokenizer: forbid tokens by a logit_bias of "
            "-100."
        )


@dataclass(frozen=True)
class RequestBuilder:
    """Builds the same request each time it is called.

    Args:
        seed: used if the parameters have no seed.
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
