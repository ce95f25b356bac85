"""Runs ranks as processes on this machine, over gloo, and detects deadlocks.

Each rank reports every collective when it begins. As soon as a rank waits for a call that another
rank never makes, or makes with another shape, the run ends with an explanation. Gloo chooses free
ports; the ranks find each other through a file.
"""

import contextlib
import multiprocessing as mp
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import wraps
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minipaged.errors import MinipagedError
from minipaged.utils.counts import counted

# The methods of torch's ProcessGroup, and the public functions that call them. The methods are
# wrapped in each rank's process, so it does not matter how a file imports the functions.
_COLLECTIVES = {
    "allreduce": "all_reduce", "broadcast": "broadcast", "gather": "gather", "reduce": "reduce",
    "allgather": "all_gather", "_allgather_base": "all_gather_into_tensor", "scatter": "scatter",
    "reduce_scatter": "reduce_scatter", "_reduce_scatter_base": "reduce_scatter_tensor",
    "alltoall": "all_to_all", "alltoall_base": "all_to_all_single", "barrier": "barrier",
    "send": "send", "recv": "recv",
}  # fmt: skip
_LOOPBACK = {"linux": "lo", "darwin": "lo0"}


class RanksFailed(MinipagedError):
    """A rank failed, or the ranks deadlocked."""


@dataclass(frozen=True)
class Collective:
    """A collective that a rank has begun, and the tensor that it passes in.

    Args:
        given: type and shape of the tensor, as text; empty if there is none.
    """

    name: str
    given: str = ""

    def __str__(self) -> str:
        return f"{self.name} of {self.given}" if self.given else self.name


@dataclass
class Report:
    """The calls and the result of one rank.

    Args:
        calls: its collectives, in order.
        value: what its program returned.
        error: the reason if it ended early, else "".
        has_ended: it has returned or failed.
        is_broken: its last collective failed, so another rank may be the cause.
    """

    calls: list[Collective] = field(default_factory=list[Collective])
    value: Any = None
    error: str = ""
    has_ended: bool = False
    is_broken: bool = False


def run_ranks(
    program: Callable[..., Any],
    *args: object,
    num_ranks: int = 2,
    seconds: float = 10.0,
    file: str = "",
) -> list[Report]:
    """Run `program(rank, num_ranks, *args)` in one process per rank. Returns a report per rank.

    Args:
        program: a function at module level, so that another process can import it.
        seconds: the time limit of the run.
        file: errors are reported with their line in this file.

    Raises:
        RanksFailed: a program failed, waited for a call that never comes, or took too long.
    """
    # A fork is ready in milliseconds, but macOS's system libraries do not survive one.
    context = mp.get_context("fork" if sys.platform == "linux" else "spawn")
    reports = [Report() for _ in range(num_ranks)]
    with tempfile.TemporaryDirectory(prefix="minipaged-ranks-") as folder:
        setup = _Setup(num_ranks, (Path(folder) / "store").as_uri(), seconds, file)
        readers: list[Connection] = []
        processes: list[Any] = []
        try:
            for rank in range(num_ranks):
                reader, writer = context.Pipe(duplex=False)
                readers.append(reader)
                arguments = rank, setup, writer, pickle.dumps((program, args))
                processes.append(context.Process(target=_main, args=arguments, daemon=True))
                with warnings.catch_warnings():  # a rank does not use this process's threads
                    warnings.simplefilter("ignore", DeprecationWarning)
                    processes[-1].start()
                writer.close()  # only the rank's copy remains, so the pipe closes with the rank
            _watch(readers, reports, seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for reader in readers:
                reader.close()
    return reports


def _watch(readers: list[Connection], reports: list[Report], seconds: float) -> None:
    """Receive the ranks' messages until all ranks have ended. Raises RanksFailed."""
    deadline = time.monotonic() + seconds
    while not all(report.has_ended for report in reports):
        open_ones = [r for r, report in zip(readers, reports, strict=True) if not report.has_ended]
        ready = wait(open_ones, max(0.0, deadline - time.monotonic()))
        for reader in open_ones:
            if reader in ready:
                _take_up(reader, reports[readers.index(reader)])
        why = what_is_wrong(reports) or ("" if ready else _too_long(reports, seconds))
        if why:
            raise RanksFailed(why)


def _take_up(reader: Connection, report: Report) -> None:
    """Process one message of a rank."""
    kind, value = _told(reader)
    if kind == "call":
        report.calls.append(value)
        return
    report.has_ended, report.is_broken = True, kind == "broken"
    if kind == "value":
        report.value = value
    else:
        report.error = value


def _told(reader: Connection) -> tuple[str, Any]:
    try:
        return pickle.loads(reader.recv_bytes())
    except (EOFError, OSError):  # the process is gone
        return "error", "the process ended early (os._exit, sys.exit, or a crash)"


def what_is_wrong(reports: list[Report]) -> str:
    """Why the ranks can no longer all finish, in one sentence; empty as long as they can."""
    for rank, report in enumerate(reports):
        if report.error and not report.is_broken:
            return f"rank {rank}: {report.error}"
    for rank, report in enumerate(reports):
        for other, theirs in enumerate(reports):
            if why := _never_meet(rank, report, other, theirs):
                return why
    if not all(report.has_ended for report in reports):
        return ""
    broken = [f"rank {n}: {report.error}" for n, report in enumerate(reports) if report.error]
    return ", ".join(broken)


def _never_meet(rank: int, report: Report, other: int, theirs: Report) -> str:
    """Why `rank` waits for a call that `other` never makes; empty if it does not."""
    for number, (one, two) in enumerate(zip(report.calls, theirs.calls, strict=False), start=1):
        if one != two:
            return (
                f"collective number {number} is {one} on rank {rank} and {two} on rank {other}: "
                "all ranks must make the same calls, of equal types and shapes, in the same order"
            )
    if theirs.has_ended and not theirs.error and len(report.calls) > len(theirs.calls):
        return (
            f"rank {rank} waits forever in {report.calls[-1]}, its collective number "
            f"{len(theirs.calls) + 1}: rank {other} has ended after "
            f"{counted(len(theirs.calls), 'collective')}"
        )
    return ""


def _too_long(reports: list[Report], seconds: float) -> str:
    told = [_state(rank, report) for rank, report in enumerate(reports) if not report.has_ended]
    return f"not done after {counted(seconds, 'second')}: {', '.join(told)}"


def _state(rank: int, report: Report) -> str:
    if not report.calls:
        return f"rank {rank} has begun no collective"
    return f"rank {rank} is at its collective number {len(report.calls)}, {report.calls[-1]}"


# ---- inside a rank -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setup:
    num_ranks: int
    store: str  # the file through which the ranks find each other
    seconds: float
    file: str


def _main(rank: int, setup: _Setup, writer: Connection, pickled: bytes) -> None:
    """The main function of a rank's process."""

    def tell(kind: str, value: object) -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            writer.send_bytes(pickle.dumps((kind, value)))

    torch.set_num_threads(1)  # the ranks share the cores, and a fork has lost torch's threads
    if sys.platform in _LOOPBACK:
        os.environ["GLOO_SOCKET_IFNAME"] = _LOOPBACK[sys.platform]
    try:
        program, args = pickle.loads(pickled)
        dist.init_process_group(
            "gloo", init_method=setup.store, rank=rank, world_size=setup.num_ranks,
            timeout=timedelta(seconds=setup.seconds),
        )  # fmt: skip
        _note_collectives(tell)
        tell("value", program(rank, setup.num_ranks, *args))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1].filename
        is_broken = isinstance(error, RuntimeError) and "distributed" in Path(place).name
        tell("broken" if is_broken else "error", _in_words(error, setup.file))
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(setup.seconds)  # other ranks may still be receiving what this one sent


def _in_words(error: Exception, file: str) -> str:
    message = (str(error).strip().splitlines() or [""])[0]
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    is_todo = isinstance(error, NotImplementedError)
    where = f" (line {lines[-1]} of your file)" if lines and not is_todo else ""
    return f"{type(error).__name__}: {message}{where}"


def _note_collectives(tell: Callable[[str, object], None]) -> None:
    """Report each collective when it begins."""

    def noting(method: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(method)
        def noted(*args: Any, **options: Any) -> Any:
            tell("call", Collective(name, _given(name, args[1:])))
            return method(*args, **options)

        return noted

    for method, name in _COLLECTIVES.items():
        if hasattr(dist.ProcessGroup, method):
            setattr(dist.ProcessGroup, method, noting(getattr(dist.ProcessGroup, method), name))


def _given(name: str, args: tuple[Any, ...]) -> str:
    """The type and shape of the tensor that a rank passes in, as text.

    The methods in the list take their outputs first.
    """
    gives = args[1:] if name in ("gather", "all_gather", "reduce_scatter", "all_to_all") else args
    tensors = gives[0] if gives and isinstance(gives[0], (list, tuple)) else gives
    if not tensors or not isinstance(tensors[0], torch.Tensor):
        return ""
    return f"{str(tensors[0].dtype).removeprefix('torch.')} {list(tensors[0].shape)}"
