"""What comes out: a `Progress` per request and step, and the `RequestOutput` a user wants of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from minipaged.engine.metrics import RequestMetrics
from minipaged.errors import RequestFailed
from minipaged.sampling import RequestOutputKind
from minipaged.sampling.logprobs import Logprobs

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class CompletionOutput:
    """One generated sequence, so far or complete.

    finish_reason is None while it grows; then "stop" (end-of-sequence token, stop token or stop
    string), "length" (max_tokens, max_model_len, or a pool too small to go on), "abort", or "error"
    (its logits were broken, as NaN is, and `error` says what to try; or its own code raised).
    stop_reason is the stop string or stop token that ended it, None for the end-of-sequence token.
    logprobs holds, for each token, a `Logprob` of it and of the likeliest others, by token id.
    score is what beam search ranks by: the log-probability under the length penalty.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[Logprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    score: float | None = None
    error: str | None = None

    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None


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
    prompt_logprobs: list[Logprobs | None] | None = None
    num_cached_tokens: int = 0


class NewTokens(NamedTuple):
    """What a step has added to one completion."""

    completion: int  # its `CompletionOutput.index`
    token_ids: list[int]
    text: str  # may lag behind the tokens: half a character, or what could begin a stop string
    logprobs: list[Logprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @classmethod
    def of(cls, whole: CompletionOutput) -> "NewTokens":
        """All of a completion of which nothing was shown before."""
        end = whole.finish_reason, whole.stop_reason
        return cls(whole.index, whole.token_ids, whole.text, whole.logprobs, *end)

    @staticmethod
    def joined(parts: "Sequence[NewTokens]") -> "NewTokens":
        """The tokens of several steps, in order, as those of one."""
        logprobs = [each for part in parts for each in part.logprobs or ()]
        return parts[-1]._replace(
            token_ids=[token for part in parts for token in part.token_ids],
            text="".join(part.text for part in parts),
            logprobs=logprobs or None,
        )


class Progress(NamedTuple):
    """What a step has added to one request: all that a server needs to send on.

    Beam search and best_of decide at the end which completions they return: they make no progress
    before, and then all of it at once. It can be read like a `RequestOutput`, as the results of a
    step can in vLLM; what it then holds follows from the request's `output_kind`.
    """

    request_id: str
    new: list[NewTokens]
    finished: bool
    build_output: Callable[[], RequestOutput]
    error: RequestFailed | None = None  # what its own code raised, which has ended it
    kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def output(self, kind: RequestOutputKind | None = None) -> RequestOutput:
        """The request as it stands now: all of it, or what is new if the kind is DELTA.

        Without an argument, the kind that the request asked for.
        """
        whole = self.build_output()
        if (kind or self.kind) is not RequestOutputKind.DELTA:
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

    @staticmethod
    def joined(steps: "Sequence[Progress]") -> "Progress":
        """The progress of several steps, in order, as that of one."""
        by_completion: dict[int, list[NewTokens]] = {}
        for step in steps:
            for new in step.new:
                by_completion.setdefault(new.completion, []).append(new)
        return steps[-1]._replace(new=[NewTokens.joined(each) for each in by_completion.values()])

    @property
    def outputs(self) -> list[CompletionOutput]:
        return self.output().outputs

    @property
    def prompt(self) -> str | None:
        return self.build_output().prompt

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.build_output().prompt_token_ids

    @property
    def prompt_logprobs(self) -> list[Logprobs | None] | None:
        return self.build_output().prompt_logprobs

    @property
    def metrics(self) -> RequestMetrics:
        return self.build_output().metrics


@dataclass(frozen=True, eq=False)
class CachedPrefix:
    """A prefix whose full blocks stay in the pool until it is released."""

    num_tokens: int
    num_blocks: int
