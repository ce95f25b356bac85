"""A process that serves requests, one line of JSON each: one side of a comparison.

The two sides of a comparison run in separate processes, which stay loaded and take turns. Each is a
module run as a program (`python -m MODULE OPTIONS`), which calls `answer`.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from minipaged.errors import MinipagedError

SECONDS_TO_END = 20.0


class AskedProcess:
    """A module run as a program; ends with the `with` block.

    Args:
        module: its name; it calls `answer`.
        options: given to it as JSON.
    """

    def __init__(self, module: str, options: Mapping[str, Any]) -> None:
        command = [sys.executable, "-m", module, json.dumps(dict(options), default=str)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def __enter__(self) -> "AskedProcess":
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:  # closes the pipes, and waits
            assert self._process.stdin is not None
            self._process.stdin.close()  # it has answered its last request
            try:
                self._process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def ask(self, do: str, **given: Any) -> Any:
        """Send a request and return the answer. Raises MinipagedError if the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **given}) + "\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise MinipagedError("a measured process has ended: see its output above.")
        return json.loads(line)


def answer(ways: Mapping[str, Callable[..., Any]]) -> None:
    """Run in the process: call the function that each request names, until the pipe closes."""
    for line in sys.stdin:
        given: dict[str, Any] = json.loads(line)
        print(json.dumps(ways[given.pop("do")](**given)), flush=True)
