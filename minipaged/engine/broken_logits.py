"""Sequences whose logits are broken: they end with an error, and no other request notices.

The last query of a step sees all keys and values of its sequence, those that the step wrote among
them: if one is NaN, so are its logits. So the engine asks for the logits of every chunk of a
prompt, sampled from or not, and what is broken ends before the step is committed: no block with
broken numbers ever enters the prefix cache.
"""

from collections.abc import Mapping
from dataclasses import replace

from minipaged.engine.open_request import Broken, OpenRequest
from minipaged.sampling import SamplingParams
from minipaged.sampling.rows import SamplingRow
from minipaged.scheduler.interface import Scheduler
from minipaged.scheduler.output import SchedulerOutput
from minipaged.sequence import SequenceGroup

CHECK_ONLY = SamplingRow(SamplingParams(temperature=0.0), (), (), seed=0)
"""A row from which no token is wanted, only whether its logits are broken."""


def leave_out_broken(
    decision: SchedulerOutput,
    broken: Broken,
    requests: Mapping[str, OpenRequest],
    scheduler: Scheduler,
) -> SchedulerOutput:
    """The decision without the sequences that are broken; the engine commits the rest.

    A sequence that samples ends when its request takes the sampled tokens. A chunk of a prompt, or
    of what is recomputed, ends its whole request: its other sequences have the chunk in common.

    Args:
        requests: by request id.
    """
    ended: list[SequenceGroup] = []
    for group, seq, num_new_tokens, samples in decision.sequences:
        error = broken.get(seq.seq_id)
        if error is None:
            continue
        request = requests[group.request_id].request
        request.log_error(error, position=seq.num_computed_tokens + num_new_tokens)
        if not samples and group not in ended:
            request.finish_all("error", error)
            scheduler.abort(group)
            ended.append(group)
    healthy = tuple(
        scheduled
        for scheduled in decision.sequences
        if scheduled.seq.seq_id not in broken and scheduled.group not in ended
    )
    return replace(decision, sequences=healthy, ended=(*decision.ended, *ended))
