"""Processes of several ranks: scripts that build them, and whether any process is left."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SECONDS = 60.0  # for whatever a script does next; it takes a few at most


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with suppress(FileNotFoundError):  # not Linux, or gone in between
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"  # ended, and no process has read its exit code
    return not Path("/proc/self").exists()


def wait_until(condition: Callable[[], bool], seconds: float, what: str = "") -> float:
    """The seconds until the condition holds; AssertionError if that is longer than allowed."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not within {seconds} seconds: {what}"
        time.sleep(0.02)
    return time.monotonic() - start


def wait_until_gone(pids: Sequence[int], seconds: float) -> float:
    """The seconds until all these processes have ended."""
    assert pids
    return wait_until(lambda: not any(map(is_running, pids)), seconds, f"the end of {pids}")


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, and that have not ended."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
    pairs = [line.split() for line in listed.stdout.splitlines()]
    return [int(child) for child, parent in pairs if int(parent) == pid and is_running(int(child))]


def free_port() -> str:
    """A port of the loopback interface that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


@dataclass
class Script:
    """A process that runs a test's script, and is the leader of a process group."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def wait_for(self, word: str, count: int = 1) -> list[str]:
        """The words after the first so many lines that begin with this word."""

        def found() -> list[list[str]]:
            lines = self.log.read_text().splitlines()
            return [line.split()[1:] for line in lines if line.startswith(word + " ")]

        wait_until(lambda: len(found()) >= count or self.process.poll() is not None, SECONDS, word)
        assert len(found()) >= count, f"no {word!r} in:\n{self.log.read_text()}"
        return [value for words in found() for value in words]

    def wait_for_workers(self, count: int = 1) -> list[int]:
        """The process ids that `count` ranks print after "workers"."""
        return [int(pid) for pid in self.wait_for("workers", count)]

    def wait_for_end(self, seconds: float = SECONDS) -> int:
        """The exit code."""
        return self.process.wait(seconds)


@contextmanager
def script(folder: Path, code: str, *command: str, **environment: str) -> Iterator[Script]:
    """Run a script, by Python alone or by a command that takes one; its group ends with the test.

    It can call `tell_workers(llm)`.
    """
    number = time.monotonic_ns()
    file, log = folder / f"script-{number}.py", folder / f"script-{number}.log"
    file.write_text(PREAMBLE + code)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *command, str(file)],
            stdout=out,
            stderr=out,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,
        )
    try:
        yield Script(process, log)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


PREAMBLE = """
import os, signal, sys, time
from minipaged import LLM, SamplingParams
from minipaged.errors import InvalidOption, WorkerLost

PROMPTS = ["Once upon a time", "Theo the frog"]
SMALL = {"num_blocks": 300, "max_num_seqs": 4}


def say(*words):
    print(*words, flush=True)


def two_ranks(**options):
    return LLM("storyteller", **{"tensor_parallel_size": 2, **SMALL, **options})


def tell_workers(llm):
    say("workers", *llm.engine.executor.worker_pids)


def tokens(llm, count=12):
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    return [each.outputs[0].token_ids for each in llm.generate(PROMPTS, params, use_tqdm=False)]

"""
