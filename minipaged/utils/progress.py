"""The progress bar of everything that takes long."""

import os
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(
    iterable: Iterable[Any] | None = None, *, shown: bool | None = None, **options: Any
) -> "tqdm[Any]":
    """A bar of tqdm on standard error. TQDM_DISABLE in the environment hides it in any case.

    Args:
        iterable: what is counted; None for a bar that is updated by hand.
        shown: whether it is shown. None: if standard error is a terminal.
        options: those of tqdm, such as desc and total.
    """
    # tqdm reads the variable itself, but only for what it is not told.
    hidden = True if os.environ.get("TQDM_DISABLE") else None if shown is None else not shown
    return tqdm(iterable, disable=hidden, **options)
