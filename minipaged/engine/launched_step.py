"""A step between its launch and its results: what it is made from, and what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from minipaged.engine.broken_logits import CHECK_ONLY
from minipaged.engine.open_request import Broken, OpenRequest, Sampled, Sampling
from minipaged.engine.request import Request
from minipaged.memory import BlockTable
from minipaged.sampling.rows import SamplingRow
from minipaged.sampling.sampler import Draws
from minipaged.scheduler.output import (
    ScheduledSequence,
    SchedulerOutput,
    SequenceInput,
    StepInput,
)
from minipaged.sequence import Sequence
from minipaged.utils.shapes import Float


def step_input(
    decision: SchedulerOutput,
    tables: Mapping[int, BlockTable],
    requests: Mapping[str, OpenRequest],
    now: float,
) -> StepInput:
    """Convert the decision to plain numbers, the message to the device side (section 4.6).

    Args:
        tables: the block tables, by sequence id.
        requests: by request id.
        now: the time at which new requests are scheduled.
    """
    sequences: list[SequenceInput] = []
    for group, seq, num_new_tokens, _ in decision.sequences:
        request = requests[group.request_id].request
        start = seq.num_computed_tokens + seq.num_in_flight
        if request.first_scheduled_time is None:
            request.first_scheduled_time = now
        wants_all = request.num_prompt_logprobs is not None and request.wants_prompt_logits(seq)
        num_logits = num_new_tokens if wants_all else 1  # also for a chunk: see `broken_logits`
        new = seq.token_ids[start : start + num_new_tokens]
        blocks = tables[seq.seq_id].blocks.copy()
        sequences.append(SequenceInput(seq.seq_id, new, start, blocks, num_logits))
    return StepInput(tuple(sequences), decision.swap_out, decision.swap_in, decision.copies)


@dataclass
class Rows:
    """The rows of a step's logits from which a token is chosen, in order."""

    counts: list[int] = field(default_factory=list[int])  # of each scheduled sequence
    for_sampler: list[SamplingRow] = field(default_factory=list[SamplingRow])
    indices: list[int] = field(default_factory=list[int])  # in all logits of the step

    of_prompts: list[tuple[Request, Sequence, slice]] = field(
        default_factory=list[tuple[Request, Sequence, slice]]
    )
    """The logits of sequences whose requests asked for `prompt_logprobs`."""

    def note_prompt_logits(
        self, logits: Float[Tensor, "all vocab"], faults: dict[str, Exception]
    ) -> None:
        """Give the logits of prompts to their requests; `faults` gets the exceptions they raise."""
        for request, seq, places in self.of_prompts:
            try:
                request.note_prompt_logits(seq, logits[places])
            except Exception as error:
                faults[request.group.request_id] = error


def rows_to_sample(
    decision: SchedulerOutput,
    step: StepInput,
    requests: Mapping[str, OpenRequest],
    faults: dict[str, Exception],
) -> Rows:
    """Return which rows are sampled for whom: one for every sequence without uncomputed tokens.

    A prompt with several samples gets several tokens, drawn from the same logits.

    Args:
        requests: by request id.
        faults: exceptions by request id; requests that raise now are added.
    """
    rows, stop = Rows(), 0
    scheduled = zip(decision.sequences, step.sequences, strict=True)
    for (group, seq, _, samples), given in scheduled:
        request = requests[group.request_id].request
        start, stop = stop, stop + given.num_logits
        if request.num_prompt_logprobs is not None:
            rows.of_prompts.append((request, seq, slice(start, stop)))
        try:
            wanted = request.rows(seq) if samples else [CHECK_ONLY]
        except Exception as error:
            faults[group.request_id] = error
            wanted = []
        rows.counts.append(len(wanted))
        rows.for_sampler += wanted
        rows.indices += [stop - 1] * len(wanted)
    return rows


@dataclass
class LaunchedStep:
    """A step that the device computes or has computed. Its results are on the device."""

    decision: SchedulerOutput
    num_rows: list[int]  # of each sequence; 0: its request has failed
    draws: Draws
    times: list[float]  # before and after it was scheduled, and when it was launched
    sequences: tuple[ScheduledSequence, ...]  # those of the decision
    ended: set[int] = field(default_factory=set[int])  # ids of those that ended after the launch
    is_followed: bool = False  # the next step was launched before this one's results are read

    def read(self) -> Sampling:
        """Wait for the results: the new tokens by request and sequence, and the broken rows."""
        tokens = self.draws.read()
        sampled, broken = Sampled(), Broken()
        stop = 0
        for (group, seq, _, samples), num_rows in zip(self.sequences, self.num_rows, strict=True):
            start, stop = stop, stop + num_rows
            if num_rows == 0 or seq.seq_id in self.ended:
                continue
            if isinstance(error := tokens[start].error, str):  # exceptions: later
                broken[seq.seq_id] = error
            if samples:
                of_request = sampled.setdefault(group.request_id, {})
                of_request[seq.seq_id] = tokens[start:stop]
        return sampled, broken
