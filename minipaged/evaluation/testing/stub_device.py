"""A device with a queue and delays, in place of a GPU: for tests and pictures of overlapped steps.

The host puts jobs into the queue and continues. A thread takes them out and computes them in order,
like the stream of a GPU. The engine's executor and sampler are replaced by ones that enqueue their
work, so a result is computed only when its turn comes.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch

from minipaged.engine.llm_engine import LLMEngine
from minipaged.sampling.rows import SampledToken, SamplingRow
from minipaged.sampling.sampler import Draws, Sampler
from minipaged.scheduler.output import StepInput
from minipaged.worker.executor import Executor

LONGEST_WAIT = 30.0  # seconds: with a deadlock, a test fails instead of hanging


@dataclass
class StubDevice:
    """The device, and what host and device did: (seconds, "launch" etc., number of the step).

    Args:
        seconds_per_step: the time that the device needs for a step.
        before_step: called on the device's thread, with the number of each step.
    """

    seconds_per_step: float = 0.0
    before_step: Callable[[int], None] = lambda number: None
    events: list[tuple[float, str, int]] = field(default_factory=list[tuple[float, str, int]])

    def __post_init__(self) -> None:
        self.num_launched = 0
        self._queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def attach(self, engine: LLMEngine) -> None:
        """Let this device compute the steps of an engine."""
        engine.executor = _StubExecutor(engine.executor, self)  # type: ignore[assignment]
        engine.sampler = _StubSampler(engine.sampler, self)

    def note(self, what: str, number: int) -> None:
        self.events.append((time.perf_counter(), what, number))

    def submit(self, job: Callable[[], Any]) -> "Future[Any]":
        """Put a job into the queue; returns its result, once it is computed."""
        result: Future[Any] = Future()

        def run() -> None:
            try:
                result.set_result(job())
            except BaseException as error:
                result.set_exception(error)

        self._queue.put(run)
        return result

    def _work(self) -> None:
        while True:
            self._queue.get()()


@dataclass
class _Coming:
    """A tensor that the device will have computed; the host knows its shape."""

    shape: tuple[int, ...]
    result: "Future[torch.Tensor]"

    def __len__(self) -> int:
        return self.shape[0]


class _StubExecutor:
    """Enqueues the steps of an executor."""

    def __init__(self, inner: Executor, device: StubDevice) -> None:
        self._inner = inner
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def run(self, step: StepInput, sampled: _Coming | None = None) -> _Coming:
        device = self._device
        device.num_launched += 1
        number = device.num_launched
        device.note("launch", number)

        def compute() -> torch.Tensor:
            device.before_step(number)
            device.note("begin", number)
            pending = () if sampled is None else (sampled.result.result(LONGEST_WAIT),)
            logits = self._inner.run(step, *pending)
            time.sleep(device.seconds_per_step)
            device.note("end", number)
            return logits

        num_rows = sum(sequence.num_logits for sequence in step.sequences)
        return _Coming((num_rows, 0), device.submit(compute))


@dataclass
class _StubDraws:
    """Tokens that the device will have drawn."""

    token_ids: _Coming
    draws: "Future[Draws]"
    device: StubDevice
    number: int

    def read(self) -> list[SampledToken]:
        draws = self.draws.result(LONGEST_WAIT)
        self.device.note("read", self.number)
        return draws.read()


class _StubSampler(Sampler):
    """Enqueues the work of a sampler."""

    def __init__(self, inner: Sampler, device: StubDevice) -> None:
        super().__init__()
        self._inner = inner
        self._device = device

    def sample(self, logits: Any, rows: Sequence[SamplingRow]) -> Any:
        device = self._device
        draws = device.submit(lambda: self._inner.sample(logits.result.result(LONGEST_WAIT), rows))
        token_ids = device.submit(lambda: draws.result().token_ids)
        return _StubDraws(_Coming((len(rows),), token_ids), draws, device, device.num_launched)
