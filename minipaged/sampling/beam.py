"""Beam search: finds the likeliest sequences instead of the likeliest next token (section 4.4).

This module has no tensors or blocks. It keeps `beam_width` sequences, its beams. In each step,
every beam proposes its likeliest next tokens, and the best of all proposals continue. With two
beams:

    beams              candidates, best first             result
    A "a frog" -1.2    A "a frog."   -1.5   ends          the best, so kept as a hypothesis
    B "the cat" -1.4   A "a frog in" -2.0   continues     A itself
                       B "the cat."  -2.1   ends          third, beyond the two best: dropped
                       A "a frog on" -2.6   continues     a fork of A; B is pruned

A beam with two successors forks and one with none ends, so beams share most of their blocks. The
tests check that all results equal those of `generate(num_beams=...)` in transformers.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Literal

from minipaged.sampling.beam_params import BeamSearchParams
from minipaged.sequence import Sequence


@dataclass(frozen=True)
class Beam:
    """One of the sequences that continue, and its log-probability so far."""

    seq: Sequence
    logprob: float


@dataclass(frozen=True)
class Candidate:
    """One possible continuation of a beam."""

    beam: Beam
    token_id: int
    logprob: float  # of all generated tokens, including this one


@dataclass(frozen=True)
class Hypothesis:
    """A result: the generated tokens and their score."""

    token_ids: list[int]
    logprob: float
    score: float
    finish_reason: Literal["stop", "length"] | None  # None: unfinished


class BeamSearch:
    """One search. It stores the hypotheses; the caller stores the beams."""

    def __init__(
        self, params: BeamSearchParams, end_token_ids: tuple[int, ...], max_tokens: int
    ) -> None:
        self.hypotheses: list[Hypothesis] = []
        """The best finished sequences, best first; at most `beam_width`."""
        self._params = params
        self._end_token_ids = () if params.ignore_eos else end_token_ids
        self._max_tokens = max_tokens
        self.num_candidates = params.num_candidates(len(self._end_token_ids))

    def advance(self, beams: list[Beam], likeliest: Many[Mapping[int, float]]) -> list[Candidate]:
        """Return the candidates that continue, best first; none if the search is over.

        `likeliest[i]` maps the `num_candidates` likeliest next tokens of `beams[i]` to their
        log-probabilities.
        """
        candidates = [
            Candidate(beam, token_id, beam.logprob + logprob)
            for beam, tokens in zip(beams, likeliest, strict=True)
            for token_id, logprob in tokens.items()
        ]
        candidates.sort(key=lambda candidate: -candidate.logprob)
        length = beams[0].seq.num_output_tokens + 1
        going_on: list[Candidate] = []
        for rank, candidate in enumerate(candidates[: self.num_candidates]):
            ends = candidate.token_id in self._end_token_ids
            if not ends and length < self._max_tokens:
                going_on.append(candidate)
            elif rank < self._params.beam_width:
                self._end(candidate, "stop" if ends else "length")
        going_on = going_on[: self._params.beam_width]
        return [] if self._is_over(going_on, length) else going_on

    def ranked(self, beams: list[Beam]) -> list[Hypothesis]:
        """Return the best results if the search ended now, including unfinished beams."""
        going_on = (self._hypothesis(b.seq.output_token_ids, b.logprob, None) for b in beams)
        return self._best([*self.hypotheses, *going_on])

    def _end(self, candidate: Candidate, reason: Literal["stop", "length"]) -> None:
        token_ids = [*candidate.beam.seq.output_token_ids, candidate.token_id]
        new = self._hypothesis(token_ids, candidate.logprob, reason)
        self.hypotheses = self._best([*self.hypotheses, new])

    def _is_over(self, going_on: list[Candidate], length: int) -> bool:
        params = self._params
        if not going_on:
            return True
        if len(self.hypotheses) < params.beam_width:
            return False
        if params.early_stopping is True:
            return True
        # The best beam's score at the length that gives the highest score.
        if params.early_stopping == "never" and params.length_penalty > 0:
            length = self._max_tokens
        return self._score(going_on[0].logprob, length) <= self.hypotheses[-1].score

    def _hypothesis(
        self, token_ids: list[int], logprob: float, reason: Literal["stop", "length"] | None
    ) -> Hypothesis:
        return Hypothesis(token_ids, logprob, self._score(logprob, len(token_ids)), reason)

    def _score(self, logprob: float, length: int) -> float:
        return logprob / max(1, length) ** self._params.length_penalty

    def _best(self, hypotheses: list[Hypothesis]) -> list[Hypothesis]:
        return sorted(hypotheses, key=lambda h: -h.score)[: self._params.beam_width]
