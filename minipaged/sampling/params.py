"""SamplingParams: the sampling parameters of a request, with vLLM's names and meanings.

Every value is checked at construction, long before a batch depends on it, and again when a request
takes its copy. Every error contains the value and a valid choice.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import lru_cache
from typing import Any, cast

from minipaged.errors import InvalidOption
from minipaged.sampling.checks import (
    RULES,
    check_allowed,
    check_flag,
    check_logit_bias,
    check_processors,
    check_strings,
    check_token_ids,
    clamped,
)
from minipaged.sampling.not_built import refuses_what_is_not_built
from minipaged.tokenizer.stop_strings import StopStrings
from minipaged.utils.options import require_type, shown

Number = float | int  # the type checker of the tests does not accept an int as a float
GREEDY_BELOW = 1e-5
"""Smaller temperatures mean 0: dividing by them would leave the range of float32."""


class RequestOutputKind(Enum):
    """How much of a request a `RequestOutput` contains, by vLLM's names."""

    CUMULATIVE = 0  # all tokens so far
    DELTA = 1  # new tokens since the last output
    FINAL_ONLY = 2  # all tokens, and no output before the request has finished


LogitsProcessor = Callable[..., Any]
"""Called with the output tokens and a row of logits, a tensor [vocab]; returns another such row.

A function of three arguments is called with the prompt tokens first.
"""


@refuses_what_is_not_built
@dataclass
class SamplingParams:
    """How the tokens of one request are chosen, and when they end.

    A token that ends the output (the end of sequence, or one of `stop_token_ids`) is the last of
    `token_ids`, and its text is not part of `text`; with `ignore_eos`, the end of sequence is an
    ordinary token. A string of `stop` is cut off `text`, together with the rest of its last token.
    `include_stop_str_in_output` keeps both in the text. Special tokens are not part of the text
    unless `skip_special_tokens` is False. A stop string that is the name of a special token always
    has the effect of its id in `stop_token_ids`.

    Raises `InvalidOption` for an invalid value. A request takes a copy, which is checked again, so
    parameters may be changed between two requests.
    """

    n: int = 1  # samples to return
    best_of: int | None = None  # samples to generate, of which the n likeliest are returned
    temperature: Number = 1.0  # 0 is greedy: always the likeliest token
    top_k: int = 0  # draw from the k likeliest tokens; 0 or -1: from all
    top_p: Number = 1.0  # draw from the fewest tokens with this total probability
    min_p: Number = 0.0  # draw from tokens at least this likely, relative to the likeliest
    presence_penalty: Number = 0.0  # subtracted from the logit of a token already generated
    frequency_penalty: Number = 0.0  # ... once for each time it was generated
    repetition_penalty: Number = 1.0  # divides positive logits, multiplies negative ones
    logit_bias: Mapping[int, Number] | Mapping[str, Number] | None = None  # by token id
    allowed_token_ids: Iterable[int] | None = None  # no other token is chosen
    bad_words: str | Iterable[str] | None = None  # never completed, with or without a leading space
    logits_processors: Iterable[LogitsProcessor] | None = None
    seed: int | None = None  # sample i uses seed + i; None or -1: the engine chooses one
    stop: str | Iterable[str] | None = None
    stop_token_ids: Iterable[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0  # no end (even with ignore_eos) and no stop before this many tokens
    max_tokens: int | None = 16  # None: as many as the model's context allows
    logprobs: int | None = None  # also report this many of the likeliest tokens; -1: all
    prompt_logprobs: int | None = None  # ... and at each position of the prompt
    truncate_prompt_tokens: int | None = None  # keep the last ones; -1: as many as the context
    detokenize: bool = True  # False: token ids only
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    adjusts_logits: bool = field(init=False, repr=False, compare=False)
    """Whether the logits are changed before a token is chosen."""
    reads_output: bool = field(init=False, repr=False, compare=False)
    """Whether these changes depend on the tokens that were generated."""
    stop_automaton: StopStrings = field(init=False, repr=False, compare=False)
    """Finds the stop strings; shared by all samples of all prompts with these parameters."""

    @classmethod
    def from_optional(cls, **given: Any) -> "SamplingParams":
        """Build from a server's values: None means the default, and biases are clamped to 100."""
        chosen: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        if "max_tokens" in given:  # its None means no limit
            chosen["max_tokens"] = given["max_tokens"]
        if isinstance(bias := given.get("logit_bias"), Mapping):
            chosen["logit_bias"] = clamped(cast(Mapping[Any, Any], bias))
        return cls(**chosen)

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name in RULES:
                value = RULES[each.name].check(each.name, getattr(self, each.name))
                setattr(self, each.name, value)
            elif each.type is bool and each.init:
                check_flag(each.name, getattr(self, each.name))
        self.seed = None if self.seed == -1 else self.seed
        self.stop = list(check_strings("stop", self.stop))
        self.bad_words = list(check_strings("bad_words", self.bad_words))
        self.stop_token_ids = list(check_token_ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = check_allowed(self.allowed_token_ids)
        self.logit_bias = check_logit_bias(self.logit_bias)
        self.logits_processors = check_processors(self.logits_processors)
        require_type("output_kind", self.output_kind, RequestOutputKind)
        self._check_together()
        # Computed once, because the sampler reads it in every step for every row.
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        masks = self.allowed_token_ids is not None or self.bad_words or self.min_tokens
        own = self.logit_bias or self.logits_processors
        self.adjusts_logits = bool(penalties or masks or own)
        self.reads_output = bool(penalties or self.bad_words or self.logits_processors)
        self.stop_automaton = stop_automaton(self.stop_strings)

    def clone(self) -> "SamplingParams":
        """Return a copy, and check it again: the caller may have changed this one."""
        return replace(self)

    def _check_together(self) -> None:
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidOption(
                f"best_of is {self.best_of}, but n={self.n} outputs are to be returned: "
                f"raise best_of to at least {self.n} or lower n.",
                "best_of",
            )
        if self.is_greedy and self.num_samples > 1:
            name = "n" if self.n > 1 else "best_of"
            raise InvalidOption(
                f"{name} is {self.num_samples} with temperature 0, which would give one and the "
                f"same output {self.num_samples} times: raise temperature or set {name} to 1.",
                name,
            )
        if self.stop and not self.detokenize:
            raise InvalidOption(
                "stop strings are found in the text, but detokenize=False produces none: leave out "
                "detokenize, or use stop_token_ids.",
                "stop",
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidOption(
                f"min_tokens is {self.min_tokens}, but max_tokens ends the output after "
                f"{self.max_tokens}: raise max_tokens or lower min_tokens.",
                "min_tokens",
            )

    def check_model(self, vocab_size: int, max_logprobs: int) -> None:
        """Raise `InvalidOption` for a token outside the vocabulary, or too many logprobs.

        The engine calls it once, when the request arrives: later, a wrong id would break a step
        that other requests share. `max_logprobs` is -1 for no limit.
        """
        for name, count in ("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs):
            if count is not None and max_logprobs >= 0 and not 0 <= count <= max_logprobs:
                asked = "-1, which asks for the whole vocabulary" if count == -1 else str(count)
                raise InvalidOption(
                    f"{name} is {asked}, but this engine reports at most {max_logprobs} "
                    "(max_logprobs): ask for fewer, or raise max_logprobs.",
                    name,
                )
        for name in "logit_bias", "stop_token_ids", "allowed_token_ids":
            for token_id in getattr(self, name) or ():
                if token_id >= vocab_size:
                    raise InvalidOption(
                        f"{name} names token {shown(token_id)}, but the vocabulary has "
                        f"{vocab_size} tokens: choose ids from 0 to {vocab_size - 1}.",
                        name,
                    )

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the likeliest, without randomness."""
        return self.temperature < GREEDY_BELOW

    @property
    def num_samples(self) -> int:
        """The number of sequences to generate, of which `n` are returned."""
        return self.n if self.best_of is None else self.best_of

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        assert isinstance(self.stop, list), "__post_init__ makes stop a list"
        return tuple(self.stop)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """`stop_token_ids` as a tuple."""
        assert isinstance(self.stop_token_ids, list), "__post_init__ makes stop_token_ids a list"
        return tuple(self.stop_token_ids)


@lru_cache(maxsize=16)
def stop_automaton(strings: tuple[str, ...]) -> StopStrings:
    """Build the automaton once for requests with the same stop strings."""
    return StopStrings(strings)
