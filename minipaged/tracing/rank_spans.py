"""The times of one step on each of several ranks, as the fields of one event.

A model with many layers has hundreds of all-reduces per step, and a trace has thousands of steps.
An event has at most a few hundred times; if there are more, adjacent ones are added up.
"""

from math import ceil
from typing import Any

MOST_TIMES = 360  # in one event: about 2 kB
OTHER_TIMES = 14  # per rank: four that are not of all-reduces, and names as long as ten times


def rank_spans(ranks: list[list[float]]) -> dict[str, Any]:
    """Return the fields of a `ranks` event.

    Args:
        ranks: for each rank, the seconds in the message, then alternately computing and in a
            collective, and finally computing. The last collective is the gather of the logits.
    """
    num_all_reduces = max(0, len(ranks[0]) // 2 - 2)
    room = max(1, (MOST_TIMES // len(ranks) - OTHER_TIMES) // 2)  # per rank, for all-reduces
    together = ceil(num_all_reduces / room) or 1
    spans = [_spans_of(each, together) for each in ranks]
    return {"num_all_reduces": num_all_reduces, "spans": spans}


def _spans_of(seconds: list[float], together: int) -> dict[str, Any]:
    message, *others = (round(1e6 * each) for each in seconds)
    if len(others) == 1:  # a step without tokens has no collective
        others += (0, 0)
    *compute, last, after = others[::2]
    *all_reduce, gather = others[1::2]
    return {
        "message": message,
        "compute": [*_sums(compute, together), last, after],
        "all_reduce": _sums(all_reduce, together),
        "gather": gather,
    }


def _sums(times: list[int], together: int) -> list[int]:
    return [sum(times[i : i + together]) for i in range(0, len(times), together)]
