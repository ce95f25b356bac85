"""A part of your own, named by its place: `allocator=my_lab1.py:BlockAllocator`.

    minipaged generate "Once upon a time" --part allocator=my_lab1.py:BlockAllocator

Each role of `Parts` can be swapped so. Swapped parts are checked: a second opinion counts all
owners again after every call, and names the call that went wrong.
"""

import importlib.util
import linecache
import pkgutil
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipaged.errors import InvalidOption

if TYPE_CHECKING:
    from minipaged.engine.parts import Parts

PLAYERS = {
    "allocator": "minipaged.memory.allocator.BlockAllocator",
    "block_table": "minipaged.memory.block_table.BlockTable",
    "prefix_cache": "minipaged.memory.prefix_cache.PrefixCache",
    "memory": "minipaged.memory.block_manager.BlockManager",
    "scheduler": "minipaged.scheduler.fcfs.FCFSScheduler",
    "select_victim": "minipaged.scheduler.fcfs.youngest",
    "paged_attention": "minipaged.attention.reference.reference_paged_attention",
    "store_kv": "minipaged.attention.reference.store_kv",
    "sampling_request": "minipaged.engine.sampling_request.SamplingRequest",
}
"""The roles, and the library's own player of each. They are imported only when one is asked for."""


def read_custom_parts(swaps: Iterable[str]) -> dict[str, Any]:
    """By role, what "role=file.py:name" names. Raises InvalidOption."""
    found: dict[str, Any] = {}
    for swap in swaps:
        role, equals, place = swap.partition("=")
        file, colon, name = place.rpartition(":")
        if not (equals and colon and role and file and name):
            raise InvalidOption(
                f"--part is {swap!r}: give role=file.py:name, as in "
                "allocator=my_lab1.py:BlockAllocator."
            )
        if role not in PLAYERS:
            raise InvalidOption(
                f"--part names the role {role!r}: choose one of {', '.join(PLAYERS)}."
            )
        found[role] = find_in_file(Path(file), name)
    return found


def player(role: str, swapped: dict[str, Any]) -> Any:
    """Who plays a role: the part that was swapped in, or the library's own."""
    return swapped[role] if role in swapped else pkgutil.resolve_name(PLAYERS[role])


def beside(dotted: str, swapped: dict[str, Any]) -> Any:
    """A class or function that plays no role: the swapped parts' file's own, or else the library's.

    Args:
        dotted: the library's, as "minipaged.attention.reference.gather"; the file calls its own
            `gather`.

    Raises:
        InvalidOption: there are swapped parts, and none of their files has it.
    """
    if not swapped:
        return pkgutil.resolve_name(dotted)
    name = dotted.rpartition(".")[2]
    files = [sys.modules[part.__module__] for part in swapped.values()]
    for file in files:
        if hasattr(file, name):
            return getattr(file, name)
    raise InvalidOption(f"{files[0].__file__} defines no {name!r}: is the name spelt as there?")


def parts_with(swapped: dict[str, Any]) -> "Parts":
    """All parts, with these among them; checked if there are any."""
    from minipaged.engine.parts import Parts  # brings torch, which many a lab does without

    return Parts(**swapped).checked() if swapped else Parts()


def find_in_file(file: Path, name: str) -> Any:
    """What a Python file calls so. Raises InvalidOption, also if the file cannot be run."""
    module = _run(file)
    if not hasattr(module, name):
        raise InvalidOption(f"{file} defines no {name!r}: is the name spelt as in the file?")
    return getattr(module, name)


def names_in_file(file: Path) -> dict[str, Any]:
    """All that a Python file gives names to. Raises InvalidOption if it cannot be run."""
    return vars(_run(file))


def _run(file: Path) -> Any:
    """The file as a module; run once, however often it is asked for."""
    if not file.is_file():
        raise InvalidOption(f"there is no file {str(file)!r}: give the place of your Python file.")
    known = f"minipaged_swapped_{file.resolve()}"
    if known in sys.modules:
        return sys.modules[known]
    spec = importlib.util.spec_from_file_location(known, file)
    if spec is None or spec.loader is None:
        raise InvalidOption(f"{str(file)!r} is no Python file: its name must end in .py.")
    linecache.checkcache(str(file))  # it may have been saved since it was last run
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module  # dataclasses look their module up while they are made
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[known]
        where = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        line = getattr(error, "lineno", None) or (where[-1].lineno if where else "?")
        raise InvalidOption(
            f"{file} cannot be run: line {line}, {type(error).__name__}: {error}."
        ) from error
    return module
