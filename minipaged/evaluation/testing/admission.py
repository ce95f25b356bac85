"""Admission to a memory as a scheduler does it, for whatever has no scheduler."""

from minipaged.memory import BlockPair, Memory
from minipaged.sequence import SequenceGroup


def admit(memory: Memory, group: SequenceGroup) -> list[BlockPair]:
    """Give a group its blocks, and count what is cached as computed; returns the copies to make."""
    num_cached_tokens, copies = memory.admit(group)
    for seq, cached in zip(group.sequences, num_cached_tokens, strict=True):
        seq.mark_cached(cached)
    return copies
