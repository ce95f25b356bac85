"""The progress bar of everything that takes long."""

import os
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

from minipaged.errors import InvalidOption
from minipaged.utils.options import require_type
from minipaged.utils.options import shown as in_short

ShowBar = bool | Callable[..., "tqdm[Any]"]
"""Whether a bar is shown; or what makes it, such as partial(tqdm, leave=False)."""


def progress_bar(
    iterable: Iterable[Any] | None = None, *, shown: ShowBar | None = None, **options: Any
) -> "tqdm[Any]":
    """A bar of tqdm on standard error. TQDM_DISABLE in the environment hides it in any case.

    Args:
        iterable: what is counted; None for a bar that is updated by hand.
        shown: whether it is shown, or what makes it. None: if standard error is a terminal.
        options: those of tqdm, such as desc and total.
    """
    if callable(shown):
        return _made_by(shown, iterable, options)
    # tqdm reads the variable itself, but only for what it is not told.
    hidden = True if os.environ.get("TQDM_DISABLE") else None if shown is None else not shown
    return tqdm(iterable, disable=hidden, **options)


def _made_by(
    make: Callable[..., Any], iterable: Iterable[Any] | None, options: dict[str, Any]
) -> "tqdm[Any]":
    try:
        bar = make(iterable, **options)
        require_type("the bar", bar, tqdm)
    except Exception as error:
        raise InvalidOption(
            f"use_tqdm is {in_short(make)}, which makes no bar of tqdm: give True, False or, for "
            "example, partial(tqdm, leave=False).",
            "use_tqdm",
        ) from error
    return bar
