"""Computes a step in this process, or in several that share one model.

The engine gives each `StepInput` to an executor and gets logits. `UniExecutor` runs it here.
`MultiExecutor` is section 4.6 of the paper: it broadcasts the step as one control message, and
every rank executes it on its own part of the model and of the cache. Only rank 0 has the
scheduler, and only rank 0 gets the logits; the workers send back only times, on request.
"""

import os
import signal
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from minipaged.config import EngineConfig
from minipaged.errors import WorkerLost
from minipaged.models.parallel import Part
from minipaged.scheduler.output import StepInput
from minipaged.utils.shapes import Float, Int
from minipaged.worker.message import StepEncoder
from minipaged.worker.model_runner import ModelRunner
from minipaged.worker.process import REPORT, STEP, STOP, TRACED_STEP, WorkerArgs
from minipaged.worker.ranks import RankLost, Ranks
from minipaged.worker.spawn import SECONDS_TO_END, Workers, find_ranks

Run = Callable[..., Tensor]  # of a StepInput and, for its pending tokens, the sampled ones


class Executor(ABC):
    """Computes steps, once `start` was called."""

    runner: ModelRunner  # this process's part of it
    run: Run  # as `ModelRunner.run`: the logits of a step, [rows, vocab]; raises WorkerLost
    part: Part | None = None  # part of the model that this process loads; None: all of it
    gather: Callable[[Tensor], Tensor] | None = None  # of the logits of all parts

    @contextmanager
    def starting(self) -> Generator[None]:
        """A context for all work between the constructor and `start`. Raises WorkerLost."""
        yield

    def agree_on_least(self, number: int) -> int:
        """The minimum over all ranks."""
        return number

    @abstractmethod
    def start(self, config: EngineConfig, runner: ModelRunner) -> None:
        """Make the executor ready to run steps."""

    def check(self) -> None:  # noqa: B027 - one process has nothing to check
        """Check between steps: raise WorkerLost if another process has ended."""

    @abstractmethod
    def close(self) -> None:
        """End all other processes. No step can run afterwards."""


class UniExecutor(Executor):
    """One process that has all of the model."""

    def __init__(self, runner: ModelRunner | None = None) -> None:
        if runner is not None:
            self._use(runner)

    def start(self, config: EngineConfig, runner: ModelRunner) -> None:
        self._use(runner)

    def _use(self, runner: ModelRunner) -> None:
        runner.record_graphs()
        self.runner, self.run = runner, runner.run

    def close(self) -> None: ...


class MultiExecutor(Executor):
    """Rank 0 of several ranks that share one model: see `minipaged/models/parallel.py`.

    If a rank is lost, so are its keys and values: this and every later step raises WorkerLost.

    Raises what `find_ranks` raises.
    """

    def __init__(self, args: WorkerArgs, device: torch.device) -> None:
        self.ranks, self._workers = find_ranks(args, device)
        self.part = Part(0, self.ranks.size, self.ranks.all_reduce)
        self.gather = self.ranks.gather
        self.is_traced = False  # whether each step collects the `spans` of all ranks
        self.spans: list[list[float]] = []  # of the last traced step: see `Ranks.gather_spans`
        self._encoder = StepEncoder()
        self._lost: WorkerLost | None = None
        self._process_id = os.getpid()
        self._end = weakref.finalize(  # at exit as well
            self, _end, self.ranks, self._workers, self._process_id
        )

    @contextmanager
    def starting(self) -> Generator[None]:
        try:
            yield
        except RankLost as error:
            raise self._mark_lost(self._workers.explain(error, "start_timeout")) from error
        except BaseException:
            self._mark_lost(WorkerLost("it could not be built."))
            raise

    def agree_on_least(self, number: int) -> int:
        return self.ranks.agree_on_least(number)

    def start(self, config: EngineConfig, runner: ModelRunner) -> None:
        self.ranks.send_object(config)
        runner.record_graphs()
        self.ranks.start_steps()
        self.runner = runner

    def run(
        self, step: StepInput, sampled: Int[Tensor, " rows_before"] | None = None
    ) -> Float[Tensor, "rows vocab"]:
        assert sampled is None, "only rank 0 samples: other ranks need the value of every token"
        with uninterrupted(), self._together():
            kind = TRACED_STEP if self.is_traced else STEP
            self.ranks.send([kind, *self._encoder.encode(step)])
            with self.ranks.noted("step"):
                logits = self.runner.run(step)
            if self.is_traced:
                self.spans = self.ranks.gather_spans()
            return logits

    def check(self) -> None:
        with self._together():
            self._workers.refuse_if_ended()

    @contextmanager
    def _together(self) -> Generator[None]:
        """All ranks complete the block, or the engine is lost: its state would be inconsistent."""
        if os.getpid() != self._process_id:
            raise WorkerLost(
                "this process is a fork of the one that built the engine, and shares its "
                "connections to the other ranks: build another engine here."
            )
        if self._lost is not None:
            raise WorkerLost(f"this engine has stopped, build a new one: {self._lost}")
        try:
            yield
        except RankLost as error:
            raise self._mark_lost(self._workers.explain(error, "step_timeout")) from error
        except BaseException as error:
            why = f"rank 0 failed in the middle of a step ({type(error).__name__}: {error})."
            self._mark_lost(WorkerLost(why))
            raise

    def _mark_lost(self, why: WorkerLost) -> WorkerLost:
        self._lost = why
        self._end.detach()
        self._workers.end(0)
        return why

    @property
    def worker_pids(self) -> list[int]:
        """Ids of the processes started by this one."""
        return self._workers.pids

    def report(self) -> list[dict[str, float]]:
        """By rank, the seconds in messages, collectives and whole steps since the last report."""
        with self._together():
            self.ranks.send([REPORT])
            return self.ranks.report()

    def close(self) -> None:
        self._lost = self._lost or WorkerLost("it has been closed.")
        self._end()


def _end(ranks: Ranks, workers: Workers, process_id: int) -> None:
    if os.getpid() != process_id:
        return  # in a fork, whose parent continues
    if not workers.pids:  # torchrun has started them
        ranks.limit_to(SECONDS_TO_END)
        with suppress(RankLost):
            ranks.send([STOP])
    workers.end()
    ranks.disconnect()


@contextmanager
def uninterrupted() -> Generator[None]:
    """Defer Ctrl-C to the end of the block."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield  # only the main thread receives signals; None: not set by Python
        return
    has_arrived = False

    def note(*_: object) -> None:
        nonlocal has_arrived
        has_arrived = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if has_arrived:
        signal.raise_signal(signal.SIGINT)
