"""Overlapped steps: the next step is launched before the results of the last one are read.

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
from dataclasses import replace

from minipaged.engine.launched_step import LaunchedStep
from minipaged.engine.open_request import OpenRequest
from minipaged.scheduler.interface import Scheduler
from minipaged.scheduler.output import ScheduledSequence
from minipaged.sequence import SequenceGroup


def may_look_ahead(
    step: LaunchedStep, scheduler: Scheduler, requests: Mapping[str, OpenRequest]
) -> bool:
    """Return whether the next step can be scheduled without the results of this one.

    It cannot if a sequence forks, if beams are chosen, or if an option of a request depends on the
    new token. It should not if blocks may run out: a sequence that ends in this step may free
    enough of them, and then no group has to be preempted.

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
    for group, seq, _, samples in step.decision.sequences:
        if samples and not requests[group.request_id].request.may_run_ahead(seq):
            return False
    return True


def look_ahead(step: LaunchedStep) -> None:
    """Count this step's tokens as being computed, and append the pending tokens."""
    row = 0
    for (_, seq, num_new_tokens, samples), num_rows in zip(
        step.sequences, step.num_rows, strict=True
    ):
        if seq.seq_id not in step.ended:
            seq.num_in_flight += num_new_tokens
            if samples:
                seq.append_pending(row)
        row += num_rows
    step.is_followed = True


def arrive(step: LaunchedStep) -> None:
    """Undo the counting of `look_ahead`: from now on, the tokens are computed."""
    for _, seq, num_new_tokens, _ in step.decision.sequences:
        seq.num_in_flight -= num_new_tokens


def leave_out_ended(step: LaunchedStep, requests: Mapping[str, OpenRequest]) -> None:
    """Leave out what has ended since the launch.

    Args:
        requests: by request id.
    """

    def is_open(group: SequenceGroup) -> bool:
        request = requests.get(group.request_id)
        return request is not None and request.arrival.group is group

    def goes_on(scheduled: ScheduledSequence) -> bool:
        return is_open(scheduled.group) and scheduled.seq in scheduled.group.sequences

    step.ended = {each.seq.seq_id for each in step.sequences if not goes_on(each)}
    step.decision = replace(
        step.decision,
        sequences=tuple(filter(goes_on, step.sequences)),
        ended=tuple(filter(is_open, step.decision.ended)),
    )
