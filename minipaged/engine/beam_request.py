"""A request for beam search, whose beams are the sequences of its group (section 4.4)."""

from minipaged.engine.outputs import CompletionOutput, FinishReason, NewTokens, Progress
from minipaged.engine.request import Arrival, Fork, Request
from minipaged.sampling import Beam, BeamSearch, BeamSearchParams, SamplingParams
from minipaged.sampling.beam import Hypothesis
from minipaged.sampling.rows import SampledToken, SamplingRow
from minipaged.sequence import Sequence
from minipaged.tokenizer.detokenizer import Detokenizer


class BeamRequest(Request):
    """One beam search and its results."""

    def __init__(self, arrival: Arrival, params: BeamSearchParams) -> None:
        super().__init__(arrival)
        room = self._model.max_model_len - self._first.num_tokens
        max_tokens = room if params.max_tokens is None else min(room, params.max_tokens)
        self._search = BeamSearch(params, self._model.eos_token_ids, max_tokens)
        self._beams = [Beam(self._first, 0.0)]
        self._end_reason: FinishReason | None = None
        self._error: str | None = None
        # A beam needs only its likeliest next tokens from the sampler.
        self._likeliest = SamplingParams(temperature=0.0, logprobs=self._search.num_candidates)

    def rows(self, seq: Sequence) -> list[SamplingRow]:
        """Return one row, which requests the likeliest tokens."""
        return [SamplingRow(self._likeliest, (), (), seed=0)]

    def advance(self, sampled: dict[int, list[SampledToken]], fork: Fork) -> list[Sequence]:
        """Continue the best candidates; returns the beams that have none among them.

        A beam with broken logits has no candidates. If no beam has any, the search ends with an
        error.
        """
        tokens = {beam: sampled[beam.seq.seq_id][0] for beam in self._beams}
        healthy = {beam: token for beam, token in tokens.items() if token.error is None}
        if not healthy:
            self.finish_all("error", str(tokens[self._beams[0]].error))
            return [beam.seq for beam in self._beams]
        likeliest = [token.top_logprobs or {} for token in healthy.values()]
        chosen = self._search.advance(list(healthy), likeliest)
        # Fork before appending tokens: a child begins with its parent's present tokens.
        continued: list[Sequence] = []
        for candidate in chosen:
            parent = candidate.beam.seq
            continued.append(fork(parent) if parent in continued else parent)
        pruned = [beam.seq for beam in self._beams if beam.seq not in continued]
        for seq, candidate in zip(continued, chosen, strict=True):
            seq.append(candidate.token_id)
        self._beams = [Beam(s, c.logprob) for s, c in zip(continued, chosen, strict=True)]
        return pruned

    def finish_all(self, reason: FinishReason, error: str | None = None) -> None:
        """End the search; unfinished beams compete with the finished sequences."""
        if self._end_reason is None:
            self._end_reason, self._error = reason, error

    @property
    def is_finished(self) -> bool:
        """Whether the search is over."""
        return not self._beams or self._end_reason is not None

    def progress(self) -> Progress | None:
        """Return everything at the end, because beams may be pruned until then."""
        if not self.is_finished:
            return None
        new = [NewTokens.of(completion) for completion in self.completions()]
        return Progress(self.group.request_id, new, True, self.output)

    def completions(self) -> list[CompletionOutput]:
        """Return the best sequences, best first."""
        return [
            CompletionOutput(
                index=index,
                text=self._text(hypothesis),
                token_ids=hypothesis.token_ids,
                cumulative_logprob=hypothesis.logprob,
                finish_reason=hypothesis.finish_reason or self._end_reason,
                score=hypothesis.score,
                error=self._error if hypothesis.finish_reason is None else None,
            )
            for index, hypothesis in enumerate(self._search.ranked(self._beams))
        ]

    def _text(self, hypothesis: Hypothesis) -> str:
        """Return the text without the end of sequence."""
        if self._model.tokenizer is None:
            return ""
        ended = hypothesis.finish_reason == "stop"
        shown = hypothesis.token_ids[:-1] if ended else hypothesis.token_ids
        detokenizer = Detokenizer(self._model.tokenizer, after=self._prompt.token_ids)
        return "".join([*map(detokenizer.add, shown), detokenizer.finish()])
