"""Admission: groups that can never run are rejected, and a prompt may wait for a shared block."""

from collections.abc import Iterable

from minipaged.config import EngineConfig
from minipaged.errors import InvalidRequest, PromptTooLong
from minipaged.memory import Memory
from minipaged.sequence import Sequence, SequenceGroup


def reject_what_can_never_run(group: SequenceGroup, memory: Memory, config: EngineConfig) -> None:
    """Raise PromptTooLong or InvalidRequest for a group that could never run.

    `FCFSScheduler.add` calls it before it queues a group. A group with output is never rejected: it
    ran in a scheduler that was replaced (`LLMEngine.restart`). If the pool can no longer hold it,
    it ends with its present output.
    """
    if group.sequences[0].num_output_tokens > 0:
        return
    length = group.sequences[0].num_tokens
    if length >= config.max_model_len:
        raise PromptTooLong.in_context(length, config.max_model_len)
    if not memory.fits(group):
        raise PromptTooLong(memory.explain_rejection(group))
    if group.num_batch_slots > config.max_num_seqs:
        raise InvalidRequest(
            f"the request asks for {group.num_batch_slots} sequences at once (n, best_of or "
            f"beam_width), but max_num_seqs is {config.max_num_seqs}: ask for fewer, or raise "
            f"max_num_seqs to {group.num_batch_slots}."
        )


def should_wait(
    seq: Sequence, cached: int, running: Iterable[SequenceGroup], block_size: int
) -> bool:
    """Return whether a running group is computing the next block that this prompt needs.

    A block can be found only after it is written. If two equal prompts arrive together, the second
    therefore waits for the first and shares its blocks. The wait is short: the block is written in
    this step, or as soon as earlier prompts leave tokens for it.

    Args:
        cached: number of first tokens of `seq` that are cached.
    """
    stop = (cached // block_size + 1) * block_size
    if cached % block_size or stop > seq.num_tokens:  # all full blocks are cached
        return False
    return any(
        cached <= other.num_computed_tokens < stop <= other.num_tokens
        and other.cache_salt == seq.cache_salt
        and other.token_ids[:stop] == seq.token_ids[:stop]
        for group in running
        for other in group.sequences
    )
