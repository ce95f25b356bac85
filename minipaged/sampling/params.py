"""What a request asks for: SamplingParams or BeamSearchParams, in vLLM's names and meanings.

Every value is checked when the object is made, long before a batch depends on it, and every refusal
says what was given and what to choose instead. Afterwards the object never changes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from minipaged.errors import InvalidOption, InvalidRequest
from minipaged.sampling.checks import (
    RULES,
    check_flag,
    check_logit_bias,
    check_stop_strings,
    check_stop_token_ids,
    is_number,
    several,
)
from minipaged.tokenizer.stop_strings import StopStrings
from minipaged.utils.counts import counted
from minipaged.utils.options import shown

Number = float | int  # the checker under test takes a number without a point for no float
GREEDY_BELOW = 1e-5
"""A smaller temperature means 0: dividing by it would leave the range of float32."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when they end.

    A token that ends the output (the end of sequence, or one of `stop_token_ids`) is the last of
    `token_ids`, and its own text is no part of `text`, as in vLLM; with `ignore_eos`, an end of
    sequence is text like any other. A string of `stop` is cut off `text`, with whatever followed it
    in its last token. Special tokens are never part of the text, so a stop string that is the name
    of one works as its id in `stop_token_ids` would.

    Raises `InvalidOption` for a value that cannot work. Lists become tuples, so two requests that
    ask for the same compare equal and hash alike.
    """

    n: int = 1  # samples to return
    best_of: int | None = None  # samples to generate, of which the n likeliest are returned
    temperature: Number = 1.0  # 0 is greedy: always the likeliest token
    top_k: int = 0  # draw from the k likeliest tokens; 0 or -1 from all
    top_p: Number = 1.0  # draw from the fewest tokens that hold this much probability
    min_p: Number = 0.0  # draw from tokens at least this likely, the likeliest being 1
    presence_penalty: Number = 0.0  # taken from the logit of a token that was generated before
    frequency_penalty: Number = 0.0  # ... as often as it was generated
    repetition_penalty: Number = 1.0  # divides positive logits, multiplies negative ones
    logit_bias: Mapping[int, Number] | None = field(default=None, hash=False)
    seed: int | None = None  # sample i draws with seed + i; None: the engine chooses one
    stop: str | Iterable[str] | None = None
    stop_token_ids: Iterable[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0  # no end (even with ignore_eos) and no stop before so many tokens
    max_tokens: int | None = 16  # None: as many as the model's context holds
    logprobs: int | None = None  # also report so many of the likeliest tokens at each place
    prompt_logprobs: int | None = None  # ... and at each place of the prompt
    adjusts_logits: bool = field(init=False, repr=False, compare=False)
    """Whether bias, penalties or min_tokens change the logits before a token is chosen."""
    stop_automaton: StopStrings = field(init=False, repr=False, compare=False)
    """Finds the stop strings; shared by all samples of all prompts with these parameters."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name in RULES:
                self._set(each.name, RULES[each.name].check(each.name, getattr(self, each.name)))
        check_flag("ignore_eos", self.ignore_eos)
        self._set("stop", check_stop_strings(self.stop))
        self._set("stop_token_ids", check_stop_token_ids(self.stop_token_ids))
        self._set("logit_bias", check_logit_bias(self.logit_bias))
        self._check_together()
        # Worked out once: the sampler asks in every step, for every row.
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        self._set("adjusts_logits", bool(penalties or self.logit_bias or self.min_tokens))
        self._set("stop_automaton", StopStrings(self.stop_strings))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen, but not yet born

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
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidOption(
                f"min_tokens is {self.min_tokens}, but max_tokens ends the output after "
                f"{self.max_tokens}: raise max_tokens or lower min_tokens.",
                "min_tokens",
            )

    def check_model(self, vocab_size: int, max_logprobs: int) -> None:
        """Raise `InvalidOption` for a token that the vocabulary lacks, or too many logprobs.

        Only the engine knows both numbers, so it asks once, when the request comes in: found any
        later, a wrong id would break a step that other requests share. `max_logprobs` is -1 for no
        limit.
        """
        for name, count in ("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs):
            if count is not None and count > max_logprobs >= 0:
                raise InvalidOption(
                    f"{name} is {count}, but this engine reports at most {max_logprobs} "
                    "(max_logprobs): ask for fewer, or raise max_logprobs.",
                    name,
                )
        for name, ids in ("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids):
            for token_id in ids or ():
                if token_id >= vocab_size:
                    raise InvalidOption(
                        f"{name} names token {shown(token_id)}, but the vocabulary has "
                        f"{vocab_size} tokens: choose ids from 0 to {vocab_size - 1}.",
                        name,
                    )

    @property
    def is_greedy(self) -> bool:
        """Whether each token is simply the likeliest, without any chance."""
        return self.temperature < GREEDY_BELOW

    @property
    def num_samples(self) -> int:
        """How many sequences the request generates, of which `n` are returned."""
        return self.n if self.best_of is None else self.best_of

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as it is kept, whatever form it was given in."""
        assert isinstance(self.stop, tuple), "__post_init__ makes stop a tuple"
        return self.stop

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """`stop_token_ids` as it is kept, whatever form it was given in."""
        assert isinstance(self.stop_token_ids, tuple), "__post_init__ makes stop_token_ids a tuple"
        return self.stop_token_ids


@dataclass(frozen=True)
class BeamSearchParams:
    """What a request asks of beam search. Raises `InvalidOption` for a value that cannot work.

    A finished sequence scores its log-probability, divided by length ** length_penalty: above 0,
    long sequences win more easily, below 0 short ones. early_stopping says when the search ends:
    True, once `beam_width` sequences have ended; False, once none of the beams would score better
    if it ended now; "never", once none could at any length.
    """

    beam_width: int
    max_tokens: int | None = 16  # None: as many as the model's context holds
    length_penalty: Number = 1.0
    early_stopping: bool | Literal["never"] = False
    ignore_eos: bool = False
    temperature: Number = 0.0  # nothing is drawn: only 0 is accepted, for scripts written for vLLM

    def __post_init__(self) -> None:
        if not is_number(self.temperature, float) or self.temperature != 0:
            raise InvalidOption(
                f"temperature is {shown(self.temperature)}, but beam search draws nothing: leave "
                "it 0.",
                "temperature",
            )
        for name in "beam_width", "max_tokens", "length_penalty":
            object.__setattr__(self, name, RULES[name].check(name, getattr(self, name)))
        early: Any = self.early_stopping
        if not isinstance(early, bool) and not (isinstance(early, str) and early == "never"):
            raise InvalidOption(
                f'early_stopping is {shown(early)}: choose True, False or "never".',
                "early_stopping",
            )
        check_flag("ignore_eos", self.ignore_eos)

    def num_candidates(self, num_ends: int) -> int:
        """How many candidates a step compares, if so many tokens can end a sequence.

        Enough for `beam_width` to go on even if all of the best end there.
        """
        return max(2, 1 + (0 if self.ignore_eos else num_ends)) * self.beam_width

    def check_vocab(self, vocab_size: int, num_ends: int) -> None:
        """Raise `InvalidOption` if the vocabulary has fewer tokens than the first step compares."""
        if self.num_candidates(num_ends) > vocab_size:
            most = vocab_size * self.beam_width // self.num_candidates(num_ends)
            raise InvalidOption(
                f"beam_width is {self.beam_width}, so the first step compares "
                f"{self.num_candidates(num_ends)} tokens, but the vocabulary has {vocab_size}: "
                f"choose a beam_width up to {most}.",
                "beam_width",
            )


Params = SamplingParams | BeamSearchParams


def one_for_each(params: Any, num_prompts: int) -> list[Params]:
    """Parameters for each of so many prompts: the same for all, or a list of as many.

    Raises InvalidRequest if they are neither.
    """
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams | BeamSearchParams):
        return [params] * num_prompts
    if isinstance(params, Mapping | str) or not isinstance(params, Iterable):
        raise InvalidRequest(
            f"{shown(params)} is no SamplingParams: give SamplingParams(...) or "
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
