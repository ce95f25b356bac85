"""One request on its way from sampled tokens to text: what the engine remembers of it.

A request knows how its sequences go on. Sampling (`sampling_request`) forks its first sequence
once, when the prompt is computed, and each sample then goes its own way. Beam search
(`beam_request`) forks and prunes sequences in every step. In the engine, both are rows of the same
batch.
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
from minipaged.sampling.sampler import score
from minipaged.sequence import Sequence, SequenceGroup
from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.prompts import TokenizedPrompt

logger = logging.getLogger(__name__)

Fork = Callable[[Sequence], Sequence]


@dataclass(frozen=True)
class ModelTraits:
    """What every request must know of the model that serves it."""

    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    vocab_size: int

    @classmethod
    def of(
        cls, model: ModelConfig, max_model_len: int, tokenizer: Tokenizer | None
    ) -> "ModelTraits":
        """Those of a model as an engine runs it."""
        return cls(tokenizer, model.eos_token_ids, max_model_len, model.vocab_size)


@dataclass(frozen=True)
class Arrival:
    """A request as it came in, whatever it asks for."""

    group: SequenceGroup  # of one sequence still
    prompt: TokenizedPrompt
    model: ModelTraits
    time: float


class Request(ABC):
    """What sampling and beam search have in common: a prompt, a group, and its times."""

    def __init__(
        self, arrival: Arrival, num_prompt_logprobs: int | None = None, *, shows_text: bool = True
    ) -> None:
        self.group = arrival.group
        self.first_scheduled_time: float | None = None  # these four are set by the engine
        self.first_token_time: float | None = None
        self.last_token_time: float | None = None
        self.finished_time: float | None = None
        self.num_prompt_logprobs = num_prompt_logprobs  # None: the prompt's are not asked for
        self._first = arrival.group.sequences[0]
        self._prompt = arrival.prompt
        self._model = arrival.model
        self._tokenizer = arrival.model.tokenizer if shows_text else None  # for what is shown
        self._arrival_time = arrival.time
        self._has_logged_error = False
        self._prompt_logprobs: list[Logprobs | None] = [None]  # nothing precedes the first

    # ---- what each kind of request does in its own way -------------------------------------------

    @abstractmethod
    def rows(self, seq: Sequence) -> list[SamplingRow]:
        """What to sample from the logits of a sequence: one row per token that is wanted."""

    @abstractmethod
    def advance(self, sampled: dict[int, list[SampledToken]], fork: Fork) -> list[Sequence]:
        """Take the tokens of all sequences, by sequence id; returns those that have ended."""

    @abstractmethod
    def finish_all(self, reason: FinishReason, error: str | None = None) -> None:
        """End all sequences that have not ended yet; `error` is for the reason "error"."""

    @property
    @abstractmethod
    def is_finished(self) -> bool:
        """Whether no more tokens will come."""

    @abstractmethod
    def progress(self) -> Progress | None:
        """What is new since the last call; None if nothing can be shown yet."""

    @abstractmethod
    def completions(self) -> list[CompletionOutput]:
        """What has been generated so far."""

    # ---- what is the same for all ----------------------------------------------------------------

    def wants_prompt_logits(self, seq: Sequence) -> bool:
        """Whether the prompt's logits are asked for and some of them are still to come."""
        asked = self.num_prompt_logprobs is not None
        return asked and len(self._prompt_logprobs) < seq.prompt_len

    def note_prompt_logits(self, seq: Sequence, logits: Tensor) -> None:
        """Take the logits of the tokens from `num_computed_tokens` on, [rows, vocab].

        Those at position i judge the token at position i + 1. After a preemption some positions
        come a second time: they are skipped, as is whatever follows the prompt.
        """
        first = len(self._prompt_logprobs) - 1  # its logits judge the first token not judged yet
        start = seq.num_computed_tokens
        stop = min(start + logits.shape[0], seq.prompt_len - 1)
        if start <= first < stop:
            judged, count = seq.token_ids[first + 1 : stop + 1], self.num_prompt_logprobs
            scores = score(logits[first - start : stop - start], judged, [count] * len(judged))
            self._prompt_logprobs += [logprobs_of(s, count or 0, self._tokenizer) for s in scores]

    def take_over(self, old: "Request", has_tokens: bool) -> None:
        """Take what does not follow from the tokens of the request that this one replaces."""
        self._prompt_logprobs = old._prompt_logprobs
        self._has_logged_error = old._has_logged_error
        self.first_scheduled_time = old.first_scheduled_time
        if has_tokens:
            self.first_token_time, self.last_token_time = old.first_token_time, old.last_token_time

    def log_error(self, error: str, position: int) -> None:
        """Log the first error of a request: later ones mostly follow from the same cause."""
        if not self._has_logged_error:
            request_id = self.group.request_id
            logger.error("request %s, token at position %d: %s", request_id, position, error)
        self._has_logged_error = True

    def output(self) -> RequestOutput:
        """The request as a user sees it now."""
        asked = self.num_prompt_logprobs is not None
        return RequestOutput(
            request_id=self.group.request_id,
            prompt=self._prompt.text,
            prompt_token_ids=self._prompt.token_ids.copy(),  # the user's own, to change at will
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
