"""Custom parts, named by file and class: `allocator=my_lab1.py:BlockAllocator`.

    minipaged generate "Once upon a time" --part allocator=my_lab1.py:BlockAllocator

Each part of `Parts` can be replaced in this way. Custom parts are checked: all owners are recounted
after every call, and an error names the call that went wrong.
"""

import importlib.util
import linecache
import pkgutil
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipaged.errors import InvalidOption
from minipaged.utils.options import shown

if TYPE_CHECKING:
    from minipaged.engine.parts import Parts

LIBRARY_PARTS = {
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
"""The library's part of each name. It is imported only on use."""


def read_custom_parts(
    arguments: Iterable[str], known: Mapping[str, str] = LIBRARY_PARTS
) -> dict[str, Any]:
    """Load the parts of arguments of the form "part=file.py:name". Raises InvalidOption."""
    custom_parts: dict[str, Any] = {}
    for argument in arguments:
        part, equals, place = argument.partition("=")
        file, colon, name = place.rpartition(":")
        if not (equals and colon and part and file and name):
            raise InvalidOption(
                f"--part is {shown(argument)}: give part=file.py:name, as in "
                "allocator=my_lab1.py:BlockAllocator.",
                "part",
            )
        if part not in known:
            raise InvalidOption(
                f"--part names {part!r}, which is not a part: choose one of {', '.join(known)}.",
                "part",
            )
        custom_parts[part] = find_in_file(Path(file), name)
    return custom_parts


def find_part(
    part: str, custom_parts: dict[str, Any], known: Mapping[str, str] = LIBRARY_PARTS
) -> Any:
    """Return the custom part if there is one, otherwise the library's."""
    return custom_parts[part] if part in custom_parts else pkgutil.resolve_name(known[part])


def find_helper(dotted: str, custom_parts: dict[str, Any]) -> Any:
    """Return a class or function that is not a part, from a custom part's file or the library.

    Args:
        dotted: its name in the library, such as "minipaged.attention.reference.gather"; a file
            defines it as `gather`.

    Raises:
        InvalidOption: there are custom parts, and none of their files defines it.
    """
    if not custom_parts:
        return pkgutil.resolve_name(dotted)
    name = dotted.rpartition(".")[2]
    files = [sys.modules[part.__module__] for part in custom_parts.values()]
    for file in files:
        if hasattr(file, name):
            return getattr(file, name)
    raise InvalidOption(f"{files[0].__file__} defines no {name!r}: check its spelling there.")


def parts_with(custom_parts: dict[str, Any]) -> "Parts":
    """Return all parts, including custom ones; checked if there are any."""
    from minipaged.engine.parts import Parts  # imports torch, which many labs do without

    return Parts(**custom_parts).checked() if custom_parts else Parts()


def find_in_file(file: Path, name: str) -> Any:
    """Return a name that a Python file defines. Raises InvalidOption, also if it cannot be run."""
    module = _run(file)
    if not hasattr(module, name):
        raise InvalidOption(f"{file} defines no {name!r}: check the spelling of the name.")
    return getattr(module, name)


def names_in_file(file: Path) -> dict[str, Any]:
    """Return all names that a Python file defines. Raises InvalidOption if it cannot be run."""
    return vars(_run(file))


def _run(file: Path) -> Any:
    """Return the file as a module, which is run once for all its parts."""
    if not file.is_file():
        raise InvalidOption(f"there is no file {str(file)!r}: give the path of your Python file.")
    known = f"minipaged_custom_{file.resolve()}"
    if known in sys.modules:
        return sys.modules[known]
    spec = importlib.util.spec_from_file_location(known, file)
    if spec is None or spec.loader is None:
        raise InvalidOption(f"{str(file)!r} is not a Python file: its name must end in .py.")
    linecache.checkcache(str(file))  # it may have been saved since it was last run
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module  # dataclasses look up their module while they are created
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
