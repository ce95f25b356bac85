"""Sampling: one or several completions of a prompt, each a sequence with its own seed."""

from collections.abc import Mapping

from minipaged.engine.outputs import CompletionOutput, FinishReason, NewTokens, Progress
from minipaged.engine.request import Arrival, Fork, ModelTraits, Request
from minipaged.sampling import RequestOutputKind, SamplingParams
from minipaged.sampling.adjust import bad_words_in_tokens
from minipaged.sampling.logprobs import Logprobs, logprobs_of
from minipaged.sampling.rows import SampledToken, SamplingRow
from minipaged.sequence import Sequence
from minipaged.tokenizer.detokenizer import Detokenizer


class SamplingRequest(Request):
    """One or several samples of a prompt, each a `Completion`."""

    def __init__(self, arrival: Arrival, params: SamplingParams, seed: int) -> None:
        super().__init__(arrival, params.prompt_logprobs, shows_text=params.detokenize)
        self._params = params
        self._seed = seed
        self._stop_reasons = find_stop_reasons(params, self._model)
        # Tokens that min_tokens forbids: the end of sequence even with ignore_eos, as in vLLM.
        self._end_token_ids = tuple({*self._stop_reasons, *self._model.eos_token_ids})
        tokenizer, self._bad_words = self._model.tokenizer, list[list[int]]()
        if params.bad_words and tokenizer is not None:
            self._bad_words = bad_words_in_tokens(params.bad_words, tokenizer)
        self._chooses_at_the_end = params.num_samples > params.n  # best_of
        final_only = params.output_kind is RequestOutputKind.FINAL_ONLY
        self._shows_only_the_end = final_only or self._chooses_at_the_end
        self._completions: dict[int, Completion] = {}  # by sequence id, in the order of samples
        self._add_completion(self._first)

    # ---- from logits to tokens -----------------------------------------------------------------

    def rows(self, seq: Sequence) -> list[SamplingRow]:
        """Return one row; for the prompt, one per sample, all from the same logits."""
        row = self._completions[seq.seq_id].row
        if seq.token_ids[-1] < 0:  # pending
            return [row._replace(num_pending=1)]
        if row.output_token_ids or self._params.num_samples == 1:
            return [row]
        return [row._replace(seed=row.seed + i) for i in range(self._params.num_samples)]

    def may_run_ahead(self, seq: Sequence) -> bool:
        """Return whether the sequence does not fork, and no option depends on the new token."""
        has_forked = len(self._completions) == self._params.num_samples
        return has_forked and not self._params.reads_output

    # ---- from tokens to text -------------------------------------------------------------------

    def advance(self, sampled: dict[int, list[SampledToken]], fork: Fork) -> list[Sequence]:
        """Give each sequence its token, and fork it for each further token."""
        ended: list[Sequence] = []
        for seq_id, tokens in sampled.items():
            samples = [self._completions[seq_id]]
            if len(tokens) > 1:
                parent = samples[0].seq
                samples += [self._add_completion(fork(parent)) for _ in tokens[1:]]
            for sample, token in zip(samples, tokens, strict=True):
                sample.add(token)
                if sample.finish_reason is not None:
                    ended.append(sample.seq)
        return ended

    def _add_completion(self, seq: Sequence) -> "Completion":
        seed = self._seed + len(self._completions)
        model, params = self._model, self._params
        max_tokens = model.max_model_len - seq.prompt_len
        if params.max_tokens is not None:
            max_tokens = min(max_tokens, params.max_tokens)
        detokenizer = None
        if self._tokenizer is not None:
            detokenizer = Detokenizer(
                self._tokenizer,
                params.stop_automaton,
                min_tokens=params.min_tokens,
                after=self._prompt.token_ids,
                skip_special_tokens=params.skip_special_tokens,
                keeps_stop=params.include_stop_str_in_output,
            )
        prompt, ends = self._prompt.token_ids, self._end_token_ids
        row = SamplingRow(params, prompt, (), seed, ends, self._bad_words)
        completion = Completion(seq, row, detokenizer, self._stop_reasons, max_tokens)
        self._completions[seq.seq_id] = completion
        return completion

    def finish_all(self, reason: FinishReason, error: str | None = None) -> None:
        """End all samples that have not ended yet."""
        for completion in self._completions.values():
            if completion.finish_reason is None:
                completion.finish(reason, error=error)

    # ---- output --------------------------------------------------------------------------------

    @property
    def is_finished(self) -> bool:
        """Whether all samples have ended."""
        for completion in self._completions.values():
            if completion.finish_reason is None:
                return False
        return True

    def progress(self) -> Progress | None:
        """Return the new tokens since the last call; with best_of, only at the end."""
        finished = self.is_finished
        if self._shows_only_the_end and not finished:
            return None
        new: list[NewTokens] = []
        if self._chooses_at_the_end:
            new = [NewTokens.of(completion) for completion in self.completions()]
        else:
            for index, completion in enumerate(self._completions.values()):
                completion.take_new(index, new)
        kind = self._params.output_kind
        return Progress(self.group.request_id, new, finished, self.output, None, kind)

    def completions(self) -> list[CompletionOutput]:
        """Return the n samples in order; with best_of, the likeliest ones, best first."""
        samples = list(self._completions.values())
        samples += samples[:1] * (self._params.n - len(samples))  # ended before it forked: n empty
        if self._chooses_at_the_end:
            # A sample that ended with an error is short, so it could count as likely.
            samples.sort(key=lambda s: (s.finish_reason == "error", -s.cumulative_logprob))
        return [sample.output(index) for index, sample in enumerate(samples[: self._params.n])]


StopReasons = Mapping[int, int | str | None]


def find_stop_reasons(params: SamplingParams, model: ModelTraits) -> StopReasons:
    """Map the tokens that end a sample to their `stop_reason`.

    They are the end of sequence (whose reason is None), `stop_token_ids`, and the special tokens
    among the stop strings: special tokens are not part of the text, so they are matched by id.
    """
    specials = {} if model.tokenizer is None else model.tokenizer.special_tokens
    reasons: dict[int, int | str | None] = {}
    reasons.update((specials[text], text) for text in params.stop_strings if text in specials)
    reasons.update((token_id, token_id) for token_id in params.stop_ids)
    return reasons if params.ignore_eos else reasons | dict.fromkeys(model.eos_token_ids)


class Completion:
    """One sample of a request: its text, its log-probabilities, why it ended."""

    def __init__(
        self,
        seq: Sequence,
        row: SamplingRow,
        detokenizer: Detokenizer | None,
        stop_reasons: StopReasons,
        max_tokens: int,
    ) -> None:
        params = row.params
        self.seq = seq
        self._token_ids = seq.output_token_ids  # a separate list, so that no step copies it
        self.row = row._replace(output_token_ids=self._token_ids)
        self.cumulative_logprob = 0.0
        self.logprobs: list[Logprobs] | None = None if params.logprobs is None else []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self._stop_reasons = stop_reasons
        self._num_logprobs = params.logprobs
        self._shows_end_token = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._max_tokens = max_tokens
        self._detokenizer = detokenizer
        self._num_tokens_taken = 0  # by `take_new`, as the next two
        self._num_chars_taken = 0
        self._end_is_taken = False

    def add(self, sampled: SampledToken) -> None:
        """Append the next token, and decide whether it was the last."""
        if (error := sampled.error) is not None:
            if isinstance(error, Exception):
                raise error  # from a logits processor, the request's own code
            self.finish("error", error=error)
            return
        token, detokenizer = sampled.token_id, self._detokenizer
        if self.seq.token_ids[-1] < 0:  # pending
            self.seq.token_ids.pop()
        self.seq.token_ids.append(token)
        self._token_ids.append(token)
        self.cumulative_logprob += sampled.logprob
        if self.logprobs is not None:
            tokenizer = None if detokenizer is None else detokenizer.tokenizer
            self.logprobs.append(logprobs_of(sampled, self._num_logprobs, tokenizer))
        length = len(self._token_ids)
        may_stop = length >= self._min_tokens
        is_end = may_stop and token in self._stop_reasons  # its text is usually not shown
        if detokenizer is not None and (not is_end or self._shows_end_token):
            detokenizer.add(token)
        if is_end:
            self.finish("stop", self._stop_reasons[token])
            return
        if may_stop and detokenizer is not None and detokenizer.stopped is not None:
            self.finish("stop", detokenizer.stopped)
        elif length >= self._max_tokens:
            self.finish("length")

    def finish(
        self,
        reason: FinishReason,
        stop_reason: int | str | None = None,
        *,
        error: str | None = None,
    ) -> None:
        """End the sample, and release text that was held back."""
        self.finish_reason, self.stop_reason, self.error = reason, stop_reason, error
        if self._detokenizer is not None:
            self._detokenizer.finish()

    def take_new(self, index: int, new: list[NewTokens]) -> None:
        """Append the new tokens since the last call to `new`, if there are any."""
        start, reason = self._num_tokens_taken, self.finish_reason
        token_ids = self._token_ids[start:]
        if self._end_is_taken or (not token_ids and reason is None):
            return
        text = self._detokenizer.text if self._detokenizer is not None else ""
        logprobs = None if self.logprobs is None else self.logprobs[start:]
        piece = text[self._num_chars_taken :]
        new.append(NewTokens(index, token_ids, piece, logprobs, reason, self.stop_reason))
        self._num_tokens_taken += len(token_ids)
        self._num_chars_taken = len(text)
        self._end_is_taken = reason is not None

    def output(self, index: int) -> CompletionOutput:
        return CompletionOutput(
            index=index,
            text=self._detokenizer.text if self._detokenizer is not None else "",
            token_ids=self._token_ids.copy(),
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else list(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error=self.error,
        )
