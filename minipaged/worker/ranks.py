"""The processes that run one model together, and their communication.

    control  step messages, and agreements at the start: over gloo, between CPUs
    tensors  all-reduce of partial sums, gather of logits: over NCCL between GPUs, else over gloo

Every operation has its own time limit. The groups are objects of this engine, not
torch.distributed's default group, of which a process has only one, so engines never interfere.
"""

import os
import pickle
import time
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Work
from torch.distributed.distributed_c10d import PrefixStore, Store

from minipaged.config import EngineArgs
from minipaged.worker.process_groups import connect_cpus, connect_gpus

LOST_ANOTHER = "ends, because it has lost another rank"  # a worker's last words
FOREVER = timedelta(days=365)  # a worker waits for a message as long as rank 0 lives
HEAD = 1024  # integers in the first part of a message: 4 kB
# Bytes: more than two ranks leave larger sums to gloo, and none of them is expected in advance.
MOST_EXCHANGED = 2**17
LARGEST_PIECE = 2**20  # bytes of logits that a CPU sends at once


class RankLost(Exception):
    """Another rank has ended, or has not answered in time."""

    @property
    def is_timeout(self) -> bool:
        """Whether the time limit expired."""
        return "Timed out" in str(self)


class Ranks:
    """One process among several.

    Args:
        store: the store through which they connect.
        rank: rank 0 has the scheduler.
        size: the number of ranks.
        device: the device of the tensors.
        start_timeout: seconds for work before the first step, such as loading weights.
        step_timeout: seconds for each operation of a step.
        host: this process's address for the others; None: that of the host's name, or of the
            interface in GLOO_SOCKET_IFNAME.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        device: torch.device,
        *,
        start_timeout: float,
        step_timeout: float,
        host: str | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self.counts: dict[str, int] = defaultdict(int)  # operations by name
        self.seconds: dict[str, float] = defaultdict(float)  # how long they have taken
        # Receives posted in advance, by size and rank. Their buffers are reused: a new one, viewed
        # with another shape, costs as much time as sending.
        self._expected: dict[int, dict[int, tuple[Tensor, Work]]] = {}
        self._operations: list[tuple[str, float, float]] = []  # name, begin, end; of this step
        self._limit = timedelta(seconds=start_timeout)
        self._step_timeout = timedelta(seconds=step_timeout)
        with _as_lost_rank():
            self._control = connect_cpus(
                PrefixStore("control", store), rank, size, self._limit, host
            )
            on_gpu = device.type == "cuda"
            connect = connect_gpus if on_gpu else connect_cpus
            tensors = PrefixStore("tensors", store)
            self._tensors = connect(tensors, rank, size, self._limit, host)
        self.agree_on_least(0)  # all are connected: the store is no longer needed

    @classmethod
    def of(
        cls,
        options: EngineArgs,
        store: Store,
        rank: int,
        size: int,
        device: torch.device,
        host: str | None,
    ) -> "Ranks":
        """Connect with the time limits of these options. Raises RankLost."""
        start, step = options.start_timeout, options.step_timeout
        return cls(store, rank, size, device, start_timeout=start, step_timeout=step, host=host)

    def start_steps(self) -> None:
        """Switch to the time limit of a step."""
        self.agree_on_least(0)
        self._limit = self._step_timeout

    def disconnect(self) -> None:
        """Close the connections now, not in the interpreter's arbitrary order at exit."""
        del self._control, self._tensors

    def limit_to(self, seconds: float) -> None:
        """Set the time limit for waiting for another rank."""
        self._limit = timedelta(seconds=seconds)

    # ---- between the layers of a model -----------------------------------------------------------

    def all_reduce(self, summand: Tensor) -> Tensor:
        """Return the sum over all ranks, bitwise equal on each of them."""
        with self.noted("all-reduce"), _as_lost_rank():
            is_large = self.size > 2 and summand.nbytes > MOST_EXCHANGED
            if is_large or summand.is_cuda:
                options = dist.AllreduceOptions()
                options.timeout = self._limit
                self._tensors.allreduce([summand], options).wait()
                return summand
            return self._exchange_and_add(summand)

    def _exchange_and_add(self, own: Tensor) -> Tensor:
        """Every rank sends its summand to every other, and adds all of them in rank order.

        For the few elements of a decode step, this is faster than gloo's all-reduce, which has two
        rounds of messages and passes each to another thread.
        """
        size = own.nbytes
        expected = self._expected.pop(size, None)
        if expected is None:
            others = (rank for rank in range(self.size) if rank != self.rank)
            expected = self._expect({rank: torch.empty_like(own) for rank in others})
        sent = [self._tensors.send([own], rank, size) for rank in expected]
        summands, parts = [own] * self.size, dict[int, Tensor]()
        for rank, (part, work) in expected.items():
            work.wait(self._limit)
            if part.shape != own.shape or part.dtype != own.dtype:  # only as many bytes
                part = part.view(-1).view(own.dtype).view(own.shape)
            parts[rank] = summands[rank] = part
        first, second, *more = summands
        total = first + second
        for summand in more:
            total += summand
        if size <= MOST_EXCHANGED:
            # gloo sends immediately only if the receiver already waits, so post the receive of the
            # next sum, which most likely has the same size. Otherwise it waits for one that does.
            self._expected[size] = self._expect(parts)
        for work in sent:
            work.wait(self._limit)
        return total

    def _expect(self, parts: dict[int, Tensor]) -> dict[int, tuple[Tensor, Work]]:
        """Post the receive of each other rank's summand, with the number of bytes as the tag."""
        return {
            rank: (part, self._tensors.recv([part], rank, part.nbytes))
            for rank, part in parts.items()
        }

    def gather(self, part: Tensor) -> Tensor:
        """On rank 0, return the concatenated parts of all ranks: [rows, all columns]; else its own.

        CPUs send a few rows at a time, so that rank 0 needs no memory for whole parts.

        Args:
            part: [rows, columns], the same shape on every rank.
        """
        rows, columns = part.shape
        at_once = rows if part.is_cuda else max(1, LARGEST_PIECE // (columns * part.itemsize))
        with self.noted("gather"), _as_lost_rank():
            if self.rank > 0:
                for piece in part.contiguous().split(at_once):
                    self._tensors.send([piece], 0, 0).wait(self._limit)
                return part
            result = part.new_empty(rows, self.size, columns)
            result[:, 0] = part
            for some_rows in result.split(at_once):
                pieces = part.new_empty(self.size - 1, len(some_rows), columns)
                for work in [self._tensors.recv([pieces[i]], i + 1, 0) for i in range(len(pieces))]:
                    work.wait(self._limit)
                some_rows[:, 1:] = pieces.transpose(0, 1)
        return result.flatten(1)  # a view: [rows, size * columns]

    # ---- messages --------------------------------------------------------------------------------

    def send(self, numbers: list[int]) -> None:
        """Rank 0: send a message of 32-bit integers to all ranks, in one piece if it is short."""
        message = torch.tensor([len(numbers), *numbers], dtype=torch.int32)
        head = torch.zeros(HEAD, dtype=torch.int32)
        head[: len(message)] = message[:HEAD]
        with self.noted("message"), _as_lost_rank():
            self._broadcast(head, self._limit)
            if len(message) > HEAD:
                self._broadcast(message[HEAD:], self._limit)

    def receive(self) -> list[int]:
        """The other ranks: wait for a message."""
        head = torch.empty(HEAD, dtype=torch.int32)
        with self.noted("message"), _as_lost_rank():
            self._broadcast(head, FOREVER)
            length = int(head[0]) + 1
            rest = torch.empty(max(0, length - HEAD), dtype=torch.int32)
            if len(rest):
                self._broadcast(rest, self._limit)
        return [*head[1:length].tolist(), *rest.tolist()]

    def send_object(self, value: Any) -> None:
        """Rank 0, before the first step: send anything that can be pickled."""
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        self._broadcast(torch.tensor([len(data)]), self._limit)
        self._broadcast(data, self._limit)

    def receive_object(self) -> Any:
        """The other ranks: receive the object of `send_object`."""
        length = torch.empty(1, dtype=torch.long)
        self._broadcast(length, self._limit)
        data = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast(data, self._limit)
        return pickle.loads(data.numpy().tobytes())

    def agree_on_least(self, number: int) -> int:
        """The minimum over all ranks."""
        least = torch.tensor([number])
        options: Any = dist.AllreduceOptions()
        options.reduceOp, options.timeout = dist.ReduceOp.MIN, self._limit
        with _as_lost_rank():
            self._control.allreduce([least], options).wait()
        return int(least)

    def report(self) -> list[dict[str, float]]:
        """On rank 0, the `seconds` of all ranks; all of them must call it."""
        names = "message", "all-reduce", "gather", "step"
        all_ranks = self._gather_numbers([self.seconds[name] for name in names])
        self.seconds.clear()
        return [dict(zip(names, each, strict=True)) for each in all_ranks]

    def gather_spans(self) -> list[list[float]]:
        """On rank 0, the times of the step on each rank, in order; all of them must call it.

        Seconds in the message, then alternately computing and in a collective, and finally
        computing, each by the rank's own clock, without gaps.
        """
        (_, begin, now), *collectives, (_, _, step_end) = self._operations
        spans = [now - begin]
        for _, begin, end in collectives:
            spans += begin - now, end - begin
            now = end
        return self._gather_numbers([*spans, step_end - now])

    def _gather_numbers(self, own: list[float]) -> list[list[float]]:
        """On rank 0, gather the values of all ranks, which send equally many."""
        part = torch.tensor(own, dtype=torch.float64)
        parts = [torch.empty_like(part) for _ in range(self.size)] if self.rank == 0 else []
        options: Any = dist.GatherOptions()
        options.rootRank, options.timeout = 0, self._limit
        with _as_lost_rank():
            self._control.gather([parts] if parts else [], [part], options).wait()
        return [each.tolist() for each in parts]

    def _broadcast(self, tensor: Tensor, limit: timedelta) -> None:
        with _as_lost_rank():
            if self.rank > 0:
                self._control.recv([tensor], 0, 0).wait(limit)
                return
            for work in [self._control.send([tensor], rank, 0) for rank in range(1, self.size)]:
                work.wait(limit)

    @contextmanager
    def noted(self, name: str) -> Generator[None]:
        """Count the operation inside and its time."""
        begin = time.perf_counter()
        yield
        end = time.perf_counter()
        self.counts[name] += 1
        self.seconds[name] += end - begin
        if name == "message":
            self._operations.clear()
        self._operations.append((name, begin, end))


def num_local_ranks(size: int) -> int:
    """The number of ranks on this machine."""
    is_alone = size == 1 or not dist.is_torchelastic_launched()
    return size if is_alone else int(os.environ["LOCAL_WORLD_SIZE"])


@contextmanager
def _as_lost_rank() -> Generator[None]:
    """Convert torch.distributed's RuntimeError, raised for any lost connection, to RankLost."""
    try:
        yield
    except RuntimeError as error:
        # gloo's message begins with a file and line of its own code, in brackets.
        raise RankLost(str(error).splitlines()[0].rpartition("] ")[2]) from error
