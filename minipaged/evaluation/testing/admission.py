"""Admission to a memory as by a scheduler, for tests without one."""

from minipaged.memory import BlockPair, Memory
from minipaged.sequence import SequenceGroup


def admit(memory: Memory, group: SequenceGroup) -> list[BlockPair]:
    """Allocate a group's blocks, count cached tokens as computed, and return the copies to make."""
    num_cached_tokens, copies = memory.admit(group)
    for seq, cached in zip(group.sequences, num_cached_tokens, strict=True):
        seq.mark_cached(cached)
    return copies
