"""The bodies of requests: OpenAI's protocol, with vLLM's extra fields.

A field that is null has its default. A field for an unsupported feature is refused. An unknown
field is ignored, with one warning in the log.
"""

import logging
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, Field

from minipaged.errors import InvalidOption
from minipaged.sampling import BeamSearchParams, Params, RequestOutputKind, SamplingParams
from minipaged.utils.not_built import by_name, refuse_not_built
from minipaged.utils.options import shown

logger = logging.getLogger(__name__)

NOT_BUILT = by_name({
    "text cannot be inserted before other text": {"suffix": None},
    "output that must follow a grammar or schema is not built": {
        "structured_outputs": None, "guided_json": None, "guided_regex": None,
        "guided_choice": None, "guided_grammar": None, "guided_decoding_backend": None,
        "response_format": {"type": "text"},
    },
    "a call of a tool cannot be enforced, so the model decides": {
        "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    },
    "functions are given as tools": {"functions": None},
    "the models read and write text only": {
        "audio": None, "mm_processor_kwargs": None, "web_search_options": None,
    },
    "requests are served in the order of their arrival (the paper's FCFS)": {"priority": 0},
    "only sampling parameters and vLLM's extra fields can be set": {"vllm_xargs": None},
})  # fmt: skip

KNOWN_AND_IGNORED = {
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
    "no_stop_trim", "return_hidden_states", "separate_reasoning", "stream_reasoning",
    "include_reasoning",
    "prompt_cache_key", "reasoning_effort", "verbosity",
}  # fmt: skip
"""Fields of OpenAI and of routers that have no effect here."""

BEAM_SEARCH = {"n", "max_tokens", "temperature", "ignore_eos"}
"""Sampling fields that beam search honours."""


MOST_ITEMS = 1024  # in a field that is compared with each new token


def _few(value: Any) -> Any:
    """Limit the size of a dict before its entries are checked; pydantic's own limit comes last."""
    if isinstance(value, dict) and len(value) > MOST_ITEMS:
        raise ValueError(f"has {len(value)} entries, but at most {MOST_ITEMS} are allowed")
    return value


T = TypeVar("T")
# Checking stops at the first fault: describing a million of them would take seconds.
Items = Annotated[list[T], Field(fail_fast=True)]
Few = Annotated[list[T], Field(fail_fast=True, max_length=MOST_ITEMS)]
Biases = Annotated[dict[str, float], BeforeValidator(_few)]


def _field(help: str, **limits: Any) -> Any:
    return Field(default=None, description=help, **limits)


class StreamOptions(BaseModel, extra="allow", strict=True):
    """What a stream reports in addition to the output."""

    include_usage: bool | None = _field("Send a last chunk with the usage.")
    continuous_usage_stats: bool | None = _field("Send the usage so far with each chunk.")


class Body(BaseModel, extra="allow", strict=True):
    """The body of a request. Types are not converted: "1" is not a number."""

    model: str | None = _field("The name of the model that the server runs.")

    def refuse_what_is_not_built(self) -> None:
        """Raise InvalidOption for an unsupported field; warn of an unknown one."""
        extra = self.model_extra or {}
        for name in NOT_BUILT.keys() & extra.keys():
            refuse_not_built(name, extra[name], NOT_BUILT, ())
        unknown = extra.keys() - NOT_BUILT.keys() - KNOWN_AND_IGNORED
        if unknown:
            _warn_of(min(unknown)[:60])


@lru_cache(maxsize=256)
def _warn_of(name: str) -> None:
    logger.warning("a request has the unknown field %s, which is ignored", shown(name))


class GenerationBody(Body):
    """The fields that completions and chats share."""

    n: int | None = _field("Samples per prompt; with beam search, beams.")
    best_of: int | None = _field("Generate this many samples, and return the n likeliest.")
    max_tokens: int | None = _field("Maximum tokens to generate per sample.")
    temperature: float | None = _field("0 is greedy.")
    top_p: float | None = _field("Sample from the likeliest tokens with this total probability.")
    top_k: int | None = _field("Sample from this many of the likeliest tokens.")
    min_p: float | None = _field("Sample from tokens at least this likely, relative to the best.")
    seed: int | None = _field("The same seed draws the same tokens.")
    stop: str | Few[str] | None = _field("The output ends before any of these texts.")
    stop_token_ids: Few[int] | None = _field("The output ends with any of these tokens.")
    presence_penalty: float | None = _field("Lowers the logit of every token in the output.")
    frequency_penalty: float | None = _field("The same, once per occurrence.")
    repetition_penalty: float | None = _field("Divides the logits of tokens that occurred.")
    logit_bias: Biases | None = _field("Added to logits, by token id.")
    bad_words: Few[str] | None = _field("Texts that the output must not contain.")
    allowed_token_ids: Items[int] | None = _field("Only these tokens may be generated.")
    min_tokens: int | None = _field("No end before this many tokens.")
    ignore_eos: bool | None = _field("Continue after the end of the text.")
    include_stop_str_in_output: bool | None = _field("Keep the stop text in the output.")
    skip_special_tokens: bool | None = _field("Leave special tokens out of the text.")
    spaces_between_special_tokens: bool | None = _field("Without effect.")
    truncate_prompt_tokens: int | None = _field("Keep only this many last tokens of the prompt.")
    prompt_logprobs: int | None = _field("Report this many of the likeliest prompt tokens.")
    stream: bool | None = _field("Send the output as it is generated.")
    stream_options: StreamOptions | None = _field("What a stream reports in addition.")
    cache_salt: str | None = _field("Only prompts with the same salt share cached blocks.")
    add_special_tokens: bool | None = _field("Whether the tokenizer adds its own tokens.")
    return_token_ids: bool | None = _field("Report token ids in addition to the text.")
    request_id: str | None = _field("Becomes part of the response's id.", max_length=256)
    use_beam_search: bool | None = _field("Search for the n likeliest outputs instead.")
    length_penalty: float | None = _field("Of beam search: above 0, favours long outputs.")
    user: str | None = _field("Ignored.")

    @property
    def width(self) -> int:
        """Samples or beams per prompt. `params` checks whether that many are allowed."""
        return max(1, self.n or 1, self.best_of or 1)

    def length(self) -> int | None:
        """Maximum tokens to generate; None: as many as fit in the context."""
        return self.max_tokens

    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are requested. Raises InvalidOption."""
        raise NotImplementedError

    def num_prompt_logprobs(self) -> int | None:
        """The same for the prompt."""
        return self.prompt_logprobs

    def params(self, defaults: Mapping[str, Any]) -> Params:
        """The parameters of each prompt.

        Args:
            defaults: the server's default parameters, by the names of `SamplingParams`.

        Raises InvalidOption for an invalid value.
        """
        self.refuse_what_is_not_built()
        logprobs, prompt_logprobs = self.num_logprobs(), self.num_prompt_logprobs()
        if prompt_logprobs is not None and self.stream:
            name = "logprobs" if self.prompt_logprobs is None else "prompt_logprobs"
            raise InvalidOption(
                "log-probabilities of a prompt are not part of a stream: leave out stream or "
                f"{name}.",
                name,
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidOption(
                "stream_options are for streams: leave them out, or set stream.", "stream_options"
            )
        if self.use_beam_search:
            return self._beams(logprobs)
        given = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        read = {
            "max_tokens": self.length(),
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
            "output_kind": RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY,
        }
        return SamplingParams.from_optional(**{**defaults, **given, **read})

    def _beams(self, logprobs: int | None) -> BeamSearchParams:
        usual = SamplingParams()
        asked = {name: getattr(self, name) for name in SAMPLING if name not in BEAM_SEARCH}
        for name, value in {**asked, "logprobs": logprobs}.items():
            if value is not None and value != getattr(usual, name):
                raise InvalidOption(
                    f"{name} cannot be honoured by beam search: leave it out, or leave out "
                    "use_beam_search.",
                    name,
                )
        return BeamSearchParams(
            beam_width=1 if self.n is None else self.n,
            max_tokens=self.length(),
            temperature=self.temperature or 0.0,
            length_penalty=1.0 if self.length_penalty is None else self.length_penalty,
            ignore_eos=bool(self.ignore_eos),
        )


SAMPLING = [
    each.name for each in fields(SamplingParams) if each.name in GenerationBody.model_fields
]
"""Fields that `SamplingParams` has by the same name."""


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | Items[str] | Items[int] | Items[Items[int]] = Field(
        description="Text or token ids; one prompt or several."
    )
    echo: bool | None = _field("Begin the output with the prompt.")
    logprobs: int | None = _field("Report this many of the likeliest tokens.")

    @property
    def prompts(self) -> list[Any]:
        """The prompts, each a text or a list of token ids. Raises InvalidOption for none."""
        if self.prompt == []:
            raise InvalidOption("prompt is an empty list: give at least one.", "prompt")
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else list(self.prompt)

    def length(self) -> int:
        """16 by default. 0 only scores a prompt: one token is generated and not shown."""
        if self.max_tokens == 0 and not self.echo:
            raise InvalidOption(
                "max_tokens is 0, which leaves nothing to show: raise it, or set echo to score the "
                "prompt.",
                "max_tokens",
            )
        return 16 if self.max_tokens is None else max(self.max_tokens, int(self.max_tokens == 0))

    def num_logprobs(self) -> int | None:
        """The field `logprobs`."""
        return self.logprobs

    def num_prompt_logprobs(self) -> int | None:
        """An echoed prompt has as many as the output, at least."""
        if not self.echo or self.logprobs is None:
            return self.prompt_logprobs
        return max(self.logprobs, self.prompt_logprobs or 0)


class TemplateFields(Body):
    """Fields that control how the messages of a chat become a prompt."""

    tools: Items[dict[str, Any]] | None = _field("Given to the chat template.")
    add_generation_prompt: bool | None = _field("Open the assistant's turn; true by default.")
    continue_final_message: bool | None = _field("Continue the last message instead.")
    chat_template_kwargs: dict[str, Any] | None = _field("Extra variables of the chat template.")


class ChatBody(GenerationBody, TemplateFields):
    """POST /v1/chat/completions."""

    messages: Annotated[Items[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: int | None = _field("Has precedence over max_tokens.")
    logprobs: bool | None = _field("Report log-probabilities.")
    top_logprobs: int | None = _field("... of this many of the likeliest tokens.", ge=0)
    chat_template: str | None = _field("A template for this request; refused unless trusted.")

    def length(self) -> int | None:
        """`max_completion_tokens` or, if it is not given, the older `max_tokens`."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    def num_logprobs(self) -> int | None:
        """Raises InvalidOption if the two fields disagree."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidOption(
                f"top_logprobs is {self.top_logprobs}, but logprobs is not set: set it as well.",
                "top_logprobs",
            )
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeBody(TemplateFields):
    """POST /tokenize: a prompt, or the messages of a chat."""

    prompt: str | None = _field("A text.")
    messages: Items[dict[str, Any]] | None = _field("A chat.")
    add_special_tokens: bool | None = _field("Whether the tokenizer adds its own tokens.")


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: Items[int] = Field(description="Token ids.")
