"""What the tests of all labs share, as a plugin of pytest.

    pytest -m "lab(number=1, task=2)" --part allocator=my_lab1.py:BlockAllocator

Without --part the library's own parts are tested: they are the reference solution.
"""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from minipaged.engine.custom_parts import (
    LIBRARY_PARTS,
    find_helper,
    find_part,
    parts_with,
    read_custom_parts,
)
from minipaged.tracing.events import Event, EventLog
from minipaged.tracing.trace_file import TraceFile


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --part and --trace-dir."""
    group = parser.getgroup("minipaged labs")
    group.addoption("--part", action="append", default=[], metavar="PART=FILE:NAME")
    group.addoption("--trace-dir", default=".", help="where a failing engine test leaves its trace")


def pytest_configure(config: pytest.Config) -> None:
    """Add the mark by which a task's tests are chosen."""
    config.addinivalue_line("markers", "lab(number, task): the tests of a task of a teaching lab")


@pytest.fixture(scope="session")
def custom_parts(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The student's parts, by their names in `Parts`."""
    return read_custom_parts(request.config.getoption("--part") or ())


@pytest.fixture
def part(custom_parts: dict[str, Any]) -> Callable[[str], Any]:
    """`part("allocator")`: the student's part, or else the library's.

    A helper that is no part is asked for by its full name in the library, and is looked for in the
    student's file: `part("minipaged.attention.reference.gather")`.
    """
    return lambda name: (find_part if name in LIBRARY_PARTS else find_helper)(name, custom_parts)


@pytest.fixture
def observed(
    request: pytest.FixtureRequest, custom_parts: dict[str, Any]
) -> Callable[..., AbstractContextManager[Any]]:
    """`with observed(num_blocks=24) as llm:` a model on the student's parts, checked and traced.

    `also={"paged_attention": attend}` adds parts, which take precedence over the student's. If the
    test fails, its trace is kept, to be watched.
    """

    @contextmanager
    def observe(also: dict[str, Any] | None = None, **options: Any) -> Generator[Any]:
        from minipaged.llm import LLM

        events: list[Event] = []
        try:
            parts = parts_with(custom_parts | (also or {})).traced(EventLog(events.append))
            yield LLM(parts=parts, **options)
        except BaseException:
            _leave_trace(request, events)
            raise

    return observe


def _leave_trace(request: pytest.FixtureRequest, events: list[Event]) -> None:
    folder = Path(str(request.config.getoption("--trace-dir"))).resolve()
    place = folder / f"{request.node.name.split('[')[0]}.jsonl"
    trace = TraceFile(place)
    for event in events:
        trace.write(event)
    trace.close(keep=True)
    print(f"What happened before can be watched: minipaged trace view {place}")
