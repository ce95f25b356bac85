"""Grades a solution: runs each task's tests in a separate process, and counts points.

For every task, the student's file and the tests are copied to a new folder, so the grader tests the
submitted file with the library's own tests. A task that does not end is stopped and has no points;
the other tasks still count. A task whose tests are all skipped by their own marks, for example
because they need a GPU, cannot be tested and does not count.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from minipaged.errors import InvalidOption
from minipaged.labs.fork_server import CAN_FORK, ForkServer
from minipaged.labs.lab import Lab, Task, no_such_task
from minipaged.labs.own_work import LONGEST_FILE, read_notes
from minipaged.labs.runs import Job, Run, run_in_new_process
from minipaged.labs.verdict import Expected, Result, judge, read_records, write_canary

TESTS = Path(__file__).parent / "tests"
_COLLECT_SECONDS = 60.0

Runner = Callable[[Job], Run]


def grade(
    lab: Lab,
    file: Path,
    *,
    only: int | None = None,
    hidden_tests: Path | None = None,
    traces: Path | None = None,
    run: "Runner | None" = None,
) -> Iterator[Result]:
    """The results of a lab's tasks, one after another. Raises InvalidOption.

    Code that the solution takes from the library is noted in the first result. If a result is void,
    all are: see `settle`.

    Args:
        file: the student's file.
        only: the number of the one task to run.
        hidden_tests: a folder with more tests, marked `lab(number=..., task=...)` like ours.
        traces: the folder for traces of failed engine tests; None: they are not kept.
        run: how to run a job. None: in a fork of a prepared process if possible, or in a new one.
    """
    if not file.is_file():
        raise InvalidOption(
            f"there is no file {str(file)!r}: begin with `minipaged lab start {lab.number}`."
        )
    if file.stat().st_size > LONGEST_FILE:
        raise InvalidOption(
            f"{file} has {file.stat().st_size:,} bytes: a solution has at most {LONGEST_FILE:,}."
        )
    if find_spec("pytest") is None:
        raise InvalidOption(
            "the labs need pytest, which is missing: pip install 'minipaged[labs]'."
        )
    tasks = [task for task in lab.tasks if only in (None, task.number)]
    if not tasks:
        raise InvalidOption(no_such_task(lab, only))
    grader = _Grader(lab, file.name, file.read_bytes(), _read_tests(hidden_tests), run or _run)
    expected = grader.list_tests()
    notes = tuple(read_notes(lab, grader.solution.decode("utf-8", errors="replace")))
    for task in tasks:
        result = grader.grade(task, [each for each in expected if each.task == task.number], traces)
        yield replace(result, notes=notes + result.notes if task is tasks[0] else ())


def _read_tests(hidden_tests: Path | None) -> dict[str, bytes]:
    """All test files, by path. They are read once, because a run may change files on disk."""
    folders = {"tests": TESTS}
    if hidden_tests is not None:
        if not hidden_tests.is_dir():
            raise InvalidOption(f"there is no folder {str(hidden_tests)!r} with hidden tests.")
        folders["tests/hidden"] = hidden_tests
    return {
        f"{name}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for name, folder in folders.items()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def _run(job: Job) -> Run:
    return _fork_server().run(job) if CAN_FORK else run_in_new_process(job)


@cache
def _fork_server() -> ForkServer:
    return ForkServer()


@dataclass(frozen=True)
class _Grader:
    """The solution and its tests, both in memory."""

    lab: Lab
    file_name: str
    solution: bytes
    tests: dict[str, bytes]
    run: Runner

    def list_tests(self) -> list[Expected]:
        """All tests of the lab, listed in a process without student code."""
        with _folder() as folder:
            self._write_tests(folder)
            mark = f"lab(number={self.lab.number})"
            job = Job(self._arguments(mark), str(folder), _COLLECT_SECONDS, collect=True)
            run = self.run(job)
            records = read_records(run, job.nonce) or []
            if not any("end" in record for record in records):
                raise InvalidOption(f"the tests cannot be loaded:\n{run.printed[-2000:]}")
            return [Expected(**record) for record in records if "test" in record]

    def grade(self, task: Task, expected: list[Expected], traces: Path | None) -> Result:
        """The result of one task."""
        if expected and all(each.skip for each in expected):
            return Result(task, 0, 0, expected[0].skip, num_skipped=len(expected))
        with _folder() as folder:
            self._write_tests(folder)
            solution = folder / "handed_in" / self.file_name
            solution.parent.mkdir()
            solution.write_bytes(self.solution)
            # One canary before the tests, one after them.
            canaries = [write_canary(folder / "tests", self.lab.number, task.number) for _ in "ab"]
            names = [f"tests/{file.name}" for file in canaries]
            arguments = [
                names[0],
                *self._arguments(f"lab(number={self.lab.number}, task={task.number})"),
                names[1],
                f"--trace-dir={folder / 'traces'}",
                *self.lab.part_options(str(solution)),
            ]
            job = Job(arguments, str(folder), task.seconds, self.lab.holes)
            ids = [f"tests/{file.name}::{file.stem}" for file in canaries]
            result = judge(task, expected, ids, self.run(job), job.nonce)
            trace = folder / "traces" / result.trace
            if traces is not None and result.trace and trace.is_file():
                shutil.copyfile(trace, traces / result.trace)
            return result

    def _write_tests(self, folder: Path) -> None:
        (folder / "traces").mkdir()
        for name, content in self.tests.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    def _arguments(self, mark: str) -> list[str]:
        ours = [n for n in self.tests if n.startswith(f"tests/test_lab{self.lab.number}_")]
        hidden = ["tests/hidden"] if any(n.startswith("tests/hidden/") for n in self.tests) else []
        return [
            *ours, *hidden, "-c", "tests/pytest.ini", "--rootdir=.", "--tb=short", "-m", mark,
        ]  # fmt: skip


def _folder() -> "_PathOfTemporaryFolder":
    return _PathOfTemporaryFolder(prefix="minipaged-lab-", ignore_cleanup_errors=True)


class _PathOfTemporaryFolder(tempfile.TemporaryDirectory[str]):
    """A temporary folder, as a `Path`. Failures to remove it are ignored."""

    def __enter__(self) -> Path:  # type: ignore[override]
        return Path(super().__enter__()).resolve()
