"""What comes out: a `Progress` per request and step, and the `RequestOutput` a user wants of it."""

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal, NamedTuple

from minipaged.errors import RequestFailed
from minipaged.scheduler.interface import Scheduler
from minipaged.scheduler.output import SchedulerOutput

FinishReason = Literal["stop", "length", "abort", "error"]


class RequestOutputKind(Enum):
    """How much of a request a `RequestOutput` holds; vLLM's names."""

    CUMULATIVE = 0  # all that was generated so far
    DELTA = 1  # what is new since the last output
    FINAL_ONLY = 2  # everything, and nothing before the request has finished


@dataclass(frozen=True)
class CompletionOutput:
    """One generated sequence, so far or complete.

    finish_reason is None while it grows; then "stop" (end-of-sequence token, stop token or stop
    string), "length" (max_tokens, max_model_len, or a pool too small to go on), "abort", or "error"
    (its logits were broken, as NaN is, and `error` says what to try; or its own code raised).
    stop_reason is the stop string or stop token that ended it, None for the end-of-sequence token.
    logprobs holds, for each token, the log-probabilities of it and of the likeliest others. score
    is what beam search ranks by: the log-probability under the length penalty.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[dict[int, float]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    score: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class RequestMetrics:
    """When a request came and got its tokens, in seconds on the engine's clock."""

    arrival_time: float
    first_token_time: float | None
    last_token_time: float | None
    num_preemptions: int


@dataclass(frozen=True)
class RequestOutput:
    """A request's prompt and what has been generated after it.

    prompt_logprobs has one entry per prompt token, fewer if the request was aborted before; the
    first is None, as nothing precedes it. num_cached_tokens is the number of prompt tokens found in
    the prefix cache when the request was first admitted, which needed no computing.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, float] | None] | None = None
    num_cached_tokens: int = 0


class NewTokens(NamedTuple):
    """What a step has added to one completion."""

    completion: int  # its `CompletionOutput.index`
    token_ids: list[int]
    text: str  # may lag behind the tokens: half a character, or what could begin a stop string
    logprobs: list[dict[int, float]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @classmethod
    def of(cls, whole: CompletionOutput) -> "NewTokens":
        """All of a completion of which nothing was shown before."""
        return cls(
            whole.index,
            whole.token_ids,
            whole.text,
            whole.logprobs,
            whole.finish_reason,
            whole.stop_reason,
        )


class Progress(NamedTuple):
    """What a step has added to one request: all that a server needs to send on.

    Beam search and best_of decide at the end which completions they return: they make no progress
    before, and then all of it at once.
    """

    request_id: str
    new: list[NewTokens]
    finished: bool
    build_output: Callable[[], RequestOutput]
    error: RequestFailed | None = None  # what its own code raised, which has ended it

    def output(
        self, kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    ) -> RequestOutput | None:
        """The request as it stands now, by vLLM's kinds; None where FINAL_ONLY has to wait."""
        if kind is RequestOutputKind.FINAL_ONLY and not self.finished:
            return None
        whole = self.build_output()
        if kind is not RequestOutputKind.DELTA:
            return whole
        completions = {completion.index: completion for completion in whole.outputs}
        deltas = [
            replace(
                completions[new.completion],
                text=new.text,
                token_ids=new.token_ids,
                logprobs=new.logprobs,
            )
            for new in self.new
        ]
        return replace(whole, outputs=deltas)


@dataclass(frozen=True)
class StepStats:
    """One step in numbers, for benchmarks, metrics and the terminal."""

    step: int  # counted from 1
    num_running: int  # groups, as the next two, after the step was scheduled
    num_waiting: int
    num_swapped: int
    num_sequences: int  # that computed something
    num_tokens: int  # that they computed
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
        """A step that has run; `times` are before and after each of its three parts."""
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


@dataclass(frozen=True, eq=False)
class CachedPrefix:
    """A prefix whose full blocks stay in the pool until it is released."""

    num_tokens: int
    num_blocks: int
