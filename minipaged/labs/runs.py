"""One run of a lab's tests in a separate process, from the outside.

A run reports through an unnamed file, in lines that begin with the run's nonce. Both are created
for the run, so student code cannot predict them. Printed output goes to another unnamed file, as
bytes, so it cannot harm the grader. Neither is read before the process and all processes that it
has started are stopped.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from typing import BinaryIO

QUIET = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTEST_ADDOPTS": "",  # other settings and plugins have no effect
    "PYTEST_PLUGINS": "",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}
LONGEST_REPORT = 4 * 2**20  # bytes; a report is some kilobytes
LONGEST_PRINTED = 64 * 2**10  # bytes of the end of the output
# The first entry of sys.path would be the current folder, which contains the student's files.
_PROGRAM = "import sys; del sys.path[0]; from minipaged.labs.child import main; main()"


@dataclass(frozen=True)
class Job:
    """Describes a run.

    Args:
        arguments: for pytest.
        folder: the current folder of the run.
        seconds: the time limit.
        holes: the bodies that the student writes, as "BlockAllocator.free".
        collect: only list the tests. No student code is loaded.
        nonce: the start of each line of the report.
    """

    arguments: list[str]
    folder: str
    seconds: float
    holes: list[str] = field(default_factory=list[str])
    collect: bool = False
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))

    def as_line(self) -> bytes:
        """The job as a line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"


@dataclass(frozen=True)
class Run:
    """The result of a job.

    Args:
        report: the reported lines; at most LONGEST_REPORT + 1 bytes.
        printed: the end of its printed output.
        ended: whether it ended in time.
    """

    report: bytes
    printed: str
    ended: bool


def run_in_new_process(job: Job) -> Run:
    """Run a job in a new process."""
    with tempfile.TemporaryFile() as report, tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM], cwd=job.folder, env=os.environ | QUIET,
            stdin=subprocess.PIPE, stdout=report, stderr=printed, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(job.as_line())
        ended = True
        try:
            process.wait(job.seconds)
        except subprocess.TimeoutExpired:
            ended = False
        end_session(process.pid)
        process.wait()
        return outcome(report, printed, ended)


def end_session(pid: int) -> None:
    """Stop a session's first process and all of its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def outcome(report: BinaryIO, printed: BinaryIO, ended: bool) -> Run:
    """Read the files of a run, which may have any content and length."""
    report.seek(0)
    printed.seek(max(0, os.fstat(printed.fileno()).st_size - LONGEST_PRINTED))
    last_words = printed.read(LONGEST_PRINTED).decode("utf-8", errors="replace")
    return Run(report.read(LONGEST_REPORT + 1), last_words, ended)
