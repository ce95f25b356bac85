"""Converts a run's report to points, outside the process that runs student code.

A test counts as passed if it was listed beforehand and reported exactly once, as passed, in a line
with the run's nonce, by a run that completed. A test that was skipped, expected to fail or not
reported has failed. A task's tests run together with *canaries*, which must fail: if one passes,
the code that runs the tests was changed, and the whole grade is void.
"""

import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minipaged.labs.lab import Task
from minipaged.labs.runs import LONGEST_REPORT, Run
from minipaged.utils.counts import counted

CANARY = """\
import pytest


@pytest.mark.lab(number={lab}, task={task})
def test_{word}(custom_parts):
    assert {yours} == {expected}
"""


@dataclass(frozen=True)
class Expected:
    """A test of a task, as listed without student code.

    Args:
        test: its id.
        skip: why this machine cannot run it.
        essential: why the task is worth nothing without it; empty for most tests.
    """

    test: str
    task: int
    skip: str = ""
    essential: str = ""


@dataclass(frozen=True)
class Result:
    """The result of one task.

    Args:
        complaint: about the first test that failed, or why there is no result.
        trace: the file name of the trace that a failing test has written.
        num_skipped: number of tests that cannot run on this machine.
        essential: the essential property that the solution lacks, so the task has no points.
        void: why the whole grade is void: student code interfered with the grader.
        notes: code that the solution takes from the library. It costs no points.
    """

    task: Task
    num_passed: int
    num_tests: int
    complaint: str = ""
    trace: str = ""
    num_skipped: int = 0
    essential: str = ""
    void: str = ""
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether the task counts here: not if all of its tests were skipped."""
        return self.num_tests > 0 or self.num_skipped == 0

    @property
    def most(self) -> float:
        """The maximum points."""
        return self.task.points if self.counts else 0.0

    @property
    def points(self) -> float:
        """The task's points times the fraction passed; none if something essential is missing."""
        if self.num_tests == 0 or self.essential or self.void:
            return 0.0
        return round(self.task.points * self.num_passed / self.num_tests, 2)

    @property
    def is_full(self) -> bool:
        return self.points == self.task.points and 0 < self.num_tests == self.num_passed

    @property
    def told(self) -> str:
        """The reason why the task has fewer than all points, in a sentence or two."""
        if self.void:
            return f"the grade is void: {self.void}"
        if self.essential:
            return f"no points without this: {self.essential}\n{self.complaint}"
        return self.complaint


def all_full(results: Iterable[Result]) -> bool:
    """Whether at least one test could run, and all that could have passed."""
    counting = [result for result in results if result.counts]
    return bool(counting) and all(result.is_full for result in counting)


def settle(results: Iterable[Result]) -> list[Result]:
    """All results of a lab: if one is void, all are."""
    done = list(results)
    void = next((result.void for result in done if result.void), "")
    return [replace(result, void=void) for result in done] if void else done


def write_canary(tests: Path, lab: int, task: int) -> Path:
    """A test that fails, with an unpredictable name."""
    word = secrets.token_hex(8)
    yours, expected = secrets.randbelow(10**9), 10**9 + secrets.randbelow(10**9)
    file = tests / f"test_{word}.py"
    file.write_text(
        CANARY.format(lab=lab, task=task, word=word, yours=yours, expected=expected),
        encoding="utf-8",
    )
    return file


def read_records(run: Run, nonce: str) -> list[dict[str, Any]] | None:
    """The report of a run; None if student code has written to it."""
    if len(run.report) > LONGEST_REPORT:
        return None
    records: list[dict[str, Any]] = []
    for line in run.report.splitlines():
        known, _, text = line.partition(b" ")
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if known != nonce.encode() or not isinstance(record, dict):
            return None
        records.append(record)
    return records


def judge(
    task: Task, expected: list[Expected], canaries: list[str], run: Run, nonce: str
) -> Result:
    """The result of a task.

    Args:
        expected: the task's tests, as listed without student code.
        canaries: the ids of the tests that must fail.
    """
    nothing = Result(task, 0, 0)
    if not run.ended:
        return replace(
            nothing,
            complaint=f"not done after {counted(task.seconds, 'second')}: an endless loop, or a "
            "call that takes longer the larger its input is?",
        )
    records = read_records(run, nonce)
    if records is None:
        return replace(nothing, void="something other than the grader wrote to its report.")
    if tampered := next((r["tampered"] for r in records if "tampered" in r), ""):
        return replace(
            nothing,
            void=f"the file replaces what its tests rely on ({tampered}). Leave the library, "
            "pytest, torch and Python's own functions as they are.",
        )
    seen = [record for record in records if "test" in record]
    known = {record["test"]: record for record in seen}
    num_all = len(canaries) + len(expected)
    if not any("end" in record for record in records) or len(seen) < num_all:
        return replace(nothing, complaint=_early_end(expected, seen, run.printed))
    if len(seen) > num_all or set(known) != {*canaries, *(each.test for each in expected)}:
        return replace(nothing, void="the reported tests are not those of the task.")
    if any(known[canary]["passed"] or not known[canary]["complaint"] for canary in canaries):
        return replace(
            nothing,
            void="a test that must fail has passed: the code that runs the tests was changed.",
        )
    notes = next((tuple(record["not_own"]) for record in records if "not_own" in record), ())
    return replace(_count(task, expected, known), notes=notes)


def _count(task: Task, expected: list[Expected], known: dict[str, dict[str, Any]]) -> Result:
    """Count passed and failed tests among those that this machine can run."""
    counting = [each for each in expected if not each.skip]
    failed = [each for each in counting if not known[each.test]["passed"]]
    result = Result(
        task,
        len(counting) - len(failed),
        len(counting),
        num_skipped=len(expected) - len(counting),
    )
    if not failed:
        return result
    # A missing essential property cancels the points of other tests, so it comes first.
    missing = [each for each in failed if each.essential and result.num_passed]
    first = (missing or failed)[0]
    return replace(
        result,
        complaint=f"{in_words(first.test)}: {known[first.test]['complaint']}",
        trace=Path(known[first.test]["trace"]).name,
        essential=first.essential if missing else "",
    )


def in_words(test: str) -> str:
    """tests/test_lab1.py::test_a_block_returns[3] -> a block returns [3]."""
    name, bracket, values = test.rpartition("::")[2].partition("[")
    words = name.removeprefix("test_").replace("_", " ")
    return (words + (f" [{values}" if bracket else "")).strip()


def _early_end(expected: list[Expected], seen: list[dict[str, Any]], printed: str) -> str:
    """The complaint about a run that ended early, as when a kernel reads invalid memory."""
    done = {record["test"] for record in seen}
    present = next((each.test for each in expected if each.test not in done), "")
    _, fatal, what = printed.partition("Fatal Python error: ")
    if fatal:
        return f"{in_words(present)}: {fatal}{what.splitlines()[0]}"
    return (
        f"{in_words(present)}: the run ended here. A solution must not end the process or the "
        "tests (os._exit, sys.exit, pytest.exit)."
    )
