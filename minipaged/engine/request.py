"""One request on its way from sampled tokens to text: what the engine remembers of it.

A request knows how its sequences go on. Sampling forks its first sequence once, when the prompt is
computed, into as many as are wanted, and each then goes its own way. Beam search forks and gives up
sequences in every step. In the engine, both are rows of the same batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from minipaged.engine.completion import Completion
from minipaged.engine.outputs import CompletionOutput, FinishReason, RequestMetrics, RequestOutput
from minipaged.sampling import SampledToken, SamplingParams, SamplingRow, score
from minipaged.sequence import Sequence, SequenceGroup
from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.prompts import TokenizedPrompt

Fork = Callable[[Sequence], Sequence]


@dataclass(frozen=True)
class ModelTraits:
    """What every request must know of the model that serves it."""

    tokenizer: Tokenizer | None
    eos_token_ids: tuple[int, ...]
    max_model_len: int


@dataclass(frozen=True)
class Arrival:
    """A request as it came in, whatever it asks for."""

    group: SequenceGroup  # of one sequence still
    prompt: TokenizedPrompt
    model: ModelTraits
    time: float


class Request(ABC):
    """What sampling and beam search have in common: a prompt, a group, and how long all took."""

    def __init__(self, arrival: Arrival, num_prompt_logprobs: int | None = None) -> None:
        self.group = arrival.group
        self._first = arrival.group.sequences[0]
        self._prompt = arrival.prompt
        self._model = arrival.model
        self._arrival_time = arrival.time
        self._first_token_time: float | None = None
        self._last_token_time: float | None = None
        self._num_blocks_held = 0
        self._num_blocks_unshared = 0
        self._num_prompt_logprobs = num_prompt_logprobs  # None: nobody asked for any
        self._prompt_logprobs: list[dict[int, float] | None] = [None]  # nothing precedes the first

    # ---- what each kind of request does in its own way -------------------------------------------

    @abstractmethod
    def rows(self, seq: Sequence) -> list[SamplingRow]:
        """What to sample from the logits of a sequence: a row for each token that is wanted."""

    @abstractmethod
    def advance(self, sampled: dict[int, list[SampledToken]], fork: Fork) -> list[Sequence]:
        """Take the tokens of all sequences, by sequence id; returns those that have ended."""

    @abstractmethod
    def finish_all(self, reason: FinishReason) -> None:
        """End all sequences that have not ended yet."""

    @property
    @abstractmethod
    def is_finished(self) -> bool:
        """Whether no more tokens will come."""

    @property
    @abstractmethod
    def can_be_shown(self) -> bool:
        """Whether nothing of its output can be taken back any more."""

    @abstractmethod
    def completions(self) -> list[CompletionOutput]:
        """What has been generated so far."""

    # ---- what is the same for all ----------------------------------------------------------------

    def note_time(self, now: float) -> None:
        """A token has come."""
        self._last_token_time = now
        if self._first_token_time is None:
            self._first_token_time = now

    def note_blocks(self, held: int, unshared: int) -> None:
        """Add a step's blocks: those that its sequences hold, and would hold without sharing."""
        self._num_blocks_held += held
        self._num_blocks_unshared += unshared

    def wants_prompt_logits(self, seq: Sequence) -> bool:
        """Whether the prompt's logits are asked for and some of them are still to come."""
        asked = self._num_prompt_logprobs is not None
        return asked and len(self._prompt_logprobs) < seq.prompt_len

    def note_prompt_logits(self, seq: Sequence, logits: Tensor) -> None:
        """Take the logits of the tokens from `num_computed_tokens` on, [rows, vocab].

        Those at position i judge the token at position i + 1. After a preemption some positions
        come a second time: they are skipped.
        """
        first = len(self._prompt_logprobs) - 1  # its logits judge the first token not judged yet
        start = seq.num_computed_tokens
        stop = min(start + logits.shape[0], seq.prompt_len - 1)
        if start <= first < stop:
            judged = seq.token_ids[first + 1 : stop + 1]
            num_top = [self._num_prompt_logprobs] * len(judged)
            scores = score(logits[first - start : stop - start], judged, num_top)
            self._prompt_logprobs += [s.top_logprobs for s in scores]

    def output(self) -> RequestOutput:
        """The request as a user sees it now."""
        return RequestOutput(
            request_id=self.group.request_id,
            prompt=self._prompt.text,
            prompt_token_ids=self._prompt.token_ids.copy(),  # the user's own, to change at will
            outputs=self.completions(),
            finished=self.is_finished,
            metrics=RequestMetrics(
                arrival_time=self._arrival_time,
                first_token_time=self._first_token_time,
                last_token_time=self._last_token_time,
                num_preemptions=self.group.num_preemptions,
                num_blocks_held=self._num_blocks_held,
                num_blocks_unshared=self._num_blocks_unshared,
            ),
            prompt_logprobs=(
                None if self._num_prompt_logprobs is None else list(self._prompt_logprobs)
            ),
            num_cached_tokens=self._first.num_cached_tokens or 0,
        )


class SamplingRequest(Request):
    """One or several samples of a prompt, a `Completion` each."""

    def __init__(self, arrival: Arrival, params: SamplingParams, seed: int) -> None:
        super().__init__(arrival, params.prompt_logprobs)
        self._params = params
        self._seed = seed
        self._completions: dict[int, Completion] = {}  # by sequence id, in the order of samples
        self._add_completion(self._first)

    # ---- what sampling must know ---------------------------------------------------------------

    def rows(self, seq: Sequence) -> list[SamplingRow]:
        """One row; for the prompt, one for each sample, all from the same logits."""
        params = self._params
        ends = () if params.ignore_eos else self._model.eos_token_ids
        seed = self._completions[seq.seq_id].seed
        num_samples = params.num_samples if seq.num_output_tokens == 0 else 1
        return [
            SamplingRow(
                params=params,
                prompt_token_ids=self._prompt.token_ids,
                output_token_ids=seq.output_token_ids,
                seed=seed + sample,
                end_token_ids=(*ends, *params.stop_ids),
            )
            for sample in range(num_samples)
        ]

    # ---- what sampling gives -------------------------------------------------------------------

    def advance(self, sampled: dict[int, list[SampledToken]], fork: Fork) -> list[Sequence]:
        """Give each sequence its token, and each token beyond the first a fork of its own."""
        ended: list[Sequence] = []
        for seq_id, tokens in sampled.items():
            completion = self._completions[seq_id]
            samples = [completion]
            samples += [self._add_completion(fork(completion.seq)) for _ in tokens[1:]]
            for sample, token in zip(samples, tokens, strict=True):
                sample.add(token, self._model.eos_token_ids, self._model.max_model_len)
                if sample.finish_reason is not None:
                    ended.append(sample.seq)
        return ended

    def _add_completion(self, seq: Sequence) -> Completion:
        seed = self._seed + len(self._completions)
        completion = Completion(seq, self._params, self._model.tokenizer, seed)
        self._completions[seq.seq_id] = completion
        return completion

    def finish_all(self, reason: FinishReason) -> None:
        """End all samples that have not ended yet."""
        for completion in self._completions.values():
            if completion.finish_reason is None:
                completion.finish(reason)

    @property
    def is_finished(self) -> bool:
        """Whether all samples have ended."""
        return all(c.finish_reason is not None for c in self._completions.values())

    @property
    def can_be_shown(self) -> bool:
        """With best_of, it is known only at the end which samples are returned."""
        return self.is_finished or self._params.num_samples == self._params.n

    def completions(self) -> list[CompletionOutput]:
        """The n samples, in their order; of best_of, the likeliest ones, the best first."""
        samples = list(self._completions.values())
        samples += samples[:1] * (self._params.n - len(samples))  # ended before it forked: n empty
        if self._params.num_samples > self._params.n:
            samples.sort(key=lambda sample: -sample.cumulative_logprob)
        return [sample.output(index) for index, sample in enumerate(samples[: self._params.n])]
