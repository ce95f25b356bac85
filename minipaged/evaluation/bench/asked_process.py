"""A process that serves requests, one line of JSON each: one side of a comparison.

The two sides of a comparison run in separate processes, which stay loaded and take turns. Each is a
module run as a program (`python -m MODULE OPTIONS`), which calls `answer`.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Timer
from typing import Any

from minipaged.errors import MinipagedError
from minipaged.utils.threads import CHOSEN

SECONDS_TO_END = 20.0


class ProcessEnded(MinipagedError):
    """The process ended, or was ended, before it had answered."""


class AskedProcess:
    """A module run as a program; ends with the `with` block.

    Args:
        module: its name; it calls `answer`.
        options: given to it as JSON.
        environment: added to this process's.
        python: the interpreter of another environment. It runs the module's file, finds only the
            packages of its own environment, and gets no variable that this library has chosen.
    """

    def __init__(
        self,
        module: str,
        options: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        python: Path | None = None,
    ) -> None:
        variables = {**os.environ, **(environment or {})}
        if python is None:  # it finds its modules where this process does
            command = [sys.executable, "-m", module]
            variables["PYTHONPATH"] = os.pathsep.join(sys.path)
        else:
            found = find_spec(module)
            assert found is not None
            assert found.origin is not None
            command = [str(python), "-I", found.origin]
            for ours in ("PYTHONPATH", *CHOSEN):  # also for the processes that it starts
                variables.pop(ours, None)
            variables.update(environment or {})
        # A process group of its own, so that `kill` also ends the processes that it started.
        self._process = subprocess.Popen(
            [*command, json.dumps(dict(options), default=str)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def __enter__(self) -> "AskedProcess":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        with self._process:  # closes the pipes, and waits
            assert self._process.stdin is not None
            with suppress(BrokenPipeError):
                self._process.stdin.close()  # it has answered its last request
            try:
                self._process.wait(0 if error else SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End the process, and all that it started, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def ask(self, do: str, within: float | None = None, **given: Any) -> Any:
        """Send a request and return the answer.

        Args:
            do: the name of the function to call.
            within: kill the process if there is no answer after this many seconds.
            given: the function's arguments.

        Raises:
            ProcessEnded: there is no answer.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        is_late = Event()
        timer = Timer(within or 0.0, lambda: (is_late.set(), self.kill()))
        if within is not None:
            timer.start()
        try:
            self._process.stdin.write(json.dumps({"do": do, **given}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            return json.loads(line)
        if is_late.is_set():
            raise ProcessEnded(
                f"a measured process was ended, because it did not answer within {within:.0f} s."
            )
        code = self._process.wait()
        raise ProcessEnded(
            f"a measured process has ended (exit code {code}): see its output above."
        )


def answer(ways: Mapping[str, Callable[..., Any]]) -> None:
    """Run in the process: call the function that each request names, until the pipe closes."""
    answers = sys.stdout
    for line in sys.stdin:
        given: dict[str, Any] = json.loads(line)
        with redirect_stdout(sys.stderr):  # what a library prints is not an answer
            result = ways[given.pop("do")](**given)
        print(json.dumps(result), file=answers, flush=True)
