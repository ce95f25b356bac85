"""Seconds since 1970 that never go backwards, for the times that users see."""

import time

_START = time.time() - time.perf_counter()


def wall_clock() -> float:
    """The time of day, from a clock that nobody sets while the program runs."""
    return _START + time.perf_counter()
