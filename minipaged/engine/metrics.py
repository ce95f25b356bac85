"""Measurements: the times of a request, and the statistics of a step."""

from collections.abc import Sequence as Many
from dataclasses import dataclass

from minipaged.scheduler.interface import Scheduler
from minipaged.scheduler.output import SchedulerOutput


@dataclass(frozen=True)
class RequestMetrics:
    """When a request arrived, was scheduled, got its tokens and ended.

    Times are in seconds on the engine's clock: since 1970, unless the engine was given another
    clock. A time is None if the event has not happened yet.
    """

    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    last_token_time: float | None
    finished_time: float | None
    num_preemptions: int

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival until it was scheduled for the first time."""
        scheduled = self.first_scheduled_time
        return None if scheduled is None else scheduled - self.arrival_time

    # vLLM's v1 names. In vLLM, arrival_time uses another clock than the other times.

    @property
    def queued_ts(self) -> float:
        return self.arrival_time

    @property
    def scheduled_ts(self) -> float | None:
        return self.first_scheduled_time

    @property
    def first_token_ts(self) -> float | None:
        return self.first_token_time

    @property
    def last_token_ts(self) -> float | None:
        return self.last_token_time

    @property
    def first_token_latency(self) -> float | None:
        """Seconds from arrival to the first token."""
        first = self.first_token_time
        return None if first is None else first - self.arrival_time


@dataclass(frozen=True)
class StepStats:
    """One step in numbers, for benchmarks, metrics and the terminal."""

    step: int  # counted from 1
    num_running: int  # groups, as the next two, after the step was scheduled
    num_waiting: int
    num_swapped: int
    num_sequences: int  # that computed tokens
    num_tokens: int  # computed by them
    num_preempted: int
    num_queried_tokens: int  # of newly admitted prompts: looked up in the prefix cache,
    num_cached_tokens: int  # and found there
    num_blocks_in_use: int
    num_blocks: int
    schedule_seconds: float
    run_seconds: float  # message, tensors and model, as the host sees it
    sample_seconds: float

    @classmethod
    def of(
        cls, step: int, scheduler: Scheduler, decision: SchedulerOutput, times: Many[float]
    ) -> "StepStats":
        """Describe a step that has run; `times` are before and after each of its three parts."""
        memory = scheduler.memory
        return cls(
            step=step,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_swapped=len(scheduler.swapped),
            num_sequences=len(decision.sequences),
            num_tokens=sum(scheduled.num_new_tokens for scheduled in decision.sequences),
            num_preempted=len(decision.preempted),
            num_queried_tokens=decision.num_queried_tokens,
            num_cached_tokens=decision.num_cached_tokens,
            num_blocks_in_use=memory.num_blocks - memory.num_free,
            num_blocks=memory.num_blocks,
            schedule_seconds=times[1] - times[0],
            run_seconds=times[2] - times[1],
            sample_seconds=times[3] - times[2],
        )
