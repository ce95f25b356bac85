"""The progress bar of long operations."""

import os
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

from minipaged.errors import InvalidOption
from minipaged.utils.options import require_type
from minipaged.utils.options import shown as in_short

ShowBar = bool | Callable[..., "tqdm[Any]"]
"""Whether to show a bar, or a callable that makes it, such as partial(tqdm, leave=False)."""


def progress_bar(
    iterable: Iterable[Any] | None = None, *, shown: ShowBar | None = None, **options: Any
) -> "tqdm[Any]":
    """Return a tqdm bar on standard error. Setting TQDM_DISABLE in the environment hides it.

    Args:
        iterable: the items to count; None for a bar that is updated manually.
        shown: whether to show it, or a callable that makes it. None: if standard error is a
            terminal.
        options: those of tqdm, such as desc and total.
    """
    if callable(shown):
        return _made_by(shown, iterable, options)
    # tqdm reads the variable itself, but only for arguments that are not given.
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
            f"use_tqdm is {in_short(make)}, which makes no tqdm bar: give True, False or, for "
            "example, partial(tqdm, leave=False).",
            "use_tqdm",
        ) from error
    return bar
