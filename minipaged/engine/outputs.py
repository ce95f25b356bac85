"""What a user gets back: one `RequestOutput` a request, one `CompletionOutput` a sequence."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class CompletionOutput:
    """One generated sequence, so far or whole.

    finish_reason is None while it grows; then "stop" (end-of-sequence token, stop token or stop
    string), "length" (max_tokens, max_model_len, or a pool too small to go on), "abort".
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


@dataclass(frozen=True)
class RequestMetrics:
    """What serving the request took; times in seconds on the engine's clock.

    Blocks are summed over the steps of a request with several samples or beams: those that its
    sequences held, and those they would have held had nothing been shared.
    """

    arrival_time: float
    first_token_time: float | None
    last_token_time: float | None
    num_preemptions: int
    num_blocks_held: int = 0
    num_blocks_unshared: int = 0

    @property
    def blocks_saved(self) -> float:
        """The part of its blocks that sharing saved, as in the paper's Figure 15; 0 to 1."""
        if self.num_blocks_unshared == 0:  # a single sequence, or none that ever ran
            return 0.0
        return 1 - self.num_blocks_held / self.num_blocks_unshared


@dataclass(frozen=True)
class RequestOutput:
    """A request's prompt and what has been generated after it.

    prompt_logprobs has one entry a prompt token, fewer if the request was aborted before; the first
    is None, as nothing precedes it. num_cached_tokens says how many tokens of the prompt were found
    in the prefix cache when it was first admitted, and so needed no computing.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, float] | None] | None = field(default=None)
    num_cached_tokens: int = 0


@dataclass(frozen=True, eq=False)
class CachedPrefix:
    """A prefix whose full blocks stay in the pool until it is released."""

    num_tokens: int
    num_blocks: int
