"""Checks the fields of events in traces from files.

assets/replay/state.js has the same two tables, FORMS and FIELDS, and refuses the same events,
because a page may be opened long after its trace was read.
"""

import json
import re
from collections.abc import Callable
from typing import Any

MOST_BLOCKS = 200_000  # in a pool: the page keeps four numbers per block in up to 100 copies
MOST = 2**31 - 1


def find_fault(event: dict[str, Any]) -> str | None:
    """Return a clause on why this event cannot be replayed, or None if it can or is unknown.

    Args:
        event: a parsed line of a trace.
    """
    name = event.get("event")
    if not isinstance(name, str):
        return "it has no event"
    fields = {"step": "count", "time": "time", **FIELDS.get(name, {})}
    for field, form in fields.items():
        if field not in event:
            return f"{name} has no {field}"
        words, fits = FORMS[form]
        if not fits(event[field]):
            value = json.dumps(event[field], ensure_ascii=False)
            shown = value if len(value) <= 60 else value[:60] + "..."
            return f"{field} of {name} is {shown}, and must be {words}"
    for tables, field in OF_EACH_SEQUENCE.get(name, ()):
        missing = event[tables].keys() - event[field].keys()
        if missing:
            return f"{field} of {name} lacks sequence {min(missing)}"
    return None


# 1.0 counts as a whole number, because JavaScript does not distinguish it from 1.
def _is_whole(value: Any, least: int, most: int) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and least <= value <= most and value == int(value)


def _is_count(value: Any) -> bool:
    return _is_whole(value, 0, MOST)


def _is_block(value: Any) -> bool:
    return _is_whole(value, 0, MOST_BLOCKS - 1)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _by_number(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        ids = isinstance(value, dict) and all(re.fullmatch("[0-9]{1,10}", key) for key in value)
        return ids and all(map(fits, value.values()))

    return check


def _are_spans(value: Any) -> bool:
    """Return whether these are a rank's times of one step; see the event `ranks`."""
    names = {"message", "compute", "all_reduce", "gather"}
    if not isinstance(value, dict) or not value.keys() >= names:
        return False
    compute, all_reduce = value["compute"], value["all_reduce"]
    once = [value["message"], value["gather"]]
    are_times = all(map(_list_of(_is_time), (compute, all_reduce, once)))
    return are_times and len(compute) == len(all_reduce) + 2


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_pair(value: Any) -> bool:
    return _list_of(_is_block)(value) and len(value) == 2


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1e12


def _one_of(*names: str) -> tuple[str, Callable[[Any], bool]]:
    return " or ".join(f'"{name}"' for name in names), lambda value: value in names


_BLOCK = f"a whole number from 0 to {MOST_BLOCKS - 1:,}"
_COUNT = f"a whole number from 0 to {MOST:,}"
_SPANS = (
    "a list with message, compute, all_reduce and gather of each rank in microseconds, and two "
    "more times of compute than of all_reduce"
)
FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "count": (_COUNT, _is_count),
    "time": ("a number of seconds from 0 up", _is_time),
    "pool size": (
        f"a whole number from 0 to {MOST_BLOCKS:,}",
        lambda value: _is_whole(value, 0, MOST_BLOCKS),
    ),
    "block size": (f"a whole number from 1 to {MOST:,}", lambda value: _is_whole(value, 1, MOST)),
    "block": (_BLOCK, _is_block),
    "blocks": (f"a list of blocks, each {_BLOCK}", _list_of(_is_block)),
    "pairs": (f"a list of pairs of blocks, each {_BLOCK}", _list_of(_is_pair)),
    "tables": (
        f"an object from sequence ids to lists of blocks, each {_BLOCK}",
        _by_number(_list_of(_is_block)),
    ),
    "counts": (f"an object from sequence ids to numbers, each {_COUNT}", _by_number(_is_count)),
    "names": ("an object from sequence ids to text", _by_number(_is_text)),
    "owners": (
        f"an object from blocks, each {_BLOCK}, to numbers, each {_COUNT}",
        lambda value: _by_number(_is_count)(value) and all(_is_block(int(key)) for key in value),
    ),
    "request": ("text", _is_text),
    "requests": ("a list of text", _list_of(_is_text)),
    "spans": (_SPANS, _list_of(_are_spans)),
    "pool": _one_of("pool", "swap"),
    "mode": _one_of("swap", "recompute"),
}
"""The valid values of a field, in words and as a check."""

_MOVED = {"request_id": "request", "block_tables": "tables", "pairs": "pairs"}
_REPLACED = {"seq_id": "count", "pairs": "pairs"}
_BLOCKS_OF_ONE = {"seq_id": "count", "blocks": "blocks"}
_OWNERS = {"pool": "pool", "block": "block", "ref_count": "count"}
_SIZES = {"num_blocks": "pool size", "num_swap_blocks": "pool size", "block_size": "block size"}
_QUEUES = {"running": "requests", "waiting": "requests", "swapped": "requests"}
FIELDS: dict[str, dict[str, str]] = {
    "init": _SIZES,
    "schedule": {**_QUEUES, "num_scheduled_tokens": "counts"},
    "ranks": {"num_all_reduces": "count", "spans": "spans"},
    "admit": {
        "request_id": "request",
        "block_tables": "tables",
        "num_tokens": "counts",
        "num_cached_tokens": "counts",
    },
    "append": {**_BLOCKS_OF_ONE, "num_tokens": "count"},
    "copy_on_write": _REPLACED,
    "fork": {"parent": "count", "child": "count", "num_tokens": "count"},
    "cache": _BLOCKS_OF_ONE,
    "deduplicate": _REPLACED,
    "evict": {"block": "block"},
    "pin": _BLOCKS_OF_ONE,
    "preempt": {"request_id": "request", "mode": "mode"},
    "swap_out": _MOVED,
    "swap_in": _MOVED,
    "out_of_memory": {"request_id": "request"},
    "free": {"seq_id": "count"},
    "snapshot": {
        **_SIZES,
        **_QUEUES,
        "request_ids": "names",
        "block_tables": "tables",
        "swap_block_tables": "tables",
        "num_tokens": "counts",
        "cached": "blocks",
        "ref_counts": "owners",
        "swap_ref_counts": "owners",
    },
    "allocate": _OWNERS,
    "share": _OWNERS,
    "release": _OWNERS,
}
"""The fields of each event except step and time, by form; see `minipaged.tracing.events`."""

OF_EACH_SEQUENCE = {
    "admit": [("block_tables", "num_tokens"), ("block_tables", "num_cached_tokens")],
    "snapshot": [("block_tables", "num_tokens"), ("swap_block_tables", "num_tokens")],
}
"""By event: fields with block tables, and fields that need an entry for each of their sequences."""
