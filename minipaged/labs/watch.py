"""A check after every save, answered at once.

To start Python and import torch takes seconds. So one process imports what the tests need, and
every check runs in a copy of it (a fork server). It has never computed anything, so nothing that a
copy inherits is in use. Where there is no fork, as on Windows, each check starts anew.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

from minipaged.labs.grading import QUIET

CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()

_POLL_SECONDS = 0.1
_KNOWN_BEFOREHAND = [
    "pytest",
    "minipaged.labs.plugin",
    "minipaged.engine.parts",
    "minipaged.engine.llm_engine",
]


def wait_for_save(file: Path, last: float, until: Callable[[], bool] = lambda: False) -> float:
    """Return the file's new time of change, once it has one; `last` again if told to stop."""
    while not until():
        try:
            changed = file.stat().st_mtime
        except FileNotFoundError:  # some editors write a new file and rename it
            changed = last
        if changed != last:
            return changed
        time.sleep(_POLL_SECONDS)
    return last


def run_in_copy(arguments: list[str], folder: Path, seconds: float) -> str | None:
    """What `grade` wants of a runner: what pytest printed; None if it had to be stopped."""
    printed = folder / "printed.txt"
    printed.touch()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_KNOWN_BEFOREHAND)
    copy = context.Process(target=_run_pytest, args=(arguments, folder, printed))
    copy.start()
    copy.join(seconds)
    if copy.is_alive():
        copy.kill()
        copy.join()
        return None
    return printed.read_text(encoding="utf-8", errors="replace")


def _run_pytest(arguments: list[str], folder: Path, printed: Path) -> None:
    import pytest

    os.chdir(folder)
    os.environ.update(QUIET)
    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        pytest.main(arguments)
