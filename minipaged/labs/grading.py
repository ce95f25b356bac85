"""A task's tests in a process of their own, and the points they give.

A student's file and the tests are copied into an empty folder first, so what is tested is what was
handed in, and by the tests that came with the library. A task that does not end is stopped, has no
points, and the other tasks still count. A task of which every test is skipped, as where a GPU is
needed and there is none, cannot be tested: it does not count, and the others are all there is.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from minipaged.errors import InvalidOption
from minipaged.labs.fork_server import CAN_FORK, ForkServer
from minipaged.labs.lab import Lab, Task

TESTS = Path(__file__).parent / "tests"
QUIET = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTEST_ADDOPTS": "",  # whatever else is set or installed has no say here
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}
_TRACE = "minipaged trace view"  # how a test tells of the trace that it left

Run = Callable[[list[str], Path, float], "str | None"]
"""Runs pytest with arguments, in a folder, for so many seconds: what it printed; None: no end."""


@dataclass(frozen=True)
class Result:
    """What became of one task."""

    task: Task
    num_passed: int
    num_tests: int
    complaint: str = ""  # about the first test that failed, or why there is no result
    trace: str = ""  # the name of the trace that a failing test has left
    num_skipped: int = 0  # tests that cannot run on this machine

    @property
    def counts(self) -> bool:
        """Whether the task has points to win here: not if each of its tests was skipped."""
        return self.num_tests > 0 or self.num_skipped == 0

    @property
    def most(self) -> float:
        """The points that there are to win."""
        return self.task.points if self.counts else 0.0

    @property
    def points(self) -> float:
        """The task's points, in the part that passed; none if nothing was tested."""
        if self.num_tests == 0:
            return 0.0
        return round(self.task.points * self.num_passed / self.num_tests, 2)

    @property
    def is_full(self) -> bool:
        return 0 < self.num_tests == self.num_passed


def all_full(results: Iterable[Result]) -> bool:
    """Whether all is done that could be tested, and something could."""
    counting = [result for result in results if result.counts]
    return bool(counting) and all(result.is_full for result in counting)


def grade(
    lab: Lab,
    file: Path,
    *,
    only: int | None = None,
    hidden_tests: Path | None = None,
    traces: Path | None = None,
    run: "Run | None" = None,
) -> Iterator[Result]:
    """The results of a lab's tasks, one after another. Raises InvalidOption.

    Args:
        file: the student's.
        only: the number of the one task to run.
        hidden_tests: a folder with more tests, marked `lab(number=..., task=...)` like ours.
        traces: where to leave the traces of engine tests that fail; None: nowhere.
        run: how to run pytest. None: in a copy of a prepared process, or else in a new one.
    """
    if not file.is_file():
        raise InvalidOption(
            f"there is no file {str(file)!r}: begin with `minipaged lab start {lab.number}`."
        )
    tasks = [task for task in lab.tasks if only in (None, task.number)]
    if not tasks:
        raise InvalidOption(
            f"lab {lab.number} has no task {only}: it has {len(lab.tasks)} of them."
        )
    with tempfile.TemporaryDirectory(prefix="minipaged-lab-") as folder:
        clean = Path(folder)
        _copy_tests(clean, hidden_tests)
        handed_in = clean / "handed_in" / file.name
        handed_in.parent.mkdir()
        shutil.copyfile(file, handed_in)
        for task in tasks:
            result = _grade_task(lab, task, clean, handed_in, run or _run)
            if traces is not None and result.trace:
                shutil.copyfile(clean / "traces" / result.trace, traces / result.trace)
            yield result


def _copy_tests(clean: Path, hidden_tests: Path | None) -> None:
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(TESTS, clean / "tests", ignore=leave)
    (clean / "traces").mkdir()
    if hidden_tests is not None:
        if not hidden_tests.is_dir():
            raise InvalidOption(f"there is no folder {str(hidden_tests)!r} with hidden tests.")
        shutil.copytree(hidden_tests, clean / "tests" / "hidden", ignore=leave)


def _grade_task(lab: Lab, task: Task, clean: Path, handed_in: Path, run: Run) -> Result:
    report = clean / f"task{task.number}.xml"
    ours = sorted(str(test) for test in clean.glob(f"tests/test_lab{lab.number}_*.py"))
    hidden = ["tests/hidden"] if (clean / "tests" / "hidden").exists() else []
    arguments = [
        *ours, *hidden, "-c", "tests/pytest.ini", "--rootdir=.",
        "-m", f"lab(number={lab.number}, task={task.number})",
        f"--junitxml={report}", "--trace-dir=traces", "--tb=short",
        *lab.part_options(str(handed_in)),
    ]  # fmt: skip
    printed = run(arguments, clean, task.seconds)
    if printed is None:
        return Result(task, 0, 0, f"not done after {task.seconds:g} seconds: an endless loop?")
    if not report.exists():
        return Result(task, 0, 0, _last_words(printed))
    return _read(task, report)


def _run(arguments: list[str], folder: Path, seconds: float) -> str | None:
    run = _fork_server().run if CAN_FORK else run_in_new_process
    return run(arguments, folder, seconds)


@cache
def _fork_server() -> ForkServer:
    return ForkServer(os.environ | QUIET)


def run_in_new_process(arguments: list[str], folder: Path, seconds: float) -> str | None:
    """What pytest printed; None if it had to be stopped, with all that it had started."""
    environment = os.environ | QUIET
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *arguments], cwd=folder, env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _stop(process)
        return None
    return printed


def _stop(process: "subprocess.Popen[str]") -> None:
    """End the tests and whatever they have started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _last_words(printed: str) -> str:
    """Of tests that ended without a report, as where a kernel reads what is no memory."""
    lines = [line for line in printed.splitlines() if line.strip()]
    fatal = [line for line in lines if line.startswith("Fatal Python error")]
    return (fatal or lines[-1:] or ["the tests ended without a report"])[0]


def _read(task: Task, report: Path) -> Result:
    """What pytest has noted of each test."""
    cases = list(ET.parse(report).iter("testcase"))
    failed = [case for case in cases if _fault(case) is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    num_tests = len(cases) - len(skipped)
    complaint = trace = ""
    if skipped and not num_tests:
        complaint = _why_skipped(skipped[0])
    if failed:
        complaint = f"{_in_words(failed[0])}: {_first_line(failed[0])}"
        told = (failed[0].findtext("system-out") or "").partition(_TRACE)[2].split()
        trace = Path(told[0]).name if told else ""
    return Result(task, num_tests - len(failed), num_tests, complaint, trace, len(skipped))


def _fault(case: ET.Element) -> ET.Element | None:
    failure = case.find("failure")
    return case.find("error") if failure is None else failure


def _why_skipped(case: ET.Element) -> str:
    skipped = case.find("skipped")
    return "" if skipped is None else skipped.get("message", "")


def _in_words(case: ET.Element) -> str:
    """test_a_block_returns[3] -> a block returns [3]."""
    name, bracket, values = case.get("name", "").partition("[")
    return (
        name.removeprefix("test_").replace("_", " ") + (f" [{values}" if bracket else "")
    ).strip()


def _first_line(case: ET.Element) -> str:
    """The error, without what stands above and below it."""
    fault = _fault(case)
    message = "" if fault is None else fault.get("message", "")
    return (message.strip().splitlines() or ["it failed"])[0]
