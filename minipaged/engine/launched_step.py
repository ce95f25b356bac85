"""A step between its launch and its results, and steps that overlap.

Without overlap, the device waits while the host reads, commits and schedules, and the host waits
while the device computes:

    host    |launch 1|  waits  |read, commit 1|launch 2|  waits  |read, commit 2|
    device           |computes 1|                      |computes 2|

With `async_scheduling`, step 2 is in the device's queue when step 1 ends:

    host    |launch 1|launch 2| waits |read, commit 1|launch 3|read, commit 2|launch 4|
    device           |  computes 1    |  computes 2           |  computes 3           |

Step 2 is scheduled before the tokens of step 1 are known. Each of them is a pending token of its
sequence: the id -1 - r stands for the token that step 1 samples from row r of its logits, and the
device replaces it (`ModelRunner.run`). Otherwise, step 2 is scheduled as if no sequence ended in
step 1. If one does end, what step 2 computes for it is dropped. Its blocks are freed at once: the
device works in order, so step 2 has written to them before a later step does.

If a step needs the results of the last one, it is not launched ahead: see `may_look_ahead`. The
paper has no overlap; vLLM calls it async scheduling, and SGLang the overlap scheduler.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from minipaged.engine.broken_logits import CHECK_ONLY
from minipaged.engine.open_request import Broken, OpenRequest, Sampled, Sampling
from minipaged.memory import BlockTable
from minipaged.sampling.rows import SamplingRow
from minipaged.sampling.sampler import Draws
from minipaged.scheduler.interface import Scheduler
from minipaged.scheduler.output import (
    ScheduledSequence,
    SchedulerOutput,
    SequenceInput,
    StepInput,
)
from minipaged.sequence import SequenceGroup
from minipaged.utils.device import to_device
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
        request, start = requests[group.request_id].request, seq.num_begun_tokens
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

    def select(self, logits: Float[Tensor, "all vocab"]) -> Float[Tensor, "rows vocab"]:
        """Return these rows of the step's logits."""
        if self.indices == list(range(logits.shape[0])):
            return logits
        return logits[to_device(self.indices, logits.device, torch.long)]


def rows_to_sample(
    decision: SchedulerOutput,
    step: StepInput,
    logits: Float[Tensor, "all vocab"],
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
        try:
            if request.num_prompt_logprobs is not None:
                request.note_prompt_logits(seq, logits[start:stop])
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
    is_followed: bool = False  # the next step was launched before this one's results are read

    def __post_init__(self) -> None:
        self._sequences = self.decision.sequences
        self._ended: set[int] = set()  # ids of sequences that have ended since the launch

    def read(self) -> Sampling:
        """Wait for the results: the new tokens by request and sequence, and the broken rows."""
        tokens = self.draws.read()
        sampled, broken = Sampled(), Broken()
        stop = 0
        for (group, seq, _, samples), num_rows in zip(self._sequences, self.num_rows, strict=True):
            start, stop = stop, stop + num_rows
            if num_rows == 0 or seq.seq_id in self._ended:
                continue
            if isinstance(error := tokens[start].error, str):  # exceptions: later
                broken[seq.seq_id] = error
            if samples:
                of_request = sampled.setdefault(group.request_id, {})
                of_request[seq.seq_id] = tokens[start:stop]
        return sampled, broken

    # ---- overlap ---------------------------------------------------------------------------------

    def may_look_ahead(self, scheduler: Scheduler, requests: Mapping[str, OpenRequest]) -> bool:
        """Return whether the next step can be scheduled without the results of this one.

        It cannot if a sequence forks, if beams are chosen, or if an option of a request depends on
        the new token. It should not if blocks may run out: a sequence that ends in this step may
        free enough of them, and no group has to be preempted.

        Args:
            requests: by request id.
        """
        most_new_blocks = 0
        for group in scheduler.running:
            if group.awaiting_refork:
                return False
            most_new_blocks += len(group.sequences)
        if scheduler.memory.num_free < most_new_blocks:
            return False
        for group, seq, _, samples in self.decision.sequences:
            if samples and not requests[group.request_id].request.may_run_ahead(seq):
                return False
        return True

    def look_ahead(self) -> None:
        """Count this step's tokens as being computed, and append the pending tokens."""
        row = 0
        for (_, seq, num_new_tokens, samples), num_rows in zip(
            self._sequences, self.num_rows, strict=True
        ):
            if seq.seq_id not in self._ended:
                seq.num_in_flight += num_new_tokens
                if samples:
                    seq.append_pending(row)
            row += num_rows
        self.is_followed = True

    def arrive(self) -> None:
        """Undo the counting of `look_ahead`: from now on the tokens are computed."""
        if self.is_followed:
            for _, seq, num_new_tokens, _ in self.decision.sequences:
                seq.num_in_flight -= num_new_tokens

    def leave_out_ended(self, requests: Mapping[str, OpenRequest]) -> None:
        """Leave out what has ended since the launch.

        Args:
            requests: by request id.
        """

        def is_open(group: SequenceGroup) -> bool:
            request = requests.get(group.request_id)
            return request is not None and request.arrival.group is group

        def goes_on(scheduled: ScheduledSequence) -> bool:
            return is_open(scheduled.group) and scheduled.seq in scheduled.group.sequences

        self._ended = {each.seq.seq_id for each in self._sequences if not goes_on(each)}
        self.decision = replace(
            self.decision,
            sequences=tuple(filter(goes_on, self.decision.sequences)),
            ended=tuple(filter(is_open, self.decision.ended)),
        )
