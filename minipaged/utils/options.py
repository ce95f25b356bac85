"""Options that are declared once.

An option is a dataclass field with a default, a help text and limits:

    block_size: int = option(16, "Token slots per block.", at_least=1)

This line is the source of the check (`check_options`), of a function's signature and documentation
(`takes`), and of the command-line flag (`minipaged/cli/options.py`).
"""

import difflib
import inspect
import reprlib
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import wraps
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
        """The values of a Literal or a bool; empty for other types."""
        if self.type is bool:
            return (True, False)
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def description(self) -> str:
        """The help text, with the choices if there are any."""
        names = ", ".join(map(str, self.choices))
        return self.help if self.type is bool or not names else f"{self.help} One of {names}."

    def check(self, value: object) -> None:
        """Raise InvalidOption for a value that cannot work with any other options."""
        if value is None and self.may_be_none:
            return
        if self.choices:
            require_one_of(self.name, value, self.choices)
        elif self.type is int:
            require_whole(self.name, value, self.at_least, self.at_most)
        elif self.type is float:
            require_share(self.name, value, self.at_least, self.at_most)
        else:
            is_dict = get_origin(self.type) is dict
            require_type(self.name, value, dict if is_dict else self.type)


def options_of(args: type) -> dict[str, Option]:
    """Return the options that a dataclass declares, by name."""
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
    """Check each option separately. Raises InvalidOption."""
    for each in options_of(type(args)).values():
        each.check(getattr(args, each.name))


# ---- a function that takes them ------------------------------------------------------------------


def takes(
    args: Callable[P, Args],
) -> Callable[[Callable[[Self, Args], None]], Callable[Concatenate[Self, P], None]]:
    """Make a method with one parameter `args` callable with the fields of `args` as arguments.

        @takes(EngineArgs)
        def __init__(self, args: EngineArgs) -> None: ...

    Editors, `help` and `inspect.signature` see every option with its type and default.
    """
    assert isinstance(args, type)
    known = options_of(args)

    def decorate(method: Callable[[Self, Args], None]) -> Callable[Concatenate[Self, P], None]:
        def call(self: Self, /, *positional: P.args, **named: P.kwargs) -> None:
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


def translated(
    translate: Callable[[dict[str, Any], dict[str, Option]], dict[str, Any]],
) -> Callable[[type[Args]], type[Args]]:
    """Make a dataclass that passes its keyword arguments through `translate` first."""

    def decorate(args: type[Args]) -> type[Args]:
        known, init = options_of(args), args.__init__

        @wraps(init)
        def translating(self: Args, *positional: Any, **named: Any) -> None:
            init(self, *positional, **translate(named, known))

        args.__init__ = translating
        return args

    return decorate


def _describe(options: dict[str, Option]) -> str:
    """Write the `Args:` section of a docstring."""
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

LARGEST_INT = 2**63 - 1
"""The largest whole number in tensors and seeds."""


def shown(value: object) -> str:
    """Format a value for a message: short, and without raising for any value."""
    try:
        return _SHORT.repr(value)
    except Exception:  # a `__repr__` that raises, or a number of more digits than Python converts
        return f"a {type(value).__name__} that cannot be shown"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def refuse_unknown(given: Iterable[str], known: list[str], also: Iterable[str] = ()) -> None:
    """Refuse a name that is neither in `known` nor in `also`, whose names are not listed.

    Raises InvalidOption with the closest name.
    """
    every = [*known, *also]
    for name in given:
        if name in every:
            continue
        closest = difflib.get_close_matches(name, every, n=1, cutoff=0.5)
        advice = (
            f"did you mean {closest[0]!r}?" if closest else f"choose one of {', '.join(known)}."
        )
        raise InvalidOption(f"there is no option {name!r}: {advice}", name)


def require_type(name: str, value: object, kind: Any, *, optional: bool = False) -> None:
    """Refuse a value of another type; None passes if it is optional. Raises InvalidOption."""
    if not isinstance(value, kind) and not (optional and value is None):
        kinds = get_args(kind) or (kind,)  # of `str | Path`, both
        named = " or ".join(each.__name__ for each in kinds) + (" or None" if optional else "")
        raise InvalidOption(f"{name} is {shown(value)}: give a {named}.", name)


def require_whole(name: str, value: object, least: float | None, most: float | None = None) -> None:
    """Refuse a value that is not a whole number from `least` to `most`. Raises InvalidOption."""
    low = -LARGEST_INT if least is None else least
    high = LARGEST_INT if most is None else most
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        above = isinstance(value, int) and value > high
        limit = f"to {high}" if above or most is not None else "up"
        raise InvalidOption(
            f"{name} is {shown(value)}: give a whole number from {least} {limit}.", name
        )


def require_share(name: str, value: Any, least: float | None, most: float | None) -> None:
    """Refuse a value that is not a number from `least` to `most`. Raises InvalidOption."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    low, high = (
        (float("-inf") if least is None else least),
        (float("inf") if most is None else most),
    )
    if not is_number or not low <= value <= high:
        raise InvalidOption(
            f"{name} is {shown(value)}: give a number from {least} to {most}.", name
        )


def require_one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse a value that is not one of the choices. Raises InvalidOption."""
    # Types first: comparing an array returns an array, and 1 is not True.
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        names = ", ".join(map(str, choices))
        raise InvalidOption(f"{name} is {shown(value)}: choose one of {names}.", name)
