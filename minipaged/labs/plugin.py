"""A pytest plugin with the fixtures and options that all lab tests share.

    pytest -m "lab(number=1, task=2)" --part allocator=my_lab1.py:BlockAllocator

Without --part the library's own parts are tested: they are the reference solution.
"""

import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from minipaged.engine.custom_parts import (
    LIBRARY_PARTS,
    find_helper,
    find_part,
    parts_with,
    read_custom_parts,
)
from minipaged.errors import InvalidOption
from minipaged.labs.complaints import CallLog, compared, complaint
from minipaged.tracing.events import Event, EventLog
from minipaged.tracing.trace_file import TraceFile

PARTS = {
    **LIBRARY_PARTS,
    "router": "minipaged.labs.routing.router.PrefixRouter",
    "rank": "minipaged.labs.tensor_parallel.rank.Rank",
}
"""The last two are not parts of an engine: a router distributes requests among several engines, and
a rank is a process of a separate small model."""
CALLS = pytest.StashKey[CallLog]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --part and --trace-dir."""
    group = parser.getgroup("minipaged labs")
    group.addoption("--part", action="append", default=[], metavar="PART=FILE:NAME")
    group.addoption("--trace-dir", default=".", help="folder for traces of failed engine tests")


def pytest_configure(config: pytest.Config) -> None:
    """Add the marks that select a task's tests."""
    config.addinivalue_line("markers", "lab(number, task): the tests of a task of a teaching lab")
    config.addinivalue_line("markers", "essential(why): without it, a lab's task has no points")
    helpers = "newcomers", "pools_of_words", "schedulers", "serving", "two_ranks"
    pytest.register_assert_rewrite(*helpers)
    config.stash[CALLS] = CallLog()


# ---- why a test failed ---------------------------------------------------------------------------


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Called when a test begins."""
    item.config.stash[CALLS].begin()


def pytest_assertrepr_compare(
    config: pytest.Config, op: str, left: object, right: object
) -> list[str] | None:
    """Record both sides of a failed comparison: the left one is the student's."""
    config.stash[CALLS].comparison = compared(op, left, right)
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add `complaint` to the report of a test that did not pass."""
    report = yield
    custom: list[str] = item.config.getoption("--part") or []
    if call.excinfo is not None and custom:
        file = custom[0].partition("=")[2].rpartition(":")[0]
        told = complaint(call.excinfo, file, item.config.stash[CALLS])
        report.complaint = told  # pyright: ignore[reportAttributeAccessIssue]
    return report


# ---- the student's parts -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def custom_parts(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The student's parts, by their names in `Parts`."""
    arguments = request.config.getoption("--part") or ()
    try:
        parts = read_custom_parts(arguments, PARTS)
    except (pytest.skip.Exception, pytest.exit.Exception, SystemExit) as error:
        raise InvalidOption(
            f"the file cannot be loaded: it ends the process ({type(error).__name__})."
        ) from None
    for name in {part.__module__ for part in parts.values()}:
        if name.startswith("minipaged_custom_"):
            request.config.stash[CALLS].watch(sys.modules[name])
    return parts


@pytest.fixture
def part(request: pytest.FixtureRequest, custom_parts: dict[str, Any]) -> Callable[[str], Any]:
    """`part("allocator")`: the student's part, or the library's if the file has none.

    A helper that is not a part is requested by its full name in the library, and looked up in the
    student's file: `part("minipaged.attention.reference.gather")`.
    """

    def find(name: str) -> Any:
        if name in PARTS:
            found = find_part(name, custom_parts, PARTS)
        else:
            found = find_helper(name, custom_parts)
        if not custom_parts or not isinstance(found, FunctionType):
            return found
        return request.config.stash[CALLS].noting(found, found.__name__)

    return find


@pytest.fixture
def observed(
    request: pytest.FixtureRequest, custom_parts: dict[str, Any]
) -> Callable[..., AbstractContextManager[Any]]:
    """`with observed(num_blocks=24) as llm:` a model on the student's parts, checked and traced.

    `also={"paged_attention": attend}` adds parts, which take precedence over the student's. If the
    test fails, its trace is kept for viewing.
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
    if not events:  # the model was not built, so there is nothing to view
        return
    folder = Path(str(request.config.getoption("--trace-dir"))).resolve()
    place = folder / f"{request.node.name.split('[')[0]}.jsonl"
    trace = TraceFile(place)
    for event in events:
        trace.write(event)
    trace.close(keep=True)
    request.node.user_properties.append(("trace", str(place)))
    print(f"To see what happened before, run: minipaged trace view {place}")
