"""Sequences with broken logits end with an error, without effect on other requests.

The last query of a step attends to all keys and values of its sequence, including those that the
step wrote. If one is NaN, so are its logits. The engine therefore computes logits for every chunk
of a prompt, even if it does not sample, and ends broken sequences before the step is committed. No
block with broken numbers ever enters the prefix cache.
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
"""A row that is only checked for broken logits; its token is not used."""


def leave_out_broken(
    decision: SchedulerOutput,
    broken: Broken,
    requests: Mapping[str, OpenRequest],
    scheduler: Scheduler,
) -> SchedulerOutput:
    """Return the decision without broken sequences; the engine commits the rest.

    A sequence that samples ends when its request takes the sampled tokens. A broken chunk of a
    prompt, or of a recomputation, ends its whole request, whose sequences share the chunk.

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
