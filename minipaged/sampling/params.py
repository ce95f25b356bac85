"""What a request asks for: SamplingParams or BeamSearchParams, in vLLM's names and meanings.

Every value is checked when the object is made, long before a batch depends on it, and every refusal
says what was given and what to choose instead. Afterwards the object never changes.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, TypeGuard

from minipaged.errors import InvalidOption, InvalidRequest
from minipaged.utils.counts import counted

Number = float | int  # the checker under test takes a number without a point for no float
GREEDY_BELOW = 1e-5
"""A smaller temperature means 0: dividing by it would leave the range of float32."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when they end.

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
    min_tokens: int = 0  # no end of sequence and no stop before so many tokens
    max_tokens: int | None = 16  # None: as many as the model's context holds
    logprobs: int | None = None  # also report so many of the likeliest tokens at each place
    prompt_logprobs: int | None = None  # ... and at each place of the prompt
    adjusts_logits: bool = field(init=False, repr=False, compare=False)
    """Whether bias, penalties or min_tokens change the logits before a token is chosen."""

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            self._set(name, rule.check(name, getattr(self, name)))
        if not isinstance(self.ignore_eos, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidOption(f"ignore_eos is {self.ignore_eos!r}: choose True or False.")
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _stop_token_ids(self.stop_token_ids))
        self._set("logit_bias", _logit_bias(self.logit_bias))
        self._check_together()
        # Worked out once: the sampler asks in every step, for every row.
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        self._set("adjusts_logits", bool(penalties or self.logit_bias or self.min_tokens))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen, but not yet born

    def _check_together(self) -> None:
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidOption(
                f"best_of is {self.best_of}, but n={self.n} outputs are to be returned: "
                f"raise best_of to at least {self.n} or lower n."
            )
        if self.is_greedy and self.num_samples > 1:
            name = "n" if self.n > 1 else "best_of"
            raise InvalidOption(
                f"{name} is {self.num_samples} with temperature 0, which would give one and the "
                f"same output {self.num_samples} times: raise temperature or set {name} to 1."
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidOption(
                f"min_tokens is {self.min_tokens}, but max_tokens ends the output after "
                f"{self.max_tokens}: raise max_tokens or lower min_tokens."
            )

    def check_vocab(self, vocab_size: int) -> None:
        """Raise `InvalidOption` if a token is named that a model of this vocabulary lacks.

        Only the engine knows the vocabulary, so it asks once, when the request comes in: found any
        later, a wrong id would break a step that other requests share.
        """
        for name, ids in ("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids):
            for token_id in ids or ():
                if token_id >= vocab_size:
                    raise InvalidOption(
                        f"{name} names token {token_id}, but the vocabulary has {vocab_size} "
                        f"tokens: choose ids from 0 to {vocab_size - 1}."
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
        if self.temperature != 0:
            raise InvalidOption(
                f"temperature is {self.temperature!r}, but beam search draws nothing: leave it 0."
            )
        for name in "beam_width", "max_tokens":
            value = getattr(self, name)
            none = name == "max_tokens" and value is None
            if not none and (not is_number(value, int) or value < 1):
                raise InvalidOption(f"{name} is {value!r}: choose a whole number from 1 up.")
        if not is_number(self.length_penalty, float) or not abs(self.length_penalty) <= 10:
            raise InvalidOption(
                f"length_penalty is {self.length_penalty!r}: choose a number from -10 to 10, 0 for "
                "none."
            )
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise InvalidOption(
                f'early_stopping is {self.early_stopping!r}: choose True, False or "never".'
            )
        if not isinstance(self.ignore_eos, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidOption(f"ignore_eos is {self.ignore_eos!r}: choose True or False.")

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
                f"choose a beam_width up to {most}."
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
    if isinstance(params, Mapping) or not isinstance(params, Iterable):
        raise InvalidRequest(
            f"{params!r} is no SamplingParams: give SamplingParams(...) or BeamSearchParams(...)."
        )
    each = list(params)
    if None in each:
        raise InvalidRequest(
            f"sampling_params number {each.index(None) + 1} of {len(each)} is None: give "
            "SamplingParams(...) or BeamSearchParams(...)."
        )
    if len(each) != num_prompts:
        raise InvalidRequest(
            f"{counted(num_prompts, 'prompt')} came with {len(each)} sampling_params: give one "
            "for all, or one for each."
        )
    return each


@dataclass(frozen=True)
class _Rule:
    """What one numeric option may be, and the advice to who gave something else."""

    kind: type[int] | type[float]
    fits: Callable[[Any], bool]
    advice: str
    optional: bool = False

    def check(self, name: str, value: object) -> int | float | None:
        """The value as a plain Python number. Raises `InvalidOption`."""
        if value is None and self.optional:
            return None
        if not is_number(value, self.kind) or not self.fits(value):
            none = " or None" if self.optional else ""
            raise InvalidOption(f"{name} is {value!r}: choose {self.advice}{none}.")
        return self.kind(value)


_RULES = {
    "n": _Rule(int, lambda v: v >= 1, "a whole number from 1 up"),
    "best_of": _Rule(int, lambda v: v >= 1, "a whole number from n up", optional=True),
    "temperature": _Rule(
        float, lambda v: 0 <= v < math.inf, "0 (greedy) or a finite positive number"
    ),
    "top_k": _Rule(int, lambda v: v >= -1, "a whole number from 1 up, or 0 for all tokens"),
    "top_p": _Rule(float, lambda v: 0 < v <= 1, "a number above 0 and up to 1 (1 for all tokens)"),
    "min_p": _Rule(float, lambda v: 0 <= v <= 1, "a number from 0 (for all tokens) to 1"),
    "presence_penalty": _Rule(float, lambda v: -2 <= v <= 2, "a number from -2 to 2"),
    "frequency_penalty": _Rule(float, lambda v: -2 <= v <= 2, "a number from -2 to 2"),
    "repetition_penalty": _Rule(
        float, lambda v: 0 < v < math.inf, "a finite number above 0 (1 for no penalty)"
    ),
    "seed": _Rule(int, lambda v: True, "a whole number", optional=True),
    "min_tokens": _Rule(int, lambda v: v >= 0, "a whole number from 0 up"),
    "max_tokens": _Rule(int, lambda v: v >= 1, "a whole number from 1 up", optional=True),
    "logprobs": _Rule(int, lambda v: v >= 0, "a whole number from 0 up", optional=True),
    "prompt_logprobs": _Rule(int, lambda v: v >= 0, "a whole number from 0 up", optional=True),
}


def is_number(value: object, kind: type[int] | type[float]) -> TypeGuard[int | float]:
    """Whether it is a number of that kind, numpy's included; True and False are no numbers here."""
    return not isinstance(value, bool) and isinstance(value, Integral if kind is int else Real)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if not isinstance(stop, Iterable) or isinstance(stop, str) else tuple(stop)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise InvalidOption(f"stop holds {string!r}: choose strings of one character or more.")
    return strings


def _stop_token_ids(ids: Any) -> tuple[int, ...]:
    if ids is None:
        return ()
    ids = tuple(ids) if isinstance(ids, Iterable) else (ids,)
    for token_id in ids:
        if not is_number(token_id, int) or token_id < 0:
            raise InvalidOption(f"stop_token_ids holds {token_id!r}: choose ids from 0 up.")
    return tuple(int(token_id) for token_id in ids)


def _logit_bias(bias: Any) -> dict[int, float] | None:
    """A copy with plain numbers. The limit of 100 is that of OpenAI's protocol."""
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise InvalidOption(f"logit_bias is {bias!r}: choose a dict from token id to bias.")
    for token_id, value in bias.items():
        if not is_number(token_id, int) or token_id < 0:
            raise InvalidOption(f"logit_bias names token {token_id!r}: choose ids from 0 up.")
        if not is_number(value, float) or not -100 <= value <= 100:
            raise InvalidOption(
                f"logit_bias of token {token_id} is {value!r}: choose a number from -100 "
                "(as good as never) to 100 (as good as always)."
            )
    return {int(token_id): float(value) for token_id, value in bias.items()}
