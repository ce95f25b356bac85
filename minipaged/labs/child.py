"""The inside of a run: the process that loads student code and runs one task's tests on it.

It reports each test, the origin of the student's bodies, and whether the tests' own tools are
unchanged. `verdict.py` decides on points outside this process, because student code can change
anything that runs here.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import pytest

from minipaged.labs.own_work import not_their_own
from minipaged.labs.runs import Job
from minipaged.labs.seal import Seal

LONGEST_FILE = 64 * 2**20  # bytes, printed output included
MEMORY = 8 * 2**30  # bytes, beyond the initial memory of the process
NUM_PROCESSES = 256  # that a run may add, including threads


def main() -> None:
    """The program of a process for one job, which it reads from standard input."""
    job = Job(**json.loads(sys.stdin.buffer.readline()))
    report = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # only the report is written to the original standard output
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    run_job(job, report)


def run_job(job: Job, report: BinaryIO) -> NoReturn:
    """Run a job and end the process, so that nothing registered with `atexit` runs."""
    try:
        _limit_resources()
        sys.path.insert(0, job.folder)  # as `python -m pytest` does
        reporter = Collector if job.collect else Reporter
        pytest.main([*job.arguments, *["--collect-only"] * job.collect], [reporter(job, report)])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(0)


def _limit_resources() -> None:
    """Limit the resources of this process, as far as the system allows it (not for a superuser)."""
    import resource

    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: LONGEST_FILE}
    with contextlib.suppress(OSError, ValueError, IndexError):  # Linux only
        tasks = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])
        limits[resource.RLIMIT_NPROC] = tasks + NUM_PROCESSES  # counted per user
        if not Path("/dev/nvidiactl").exists():  # CUDA reserves more than it uses
            used = Path("/proc/self/status").read_text().partition("VmData:")[2].split()[0]
            limits[resource.RLIMIT_DATA] = int(used) * 1024 + MEMORY
    for which, most in limits.items():
        _, hard = resource.getrlimit(which)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(which, (most, most))


def _writer(job: Job, report: BinaryIO) -> Callable[[dict[str, Any]], None]:
    """Return a function that appends a record to the report."""
    nonce = job.nonce

    def write(record: dict[str, Any]) -> None:
        report.write(f"{nonce} {json.dumps(record)}\n".encode())
        report.flush()

    return write


class Collector:
    """Reports the collected tests, and which of them cannot run on this machine."""

    def __init__(self, job: Job, report: BinaryIO) -> None:
        self._write = _writer(job, report)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Report every test."""
        for item in session.items:
            mark, essential = item.get_closest_marker("lab"), item.get_closest_marker("essential")
            self._write(
                {
                    "test": item.nodeid,
                    "task": mark.kwargs["task"] if mark else 0,
                    "skip": _why_skipped(item),
                    "essential": essential.args[0] if essential else "",
                }
            )
        self._write({"end": True})


def _why_skipped(item: pytest.Item) -> str:
    """The reason why a test's own marks skip it; empty if they do not."""
    for mark in item.iter_markers("skip"):
        return str(mark.kwargs.get("reason") or (mark.args or ("skipped",))[0])
    for mark in item.iter_markers("skipif"):
        if mark.args and mark.args[0] is True:
            return str(mark.kwargs.get("reason", "skipped"))
    return ""


class Reporter:
    """Reports the result of every test."""

    def __init__(self, job: Job, report: BinaryIO) -> None:
        self._write = _writer(job, report)
        self._holes = job.holes
        self._seal: Seal | None = None
        self._phases: dict[str, pytest.TestReport] = {}
        self._complaint = ""

    def pytest_collection_finish(self) -> None:
        """Called when all tests are loaded, but no student code is."""
        self._seal = Seal()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Report a test once it is over."""
        self._phases, self._complaint = {}, ""
        done = yield
        passed = [phase for phase, report in self._phases.items() if _is_passed(report)]
        properties = dict(self._phases["call"].user_properties) if "call" in self._phases else {}
        record = {
            "test": item.nodeid,
            "passed": passed == ["setup", "call", "teardown"],
            "complaint": self._complaint[:2000],
            "trace": properties.get("trace", ""),
        }
        self._write(record)
        if self._seal and (broken := self._seal.broken()):
            self._write({"tampered": broken[:500]})
        return done

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the result of a phase of the current test."""
        self._phases[report.when or ""] = report
        if not _is_passed(report) and not self._complaint:
            self._complaint = str(getattr(report, "complaint", "")) or "it did not pass"

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Report the end, and the origin of the tested bodies."""
        self._write({"not_own": not_their_own(self._holes)})
        self._write({"end": session.testscollected})


def _is_passed(report: pytest.TestReport) -> bool:
    return report.passed and not hasattr(report, "wasxfail")
