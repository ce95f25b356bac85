"""The state of one request, from sampled tokens to text.

A request decides how its sequences continue. Sampling (`sampling_request`) forks its first sequence
once, when the prompt is computed, and the samples then diverge. Beam search (`beam_request`) forks
and prunes sequences in every step. In the engine, both are rows of the same batch.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from minipaged.config import ModelConfig
from minipaged.engine.metrics import RequestMetrics
from minipaged.engine.outputs import (
    CompletionOutput,
    FinishReason,
    Progress,
    RequestOutput,
)
from minipaged.sampling.logprobs import Logprobs, logprobs_of
from minipaged.sampling.rows import SampledToken, SamplingRow
from minipaged.sampling.sampler import Scores
from minipaged.sequence import Sequence, SequenceGroup
from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.prompts import TokenizedPrompt

logger = logging.getLogger(__name__)

Fork = Callable[[Sequence], Sequence]


@dataclass(frozen=True)
class ModelTraits:
    """The properties of a model that requests depend on."""

    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    vocab_size: int

    @classmethod
    def of(
        cls, model: ModelConfig, max_model_len: int, tokenizer: Tokenizer | None
    ) -> "ModelTraits":
        """Return the traits of a model in an engine."""
        return cls(tokenizer, model.eos_token_ids, max_model_len, model.vocab_size)


@dataclass(frozen=True)
class Arrival:
    """A new request, of sampling or beam search."""

    group: SequenceGroup  # of one sequence
    prompt: TokenizedPrompt
    model: ModelTraits
    time: float


class Request(ABC):
    """The base of sampling and beam search: a prompt, a group, and its times."""

    def __init__(
        self, arrival: Arrival, num_prompt_logprobs: int | None = None, *, shows_text: bool = True
    ) -> None:
        self.group = arrival.group
        self.first_scheduled_time: float | None = None  # these four are set by the engine
        self.first_token_time: float | None = None
        self.last_token_time: float | None = None
        self.finished_time: float | None = None
        self.num_prompt_logprobs = num_prompt_logprobs  # None: not requested
        self._first = arrival.group.sequences[0]
        self._prompt = arrival.prompt
        self._model = arrival.model
        self._tokenizer = arrival.model.tokenizer if shows_text else None  # for the output
        self._arrival_time = arrival.time
        self._has_logged_error = False
        self._prompt_logprobs: list[Logprobs | None] = [None]  # no token precedes the first

    # ---- different for each kind of request ------------------------------------------------------

    @abstractmethod
    def rows(self, seq: Sequence) -> list[SamplingRow]:
        """Return what to sample from the logits of a sequence: one row per token."""

    @abstractmethod
    def advance(self, sampled: dict[int, list[SampledToken]], fork: Fork) -> list[Sequence]:
        """Take the tokens of all sequences, by sequence id; returns sequences that have ended."""

    @abstractmethod
    def finish_all(self, reason: FinishReason, error: str | None = None) -> None:
        """End all sequences that have not ended yet; `error` is for the reason "error"."""

    @property
    @abstractmethod
    def is_finished(self) -> bool:
        """Whether no more tokens will come."""

    @abstractmethod
    def progress(self) -> Progress | None:
        """Return the new tokens since the last call; None if there is no output yet."""

    @abstractmethod
    def completions(self) -> list[CompletionOutput]:
        """Return the completions so far."""

    # ---- the same for all ------------------------------------------------------------------------

    def may_run_ahead(self, seq: Sequence) -> bool:
        """Return whether the next step can compute this sequence before its new token is known."""
        return False

    def wants_prompt_logits(self, seq: Sequence) -> bool:
        """Return whether prompt logprobs are requested and incomplete."""
        asked = self.num_prompt_logprobs is not None
        return asked and len(self._prompt_logprobs) < seq.prompt_len

    def note_prompt_logits(self, seq: Sequence, logits: Tensor) -> None:
        """Take the logits of the tokens from `num_begun_tokens` on, [rows, vocab].

        The logits at position i score the token at position i + 1. After a preemption some
        positions are computed again: these are skipped, and so are positions after the prompt.
        """
        first = len(self._prompt_logprobs) - 1  # its logits score the first token without a score
        start = seq.num_begun_tokens
        stop = min(start + logits.shape[0], seq.prompt_len - 1)
        if start <= first < stop:
            judged, count = seq.token_ids[first + 1 : stop + 1], self.num_prompt_logprobs
            scores = Scores(logits[first - start : stop - start], judged, [count] * len(judged))
            self._prompt_logprobs += [
                logprobs_of(s, count or 0, self._tokenizer) for s in scores.read()
            ]

    def take_over(self, old: "Request", has_tokens: bool) -> None:
        """Copy the state of the replaced request that does not follow from its tokens."""
        self._prompt_logprobs = old._prompt_logprobs
        self._has_logged_error = old._has_logged_error
        self.first_scheduled_time = old.first_scheduled_time
        if has_tokens:
            self.first_token_time, self.last_token_time = old.first_token_time, old.last_token_time

    def log_error(self, error: str, position: int) -> None:
        """Log the first error of a request; later ones usually have the same cause."""
        if not self._has_logged_error:
            request_id = self.group.request_id
            logger.error("request %s, token at position %d: %s", request_id, position, error)
        self._has_logged_error = True

    def output(self) -> RequestOutput:
        """Return the request's output so far."""
        asked = self.num_prompt_logprobs is not None
        return RequestOutput(
            request_id=self.group.request_id,
            prompt=self._prompt.text,
            prompt_token_ids=self._prompt.token_ids.copy(),  # a copy that the user may change
            outputs=self.completions(),
            finished=self.is_finished,
            metrics=RequestMetrics(
                arrival_time=self._arrival_time,
                first_scheduled_time=self.first_scheduled_time,
                first_token_time=self.first_token_time,
                last_token_time=self.last_token_time,
                finished_time=self.finished_time,
                num_preemptions=self.group.num_preemptions,
            ),
            prompt_logprobs=list(self._prompt_logprobs) if asked else None,
            num_cached_tokens=self._first.num_cached_tokens or 0,
        )
