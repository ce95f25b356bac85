"""Options that are declared once.

An option is a dataclass field with a default, a help text and limits:

    block_size: int = option(16, "Token slots per block.", at_least=1)

Everything else is derived from this line: the check (`check_options`), a function's signature and
documentation (`takes`), and the flag of the command line (`minipaged/cli/options.py`).
"""

import difflib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, get_args, get_origin

from minipaged.errors import InvalidOption

P = ParamSpec("P")
Args = TypeVar("Args")
Self = TypeVar("Self")


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    kw_only: bool = True,
) -> Any:
    """Declare an option as a field of a dataclass; the field's type is part of the check."""
    limits = {"help": help, "at_least": at_least, "at_most": at_most}
    return field(default=default, kw_only=kw_only, metadata=limits)


@dataclass(frozen=True)
class Option:
    """One declared option."""

    name: str
    type: Any  # without None
    may_be_none: bool  # None: the library chooses
    default: Any
    help: str
    at_least: float | None
    at_most: float | None

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a Literal or a bool; empty where any value may be given."""
        if self.type is bool:
            return (True, False)
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def description(self) -> str:
        """The help text, with the choices if there are any."""
        names = ", ".join(map(str, self.choices))
        return self.help if self.type is bool or not names else f"{self.help} One of {names}."

    def check(self, value: object) -> None:
        """Raise InvalidOption for a value that cannot work, whatever the other options are."""
        if value is None and self.may_be_none:
            return
        if self.choices:
            require_one_of(self.name, value, self.choices)
        elif self.type is int:
            require_whole(self.name, value, self.at_least)
        elif self.type is float:
            require_share(self.name, value, self.at_least, self.at_most)
        elif not isinstance(value, self.type):
            named = getattr(self.type, "__name__", str(self.type))
            raise InvalidOption(f"{self.name} is {value!r}: give a {named}.", self.name)


def options_of(args: type) -> dict[str, Option]:
    """The options that a dataclass declares, by name."""
    found: dict[str, Option] = {}
    for each in fields(args):
        parts = get_args(each.type) if get_origin(each.type) is not Literal else ()
        may_be_none = NoneType in parts
        one = [part for part in parts if part is not NoneType]
        type_without_none = one[0] if may_be_none and len(one) == 1 else each.type
        found[each.name] = Option(
            each.name, type_without_none, may_be_none, each.default, **each.metadata
        )
    return found


def check_options(args: Any) -> None:
    """Check each option by itself. Raises InvalidOption."""
    for each in options_of(type(args)).values():
        each.check(getattr(args, each.name))


# ---- a function that takes them ------------------------------------------------------------------


def takes(
    args: Callable[P, Args],
) -> Callable[[Callable[[Self, Args], None]], Callable[Concatenate[Self, P], None]]:
    """Make a method that takes one `args` callable with the arguments of `args` themselves.

        @takes(EngineArgs)
        def __init__(self, args: EngineArgs) -> None: ...

    Editors, `help` and `inspect.signature` see every option with its type and default. A name that
    is no option raises InvalidOption, which suggests the closest one.
    """
    assert isinstance(args, type)
    known = options_of(args)

    def decorate(method: Callable[[Self, Args], None]) -> Callable[Concatenate[Self, P], None]:
        def call(self: Self, /, *positional: P.args, **named: P.kwargs) -> None:
            for name in named:
                if name not in known:
                    raise InvalidOption(_unknown(name, list(known)), name)
            method(self, args(*positional, **named))

        parameters = [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *inspect.signature(args).parameters.values(),
        ]
        call.__name__, call.__qualname__ = method.__name__, method.__qualname__
        call.__module__ = method.__module__
        summary, _, rest = (inspect.getdoc(method) or "").partition("\n\n")
        call.__doc__ = f"{summary}\n\nArgs:\n{_describe(known)}\n\n{rest}".strip()
        call.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        return call

    return decorate


def _unknown(name: str, known: list[str]) -> str:
    closest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if closest:
        return f"there is no option {name!r}: did you mean {closest[0]!r}?"
    return f"there is no option {name!r}: choose one of {', '.join(known)}."


def _describe(options: dict[str, Option]) -> str:
    """The `Args:` section of a docstring."""
    return "\n".join(
        textwrap.fill(
            f"{each.name}: {each.description}",
            width=96,
            initial_indent=" " * 4,
            subsequent_indent=" " * 8,
        )
        for each in options.values()
    )


# ---- checks --------------------------------------------------------------------------------------


def require_whole(name: str, value: object, least: float | None) -> None:
    """Refuse a value that is not a whole number of at least `least`. Raises InvalidOption."""
    low = float("-inf") if least is None else least
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise InvalidOption(f"{name} is {value!r}: give a whole number from {least} up.", name)


def require_share(name: str, value: Any, least: float | None, most: float | None) -> None:
    """Refuse a value that is not a number from `least` to `most`. Raises InvalidOption."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    low, high = (
        (float("-inf") if least is None else least),
        (float("inf") if most is None else most),
    )
    if not is_number or not low <= value <= high:
        raise InvalidOption(f"{name} is {value!r}: give a number from {least} to {most}.", name)


def require_one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse a value that is none of the choices. Raises InvalidOption."""
    if value not in choices:
        names = ", ".join(map(str, choices))
        raise InvalidOption(f"{name} is {value!r}: choose one of {names}.", name)
