"""Starts, connects and ends the other ranks, in the process of rank 0.

Without torchrun, this process starts them as programs on this machine
(`minipaged/worker/process.py`). torchrun starts one process per rank, on one machine or several
(`--nnodes`), all with the same program; ranks above 0 become workers when they build the engine.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from minipaged.config import EngineArgs
from minipaged.errors import InvalidOption, WorkerLost
from minipaged.utils.counts import counted
from minipaged.utils.device import choose_device
from minipaged.worker.process import LOOPBACK, Place, WorkerArgs, here, work
from minipaged.worker.ranks import LOST_ANOTHER, RankLost, Ranks, num_local_ranks

SECONDS_TO_END = 5.0  # for a worker to end when told to
SECONDS_TO_NOTICE = 2.0  # until the system reports how a process has ended
PROGRAM = "from minipaged.worker.process import main; main()"
LOG_BYTES = 2000  # bytes of a worker's log that an error shows


@dataclass
class Worker:
    """One process started by this one, and its log."""

    rank: int
    process: "subprocess.Popen[bytes]"
    log: IO[bytes]

    def end_of_log(self) -> str:
        """The last lines of its log."""
        self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, self.log.tell() - LOG_BYTES))
        return self.log.read().decode(errors="replace").strip()

    def describe_end(self) -> str:
        """Describe how it ended, with the end of its log."""
        code = self.process.returncode
        name = signal.Signals(-code).name if -code in set(signal.Signals) else ""
        how = f"exit code {code}{name and ', '}{name}"
        log = self.end_of_log()
        said = f"the end of its log:\n{log}" if log else "its log is empty."
        return f"rank {self.rank} has ended ({how}); {said}"


class Workers:
    """The processes of the other ranks, started by this process."""

    def __init__(self) -> None:
        self._started: list[Worker] = []
        self._threads = torch.get_num_threads()

    @property
    def pids(self) -> list[int]:
        """Their ids, by rank from 1."""
        return [each.process.pid for each in self._started]

    def start(self, args: WorkerArgs, size: int, device_type: str, file: Path) -> None:
        """Start ranks 1 and up on this machine."""
        threads = max(1, self._threads // size)  # all ranks together use as many as one process
        torch.set_num_threads(threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(sys.path),  # where this process finds its modules
        }
        for rank in range(1, size):
            log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process runs
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
            )
            self._started.append(Worker(rank, process, log))
            assert process.stdin is not None
            place = Place(rank, size, _device_of(device_type, rank), file)
            with suppress(BrokenPipeError):  # it has ended: see `wait_for_all`
                pickle.dump((place, args), process.stdin)
                process.stdin.flush()

    def wait_for_all(self, store: FileStore, timeout: float) -> None:
        """Wait until all are ready to connect. Raises RankLost."""
        deadline = time.monotonic() + timeout
        while not store.check([here(each.rank) for each in self._started]):
            self.refuse_if_ended()
            if time.monotonic() > deadline:
                raise RankLost(f"it was not ready within {timeout:g} seconds")
            time.sleep(0.02)

    def refuse_if_ended(self) -> None:
        """Raise RankLost if one of the processes has ended."""
        if any(each.process.poll() is not None for each in self._started):
            raise RankLost("its process has ended")

    def explain(self, error: RankLost, option: str) -> WorkerLost:
        """The error for a lost rank; `option` is the time limit that may have been too short."""
        # If one of two does not answer in time, nothing more can be learned. Of several, the others
        # end as well, so that the one that is silent remains.
        is_clear = error.is_timeout and len(self._started) == 1
        deadline = time.monotonic() + (0 if is_clear else SECONDS_TO_NOTICE)
        while self._started:
            ended = [each for each in self._started if each.process.poll() is not None]
            # Other ranks may have ended because of the one that is the cause.
            if causes := [each for each in ended if LOST_ANOTHER not in each.end_of_log()]:
                return WorkerLost(causes[0].describe_end())
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        silent = [str(each.rank) for each in self._started if each.process.poll() is None]
        who = f"rank {' or '.join(silent)}" if silent else "another rank"
        return WorkerLost(f"{who} does not answer ({error}). If it is only slow, raise {option}.")

    def end(self, seconds: float = SECONDS_TO_END) -> None:
        """Close the pipes, which ends the processes; kill them after the time limit."""
        deadline = time.monotonic() + seconds
        for each in self._started:
            if each.process.stdin is not None:
                with suppress(OSError):
                    each.process.stdin.close()
        for each in self._started:
            with suppress(subprocess.TimeoutExpired):
                each.process.wait(max(0.0, deadline - time.monotonic()))
            each.process.kill()
            with suppress(subprocess.TimeoutExpired):  # it may wait for a device first
                each.process.wait(SECONDS_TO_END)
            each.log.close()
        if self._started:
            torch.set_num_threads(self._threads)
        self._started.clear()


def find_ranks(args: WorkerArgs, device: torch.device) -> tuple[Ranks, Workers]:
    """Connect to the other ranks; without torchrun, start them first.

    Under torchrun, ranks above 0 do not return: they work until rank 0 stops, and then exit.

    Raises:
        WorkerLost: a rank has ended or was not ready in time.
        InvalidOption: torchrun has started a different number of processes.
    """
    options, workers = args.options, Workers()
    try:
        if dist.is_torchelastic_launched():
            return _join_torchrun(args, device), workers
        with tempfile.TemporaryDirectory(prefix="minipaged-") as folder:
            file, size = Path(folder) / "ranks", options.tensor_parallel_size
            store = FileStore(str(file), size)
            workers.start(args, size, device.type, file)
            workers.wait_for_all(store, options.start_timeout)
            return Ranks.of(options, store, 0, size, device, LOOPBACK), workers
    except RankLost as error:
        lost = workers.explain(error, "start_timeout")
        workers.end(0)
        raise lost from error
    except BaseException:
        workers.end(0)
        raise


def choose_rank_device(options: EngineArgs) -> torch.device:
    """This rank's own device. Raises InvalidOption."""
    device, size = choose_device(options.device), options.tensor_parallel_size
    if size == 1 or device.type != "cuda":
        return device
    if options.device != "cuda" and options.device != "auto":
        raise InvalidOption(
            f"device is {options.device!r}, but each of the {size} ranks has a GPU of its own: "
            'give "cuda".',
            "device",
        )
    if torch.cuda.device_count() < num_local_ranks(size):
        raise InvalidOption(
            f"tensor_parallel_size is {size} and each rank needs its own GPU, but this machine has "
            f"{torch.cuda.device_count()}: lower tensor_parallel_size.",
            "tensor_parallel_size",
        )
    return _device_of("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _device_of(device_type: str, local_rank: int) -> torch.device:
    return torch.device("cuda", local_rank) if device_type == "cuda" else torch.device(device_type)


def _join_torchrun(args: WorkerArgs, device: torch.device) -> Ranks:
    options = args.options
    started, size = int(os.environ["WORLD_SIZE"]), options.tensor_parallel_size
    if started != size:
        raise InvalidOption(
            f"tensor_parallel_size is {size}, but torchrun has started "
            f"{counted(started, 'process', 'processes')}: make them equal.",
            "tensor_parallel_size",
        )
    limit = timedelta(seconds=options.start_timeout)
    store, rank, _ = next(rendezvous("env://", timeout=limit))
    if rank == 0 and store.add("engines", 1) > 1:
        raise InvalidOption(
            "torchrun's processes can serve only one engine, which this script has already built: "
            "keep that one, or build the second in another script.",
            "tensor_parallel_size",
        )
    ranks = Ranks.of(options, store, rank, size, device, None)
    if rank == 0:
        return ranks
    try:
        work(args, ranks, device)
    except RankLost as error:
        sys.exit(f"rank {rank} {LOST_ANOTHER}: {error}")
    ranks.disconnect()
    sys.exit(0)
