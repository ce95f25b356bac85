"""A request that generates without a model: greedily, in several samples, or with beams.

It uses scheduler and memory like a served request. Its tokens do not matter, but the survival of
its beams does: that is drawn at random, see `genealogy`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal

import numpy as np

from minipaged.evaluation.sim.traces import TraceRequest
from minipaged.scheduler.interface import Scheduler
from minipaged.sequence import Sequence, SequenceGroup

NUM_CANDIDATES = 64  # candidate tokens per beam
NUM_GENEALOGIES = 64  # genealogies that are drawn; requests take turns


Method = Literal["sample", "beam"]


@dataclass(frozen=True)
class Decoding:
    """The decoding method: `width` samples, or `width` beams."""

    method: Method = "sample"
    width: int = 1
    peakedness: float = 3.0  # of beams: the scale of a next token's logits


GREEDY = Decoding()


class SimRequest:
    """One request of a trace, from its arrival to its last token."""

    def __init__(
        self, number: int, trace: TraceRequest, decoding: Decoding, seq_ids: Iterator[int]
    ) -> None:
        self.arrival = trace.arrival
        self.output_len = trace.output_len
        self.first_token: float | None = None  # seconds, as all times
        self.finish: float | None = None
        own = range(1 + number * 2**20, 1 + number * 2**20 + trace.input_len - trace.prefix_len)
        prompt = [*range(-trace.prefix_len, 0), *own]  # unshared tokens after the prefix
        seq = Sequence(next(seq_ids), prompt, max_output_len=trace.output_len)
        self.group = SequenceGroup(str(number), [seq], width=decoding.width)
        self._seq_ids = seq_ids
        self._parents = None
        if decoding.method == "beam":
            self._parents = genealogy(decoding.width, decoding.peakedness, number)
        self._beams = [seq]  # in the order of the genealogy, not of the group
        self._tokens = count()

    @property
    def normalized_latency(self) -> float:
        """Seconds from arrival to the last token, per output token (section 6.1)."""
        assert self.finish is not None, "it has not finished"
        return (self.finish - self.arrival) / self.output_len

    def advance(self, scheduler: Scheduler) -> bool:
        """Append the next token to every sequence, and fork if needed; True at the end."""
        group = self.group
        is_first = group.sequences[0].num_output_tokens == 0
        if self._parents is not None:
            self._choose_beams(scheduler, next(self._parents))
        elif is_first and group.width > 1:
            first = group.sequences[0]
            for _ in range(group.width - 1):
                scheduler.fork(group, first, next(self._seq_ids))
        for seq in group.sequences:
            seq.append(next(self._tokens))
        if group.sequences[0].num_output_tokens < self.output_len:
            return False
        scheduler.abort(group)  # all sequences are equally long
        return True

    def _choose_beams(self, scheduler: Scheduler, parents: tuple[int, ...]) -> None:
        """Continue beam i from the beam `parents[i]`; those without a child are pruned."""
        if len(self._beams) == 1:
            parents = (0,) * self.group.width
        continued: list[Sequence] = []
        for parent in (self._beams[number] for number in parents):
            taken = parent in continued
            child = scheduler.fork(self.group, parent, next(self._seq_ids)) if taken else parent
            continued.append(child)
        for beam in self._beams:
            if beam not in continued:
                scheduler.finish(self.group, beam)
        self._beams = continued


def genealogy(width: int, peakedness: float, number: int) -> Iterator[tuple[int, ...]]:
    """The parent of each beam, step by step.

    It is a synthetic language model: the logits of a beam's likeliest tokens are Gumbel noise with
    a scale that expresses the model's certainty, and the search takes the best candidates of all
    beams, as with a real model. How often beams have the same parent depends on that scale, and in
    reality on the model. `minipaged bench sharing` therefore measures sharing with a real model.
    """
    step = 0
    while True:
        drawn = _draw_genealogies(width, peakedness, step)
        yield drawn[number % NUM_GENEALOGIES]
        step += 1


_drawn: dict[tuple[int, float], tuple[list[list[tuple[int, ...]]], "np.ndarray"]] = {}


def _draw_genealogies(width: int, peakedness: float, step: int) -> list[tuple[int, ...]]:
    """The parents of all genealogies in this step; drawn once and cached."""
    key = (width, peakedness)
    steps, scores = _drawn.get(key, ([], np.zeros((NUM_GENEALOGIES, width))))
    while len(steps) <= step:
        random = np.random.default_rng((width, len(steps)))
        logits = peakedness * random.gumbel(size=(NUM_GENEALOGIES, width, NUM_CANDIDATES))
        logits -= logits.max(-1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        totals = (scores[:, :, None] + logprobs).reshape(NUM_GENEALOGIES, -1)
        best = np.argsort(-totals, axis=1)[:, :width]
        scores = np.take_along_axis(totals, best, 1)
        scores -= scores.max(1, keepdims=True)
        steps.append([tuple(parents) for parents in (best // NUM_CANDIDATES).tolist()])
        _drawn[key] = (steps, scores)
    return steps[step]
