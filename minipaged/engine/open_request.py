"""An open request, and the history from which it can be rebuilt.

A request is determined by its arrival and its sampled tokens. Its text, its forks and its
log-probabilities follow from these, as its keys and values follow from its tokens (section 4.5,
recomputation). The engine therefore keeps a history of sampled tokens per request. If a step is
interrupted, every request is rebuilt from its history to its state before that step.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from math import inf
from typing import Any

from minipaged.engine.outputs import Progress
from minipaged.engine.request import Arrival, Request
from minipaged.errors import RequestFailed
from minipaged.sampling.rows import SampledToken
from minipaged.sequence import Sequence, SequenceGroup

SampledBySeq = dict[int, list[SampledToken]]  # by sequence id
Sampled = dict[str, SampledBySeq]  # by request id
Broken = dict[int, str]  # by sequence id: the fault of its logits
Sampling = tuple[Sampled, Broken]

_ENTRY = 2 + len(SampledToken._fields)  # elements per token in a history


@dataclass(eq=False)
class OpenRequest:
    """A request that has not ended, or that ended in the present step."""

    arrival: Arrival
    build: Callable[[Arrival], Request]  # a request of its kind, with its parameters and seed
    request: Request = field(init=False)
    history: list[Any] = field(default_factory=list[Any])
    """One sampled token after another: the step, the sequence id, the fields of `SampledToken`.

    The list is flat, because the garbage collector would visit an object per token repeatedly while
    the request is open.
    """
    forked: list[int] = field(default_factory=list[int])
    """Ids of its forked sequences, in order."""
    ended_in: float = inf  # the step

    def __post_init__(self) -> None:
        self.request = self.build(self.arrival)
        [self._first] = self.arrival.group.sequences  # from which all others are forked

    def rebuild(self, last_step: int) -> SequenceGroup:
        """Undo all later steps than `last_step`; returns a new group, to be recomputed.

        The request object stays the same, because progress records refer to it.
        """
        old, first = self.arrival.group, self._first
        seq = Sequence(
            first.seq_id,
            first.token_ids[: first.prompt_len],
            max_output_len=first.max_output_len,
            cache_salt=first.cache_salt,
            reads_cache=first.reads_cache,
        )
        seq.num_cached_tokens = first.num_cached_tokens
        group = SequenceGroup(old.request_id, [seq], old.width, num_preemptions=old.num_preemptions)
        arrival = replace(self.arrival, group=group)
        request = self.build(arrival)
        num_kept = sum(step <= last_step for step in self.history[::_ENTRY])
        history, child_ids = self.history[: num_kept * _ENTRY], iter(self.forked)
        for sampled in sampled_by_step(history):
            self._replay(request, sampled, child_ids)
        request.take_over(self.request, has_tokens=bool(history))
        # The first sequence is recomputed, and the others fork from it again.
        group.awaiting_refork, group.sequences = group.sequences[1:], group.sequences[:1]
        vars(self.request).update(vars(request))
        self.arrival, self._first, self.history, self.ended_in = arrival, seq, history, inf
        self.forked = self.forked[: len(self.forked) - len(list(child_ids))]
        return group

    def _replay(self, request: Request, sampled: SampledBySeq, child_ids: Iterator[int]) -> None:
        """Give the tokens of one step to a rebuilt request."""
        group = request.group

        def fork(parent: Sequence) -> Sequence:
            child = parent.fork(next(child_ids))
            group.sequences.append(child)
            return child

        for seq in request.advance(sampled, fork):
            group.sequences.remove(seq)
        request.progress()  # marks it as reported

    def fail(self, cause: Exception) -> Progress:
        """End the request because its own code raised an exception."""
        request_id = self.arrival.group.request_id
        error = RequestFailed(
            f"request {request_id!r} has ended, because the code that samples for it or decodes "
            f"its text raised {type(cause).__name__}: {cause}. Fix that code; other requests "
            "continue."
        )
        error.__cause__ = cause
        with suppress(Exception):  # which may be broken as well
            self.request.finish_all("error")
        return Progress(request_id, [], True, self.request.output, error)


def sampled_by_step(history: Iterable[Any]) -> list[SampledBySeq]:
    """Group an `OpenRequest.history` by step."""
    steps: dict[int, SampledBySeq] = {}
    places = iter(history)
    for step in places:
        seq_id, *fields = islice(places, _ENTRY - 1)
        steps.setdefault(step, {}).setdefault(seq_id, []).append(SampledToken(*fields))
    return list(steps.values())


def end_early(
    out_of_memory: Iterable[SequenceGroup],
    requests: Mapping[str, OpenRequest],
    faults: dict[str, Exception],
) -> list[Progress]:
    """End the requests that are out of memory, and those whose own code has raised.

    Args:
        requests: by request id.
        faults: exceptions by request id; requests that raise now are added.
    """
    progresses: list[Progress] = []
    for group in out_of_memory:
        request = requests[group.request_id].request
        try:
            request.finish_all("length")
            progresses += filter(None, [request.progress()])
        except Exception as error:
            faults[group.request_id] = error
    return progresses + [requests[request_id].fail(e) for request_id, e in faults.items()]
