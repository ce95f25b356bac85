"""Which tests run by default, and which only in the full set.

Two marks keep the default run short:

    @pytest.mark.full     the test runs in the full set only
    @pytest.mark.sampled  of the cases of a long matrix, the default run takes a few, such that each
                          value of each parameter occurs; the others run in the full set only
"""

from collections.abc import Iterable, Sequence

import pytest

Case = frozenset[tuple[str, str]]
"""A case of a matrix: the name and the value, in text, of each parameter."""


_is_full = False


def choose(full: bool) -> None:
    """Whether this is a run of the full set: said before tests are collected."""
    global _is_full
    _is_full = full


def examples(default: int, *, full: int) -> int:
    """How many examples of a state machine to try."""
    return full if _is_full else default


def sample(cases: Sequence[Case]) -> set[int]:
    """The numbers of a few cases in which every value of every parameter occurs.

    Always the case next that brings in the most values: of a product of parameters, about as many
    cases as the longest has values.
    """
    missing = set[tuple[str, str]]().union(*cases)
    chosen: set[int] = set()
    while missing:
        best = max(range(len(cases)), key=lambda number: len(cases[number] & missing))
        chosen.add(best)
        missing -= cases[best]
    return chosen


def full_only(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """The tests of these that the default run leaves out."""
    left_out: set[pytest.Item] = set()
    matrices: dict[tuple[object, ...], list[pytest.Function]] = {}
    for item in items:
        if item.get_closest_marker("full"):
            left_out.add(item)
        elif isinstance(item, pytest.Function) and item.get_closest_marker("sampled"):
            matrices.setdefault((item.path, item.cls, item.originalname), []).append(item)
    for matrix in matrices.values():
        chosen = sample([_case(item) for item in matrix])
        left_out |= {item for number, item in enumerate(matrix) if number not in chosen}
    return left_out


def _case(item: pytest.Function) -> Case:
    return frozenset((name, repr(value)) for name, value in item.callspec.params.items())
