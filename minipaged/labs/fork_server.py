"""Runs a lab's tests in copies of one process that has imported torch already.

Starting Python and importing torch takes seconds, and a lab has five tasks. So a server imports
what the tests need, and copies itself (fork) for every run. It computes nothing itself: whatever a
copy inherits is unused. A copy is as much on its own as a process that was started for it: it has
its own session, which ends as a whole at the time limit, nothing to read, and its output goes to a
file.

Only on Linux: macOS's system libraries do not survive a fork, and Windows has none.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

CAN_FORK = sys.platform == "linux"

_IMPORTED_BEFOREHAND = (
    "pdb", "pytest", "minipaged.labs.plugin", "minipaged.evaluation.stories",
    "minipaged.evaluation.testing.paged_setup", "minipaged.engine.build", "minipaged.llm",
    "minipaged.models.loader", "minipaged.sampling", "minipaged.tokenizer.load",
)  # fmt: skip
# The first entry of sys.path would be the current folder, which is a student's own.
_PROGRAM = "import sys; del sys.path[0]; from minipaged.labs.fork_server import serve; serve()"
_POLL_SECONDS = 0.01


class ForkServer:
    """The server as `grade` needs it: started by the first run, ended with this process."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None

    def run(self, arguments: list[str], folder: Path, seconds: float) -> str | None:
        """What pytest printed; None if it had to be stopped, with all that it had started."""
        server = self._process or self._start()
        assert server.stdin is not None
        assert server.stdout is not None
        printed = folder / "printed.txt"
        printed.touch()
        request = json.dumps([arguments, str(folder), str(printed), seconds])
        with contextlib.suppress(BrokenPipeError):
            server.stdin.write(request + "\n")
            server.stdin.flush()
        answer = server.stdout.readline()
        if not answer:  # the tests have ended the server, too
            self.close()
        return None if answer == "stopped\n" else printed.read_text("utf-8", errors="replace")

    def close(self) -> None:
        """End the server."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> "subprocess.Popen[str]":
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM], env=self._environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        atexit.register(self.close)
        return self._process


def serve() -> None:
    """The server itself: a line of JSON for each run, answered by "ended" or "stopped"."""
    for name in _IMPORTED_BEFOREHAND:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the garbage collectors of the copies leave all of this alone
    while request := sys.stdin.buffer.readline():
        arguments, folder, printed, seconds = json.loads(request)
        copy = os.fork()
        if copy == 0:
            _run_pytest(arguments, folder, printed)
        print("ended" if _wait(copy, seconds) else "stopped", flush=True)


def _run_pytest(arguments: list[str], folder: str, printed: str) -> None:
    """What the copy does. It does not return."""
    import pytest

    os.setsid()
    os.chdir(folder)
    sys.path.insert(0, folder)  # as `python -m pytest` does
    output = os.open(printed, os.O_WRONLY | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        pytest.main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(0)


def _wait(copy: int, seconds: float) -> bool:
    """Wait for a copy; whether it has ended in time. Ends whatever it has started."""
    deadline = time.monotonic() + seconds
    while not (ended := os.waitpid(copy, os.WNOHANG)[0]) and time.monotonic() < deadline:
        # Nothing arrives before the answer, unless the process that asked is gone.
        if select.select([0], [], [], _POLL_SECONDS)[0]:
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(copy, signal.SIGKILL)
    if not ended:
        os.waitpid(copy, 0)
    return bool(ended)
