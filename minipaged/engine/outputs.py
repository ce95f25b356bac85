"""Outputs: a `Progress` per request and step, and the `RequestOutput` that a user gets from it."""

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

    finish_reason is None until it ends; then "stop" (end-of-sequence token, stop token or stop
    string), "length" (max_tokens, max_model_len, or a pool too small to continue), "abort", or
    "error" (its logits were broken, for example NaN, and `error` suggests a fix; or its own code
    raised). stop_reason is the stop string or stop token that ended it, None for the
    end-of-sequence token. logprobs contains one dict per token, from token ids to the `Logprob` of
    the token and of the likeliest others. score ranks the results of beam search: the
    log-probability with the length penalty.
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
    """A request's prompt and its generated completions.

    prompt_logprobs has one entry per prompt token, fewer if the request was aborted early; the
    first is None, because no token precedes it. num_cached_tokens is the number of prompt tokens
    found in the prefix cache at the first admission, which were not computed.
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
    """The new tokens of one completion in a step."""

    completion: int  # its `CompletionOutput.index`
    token_ids: list[int]
    text: str  # may omit the last tokens: half a character, or the possible start of a stop string
    logprobs: list[Logprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @classmethod
    def of(cls, whole: CompletionOutput) -> "NewTokens":
        """Return all tokens of a completion, as new ones."""
        end = whole.finish_reason, whole.stop_reason
        return cls(whole.index, whole.token_ids, whole.text, whole.logprobs, *end)

    @staticmethod
    def joined(parts: "Sequence[NewTokens]") -> "NewTokens":
        """Join the tokens of several steps, in order."""
        logprobs = [each for part in parts for each in part.logprobs or ()]
        return parts[-1]._replace(
            token_ids=[token for part in parts for token in part.token_ids],
            text="".join(part.text for part in parts),
            logprobs=logprobs or None,
        )


class Progress(NamedTuple):
    """The new tokens of one request in a step, as a server streams them.

    Beam search and best_of choose their completions at the end, so they report all progress at
    once. A `Progress` has the attributes of a `RequestOutput`, like the results of a step in vLLM;
    the request's `output_kind` determines their content.
    """

    request_id: str
    new: list[NewTokens]
    finished: bool
    build_output: Callable[[], RequestOutput]
    error: RequestFailed | None = None  # its own code raised, which ended it
    kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def output(self, kind: RequestOutputKind | None = None) -> RequestOutput:
        """Return the request's output: all tokens so far, or only new ones if the kind is DELTA.

        The default is the request's own kind.
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
        """Join the progress of several steps, in order."""
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
