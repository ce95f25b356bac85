"""Runs `minipaged serve` in a separate process during a measurement."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minipaged.config import OPTIONS
from minipaged.evaluation.bench.serve_http import ServerUnusable, Target

SECONDS_TO_START = 600.0  # enough for a large model on a slow disk
OPEN_FILES = 8192  # a connection needs one file on each side


def allow_many_files() -> None:
    """Raise the limit of open files of this process and of those that it starts."""
    with suppress(ImportError, OSError, ValueError):  # Windows has none
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """Engine options as flags of `minipaged serve`, without defaults."""
    flags: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if value == OPTIONS[name].default:
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    return flags


@contextmanager
def running_server(options: Mapping[str, Any]) -> Generator[Target]:
    """A server on a free local port, with these engine options; it ends with the `with` block.

    Raises ServerUnusable with its output if it does not start.
    """
    command = [sys.executable, "-m", "minipaged", "serve", "--port", "0", *as_flags(options)]
    environment = {name: text for name, text in os.environ.items() if name != "MINIPAGED_API_KEY"}
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
            )
        try:
            yield Target.of_url(_wait_until_ready(process, log))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """The address in the ready line."""
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline:
        lines = log.read_text(encoding="utf-8").splitlines()
        for line in lines:
            if "; press Ctrl-C" in line and " on http" in line:
                return line.rpartition(" on ")[2].partition(";")[0]
        if process.poll() is not None:
            said = lines[-1].removeprefix("minipaged: ") if lines else "it printed nothing"
            raise ServerUnusable(f"the server has not started: {said}")
        time.sleep(0.05)
    raise ServerUnusable(f"the server was not ready after {SECONDS_TO_START:.0f} s.")
