"""Checks of single sampling options.

The limits keep numbers within the range of float32 inside the sampler. Beyond it, they would become
NaN or infinity, or select another token.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeGuard

from minipaged.errors import InvalidOption
from minipaged.utils.options import LARGEST_INT, shown

MAX_STOP_CHARACTERS = 300_000
"""The limit for all stop strings of a request together. Building their automaton takes about 170
bytes and 4 microseconds per character."""


@dataclass(frozen=True)
class Rule:
    """The valid values of a numeric option, and the advice in the error for other values."""

    kind: type[int] | type[float]
    fits: Callable[[Any], bool]
    advice: str
    optional: bool = False

    def check(self, name: str, value: object) -> int | float | None:
        """Return the value as a plain Python number. Raises `InvalidOption`."""
        if value is None and self.optional:
            return None
        if not is_number(value, self.kind) or not self.fits(value):
            none = " or None" if self.optional else ""
            raise InvalidOption(f"{name} is {shown(value)}: choose {self.advice}{none}.", name)
        if isinstance(value, Integral) and abs(value) > LARGEST_INT:
            raise InvalidOption(f"{name} is {shown(value)}: choose at most {LARGEST_INT}.", name)
        return self.kind(value)


_COUNT = "a whole number from 0 up, -1 for the whole vocabulary"

RULES = {
    "n": Rule(int, lambda v: v >= 1, "a whole number from 1 up"),
    "best_of": Rule(int, lambda v: v >= 1, "a whole number from n up", optional=True),
    "temperature": Rule(float, lambda v: 0 <= v <= 1e6, "a number from 0 (greedy) to 1000000"),
    "top_k": Rule(int, lambda v: v >= -1, "a whole number from 1 up, or 0 for all tokens"),
    "top_p": Rule(float, lambda v: 0 < v <= 1, "a number above 0 and up to 1 (1 for all tokens)"),
    "min_p": Rule(float, lambda v: 0 <= v <= 1, "a number from 0 (for all tokens) to 1"),
    "presence_penalty": Rule(float, lambda v: -2 <= v <= 2, "a number from -2 to 2"),
    "frequency_penalty": Rule(float, lambda v: -2 <= v <= 2, "a number from -2 to 2"),
    "repetition_penalty": Rule(
        float, lambda v: 0.01 <= v <= 100, "a number from 0.01 to 100 (1 for no penalty)"
    ),
    "seed": Rule(int, lambda v: True, "a whole number", optional=True),
    "min_tokens": Rule(int, lambda v: v >= 0, "a whole number from 0 up"),
    "max_tokens": Rule(int, lambda v: v >= 1, "a whole number from 1 up", optional=True),
    "logprobs": Rule(int, lambda v: v >= -1, _COUNT, optional=True),
    "prompt_logprobs": Rule(int, lambda v: v >= -1, _COUNT, optional=True),
    "truncate_prompt_tokens": Rule(
        int, lambda v: v >= 1 or v == -1, "a whole number from 1 up, or -1", optional=True
    ),
    "beam_width": Rule(int, lambda v: v >= 1, "a whole number from 1 up"),
    "length_penalty": Rule(float, lambda v: -10 <= v <= 10, "a number from -10 to 10, 0 for none"),
}
"""By name, the options of sampling and of beam search."""


def is_number(value: object, kind: type[int] | type[float]) -> TypeGuard[int | float]:
    """Return whether a value is a number of that kind, including numpy's but not True or False."""
    return not isinstance(value, bool) and isinstance(value, Integral if kind is int else Real)


def check_flag(name: str, value: object) -> None:
    """Raise `InvalidOption` unless the value is True or False."""
    if not isinstance(value, bool):
        raise InvalidOption(f"{name} is {shown(value)}: choose True or False.", name)


def check_strings(name: str, given: Any) -> tuple[str, ...]:
    """Check `stop` or `bad_words`, given as one string or many. Raises `InvalidOption`."""
    strings = (given,) if isinstance(given, str) else several(name, given)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise InvalidOption(
                f"{name} contains {shown(string)}: choose strings of one character or more.", name
            )
    total = sum(map(len, strings))
    if total > MAX_STOP_CHARACTERS:
        raise InvalidOption(
            f"the {len(strings)} strings of {name} have {total} characters in all: give at most "
            f"{MAX_STOP_CHARACTERS}.",
            name,
        )
    return strings


def check_token_ids(name: str, ids: Any) -> tuple[int, ...]:
    """Check token ids, given as one or many. Raises `InvalidOption`."""
    given = several(name, ids)
    for token_id in given:
        if not is_number(token_id, int) or token_id < 0:
            raise InvalidOption(f"{name} contains {shown(token_id)}: choose ids from 0 up.", name)
    return tuple(int(token_id) for token_id in given)


def check_allowed(ids: Any) -> list[int]:
    """Check for at least one allowed token, and remove duplicates. Raises `InvalidOption`."""
    allowed = list(dict.fromkeys(check_token_ids("allowed_token_ids", ids)))
    if not allowed:
        raise InvalidOption(
            "allowed_token_ids is empty, so no token could be chosen: give some, or None for all.",
            "allowed_token_ids",
        )
    return allowed


def check_processors(given: Any) -> list[Any]:
    """Check functions of a row of logits, given as one or many. Raises `InvalidOption`."""
    processors = [given] if callable(given) else list(several("logits_processors", given))
    for one in processors:
        if not callable(one):
            raise InvalidOption(
                f"logits_processors contains {shown(one)}: give functions of the output tokens and "
                "a row of logits.",
                "logits_processors",
            )
    return processors


def check_logit_bias(bias: Any) -> dict[int, float] | None:
    """Copy a bias with plain numbers; ids may be strings, as in JSON. OpenAI's limit is 100."""
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise InvalidOption(
            f"logit_bias is {shown(bias)}: choose a dict from token id to bias.", "logit_bias"
        )
    checked: dict[int, float] = {}
    for key, value in bias.items():
        is_digits = isinstance(key, str) and key.isdecimal() and len(key) < 20
        token_id = int(key) if is_digits else key
        if not is_number(token_id, int) or token_id < 0:
            raise InvalidOption(
                f"logit_bias names token {shown(key)}: choose ids from 0 up.", "logit_bias"
            )
        if not is_number(value, float) or not -100 <= value <= 100:
            raise InvalidOption(
                f"logit_bias of token {shown(key)} is {shown(value)}: choose a number from "
                "-100 (as good as never) to 100 (as good as always).",
                "logit_bias",
            )
        checked[int(token_id)] = float(value)
    return checked


def clamped(bias: Mapping[Any, Any]) -> dict[Any, Any]:
    """Limit the values to the range from -100 to 100, as in vLLM."""
    return {
        key: max(-100.0, min(100.0, value)) if is_number(value, float) else value
        for key, value in bias.items()
    }


def several(name: str, given: Any) -> tuple[Any, ...]:
    """Return one value or many as a tuple; None gives an empty one.

    Raises `InvalidOption` for a dict.
    """
    if given is None:
        return ()
    if isinstance(given, Mapping):
        raise InvalidOption(f"{name} is {shown(given)}: choose a list.", name)
    if hasattr(given, "tolist"):  # an array or tensor, perhaps of one number without a dimension
        given = given.tolist()
    return tuple(given) if isinstance(given, Iterable) else (given,)
