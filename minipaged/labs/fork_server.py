"""Runs a lab's tests in forks of one process that has already imported torch.

Starting Python and importing torch takes seconds, and a lab has five tasks. A server therefore
imports what the tests need, and forks itself for every run. It computes nothing itself, so a fork
inherits no state and is as isolated as a new process. After each run the server stops all processes
that the fork has started, including those that left its session: Linux makes the server the parent
of all processes whose own parent has ended.

Only on Linux: macOS's system libraries do not survive a fork, and Windows has none.
"""

import atexit
import base64
import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minipaged.labs.runs import LONGEST_REPORT, QUIET, Job, Run, end_session, outcome

CAN_FORK = sys.platform == "linux"

_IMPORTED_BEFOREHAND = (
    "pdb", "pytest", "minipaged.labs.child", "minipaged.labs.plugin",
    "minipaged.evaluation.stories", "minipaged.evaluation.testing.paged_setup",
    "minipaged.engine.build", "minipaged.llm", "minipaged.models.loader", "minipaged.sampling",
    "minipaged.tokenizer.load",
)  # fmt: skip
_PROGRAM = "import sys; del sys.path[0]; from minipaged.labs.fork_server import serve; serve()"
_POLL_SECONDS = 0.01
_START_SECONDS = 120.0  # for importing torch on a slow machine
_PATIENCE = 10.0  # seconds for the server to stop a run and to reply
_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


class ForkServer:
    """A client of the server, which starts with the first run and ends with this process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, job: Job) -> Run:
        """Run a job in a fork of the server.

        If student code has ended or stopped the server, the run has no report, and the next run
        starts another server.
        """
        server = self._process or self._start()
        assert server.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            server.stdin.write(job.as_line())
            server.stdin.flush()
        pid = self._answer(job.nonce, _START_SECONDS)
        answer = self._answer(job.nonce, job.seconds + _PATIENCE) if pid else None
        if answer is None:
            if pid:
                end_session(int(pid))
            self.close()
            return Run(b"", "the process that supervises the tests was ended", ended=True)
        report, printed, ended = json.loads(answer)
        return Run(base64.b64decode(report), printed, ended)

    def _answer(self, nonce: str, seconds: float) -> bytes | None:
        """A line of the server without its leading nonce; None if it is not from the server."""
        assert self._process is not None
        assert self._process.stdout is not None
        line, deadline = b"", time.monotonic() + seconds
        while not line.endswith(b"\n") and len(line) < 2 * LONGEST_REPORT:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                return None
            if not (more := os.read(self._process.stdout.fileno(), 2**16)):
                return None
            line += more
        known, _, answer = line.partition(b" ")
        return answer if known == nonce.encode() else None

    def close(self) -> None:
        """End the server."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> "subprocess.Popen[bytes]":
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM], env=os.environ | QUIET, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        atexit.register(self.close)
        return self._process


def serve() -> None:
    """Run the server: read one line of JSON per job, reply with the fork's id and its `Run`."""
    for name in _IMPORTED_BEFOREHAND:
        importlib.import_module(name)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    gc.collect()
    gc.freeze()  # the garbage collectors of the forks skip all of this
    while line := sys.stdin.buffer.readline():
        job = Job(**json.loads(line))
        run = _run_in_copy(job)
        told = [base64.b64encode(run.report).decode(), run.printed, run.ended]
        print(job.nonce, json.dumps(told), flush=True)


def _run_in_copy(job: Job) -> Run:
    from minipaged.labs.child import run_job

    with tempfile.TemporaryFile() as report, tempfile.TemporaryFile() as printed:
        copy = os.fork()
        if copy == 0:
            os.setsid()
            os.chdir(job.folder)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            printed.close()
            run_job(job, report)
        print(job.nonce, copy, flush=True)
        ended = _wait(copy, job.seconds)
        _stop(copy)
        return outcome(report, printed, ended)


def _wait(copy: int, seconds: float) -> bool:
    """Wait for a fork; return whether it ended in time. It is not reaped: its id stays taken."""
    deadline = time.monotonic() + seconds
    ending = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while not (ended := os.waitid(os.P_PID, copy, ending)) and time.monotonic() < deadline:
        # Nothing arrives before the reply, unless the client process is gone.
        if select.select([0], [], [], _POLL_SECONDS)[0]:
            break
    return ended is not None


def _stop(copy: int) -> None:
    """End a fork and all processes that it has started."""
    end_session(copy)
    deadline = time.monotonic() + _PATIENCE / 2
    with contextlib.suppress(ChildProcessError):  # none is left
        while time.monotonic() < deadline:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                for child in _children():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
                time.sleep(_POLL_SECONDS / 10)


def _children() -> list[int]:
    """The ids of all processes whose parent is this one."""
    children: list[int] = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                children.append(int(status.parent.name))
    return children
