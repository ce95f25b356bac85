"""The role `memory`: what a scheduler may ask of it and do, and what everybody else may look at."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from minipaged.memory.block_table import BlockTable
from minipaged.memory.prefix_cache import CacheKey
from minipaged.sequence import Sequence, SequenceGroup
from minipaged.utils.counts import counted

BlockPair = tuple[int, int]  # copy the first block into the second


class Admission(NamedTuple):
    """What a group got on admission. Its sequences are as they were: the scheduler marks them."""

    num_cached_tokens: list[int]  # per sequence: first tokens that need no computing
    copies: list[BlockPair]  # to carry out first, as `append` returns them


@dataclass(frozen=True)
class MemoryUsage:
    """Token slots of the pool by the categories of the paper's Figure 2; they add up to `total`.

    used      hold a token of some sequence (a slot that several sequences share counts once)
    reserved  kept for tokens that a sequence will still generate; always 0 with paging
    internal  kept for a sequence that will never need them; with paging, the tail of a last block
    external  lost by rounding up to sizes that the allocator has; always 0 with paging
    free      not allocated (the figure counts these in "external & others": where pieces differ in
              size, some are too small for the requests that wait)
    """

    used: int
    reserved: int
    internal: int
    external: int
    free: int

    @property
    def total(self) -> int:
        return self.used + self.reserved + self.internal + self.external + self.free

    @classmethod
    def of_pages(cls, memory: "MemoryView") -> "MemoryUsage":
        """The usage of a memory that takes blocks one by one, as paging does."""
        filled: dict[int, int] = {}  # by physical block, so that a shared one counts once
        for seq_id, table in memory.tables.items():
            if not memory.is_swapped(seq_id):
                for logical, block in enumerate(table.blocks):
                    filled[block] = table.filled(logical)
        used = sum(filled.values())
        return cls(
            used=used,
            reserved=0,
            internal=len(filled) * memory.block_size - used,
            external=0,
            free=memory.num_free * memory.block_size,
        )


def ceil_div(number: int, by: int) -> int:
    """Rounded up, where `//` rounds down."""
    return -(-number // by)


def explain_lack_of_pages(memory: "MemoryView", group: SequenceGroup) -> str:
    """What to change for a waiting group that fits no pool of pages."""
    length, size, has = group.sequences[0].num_tokens, memory.block_size, memory.num_blocks
    needed = ceil_div(length, size)
    if needed > has:
        return (
            f"the prompt needs {counted(needed, 'block')} of {counted(size, 'token')}, the pool "
            f"has {has}. Raise num_blocks to {needed} or shorten the prompt by "
            f"{counted(length - has * size, 'token')}."
        )
    return (
        f"pinned prefixes keep too many of the pool's {counted(has, 'block')} for a prompt of "
        f"{counted(length, 'token')}: raise num_blocks, or release a prefix."
    )


class MemoryView(Protocol):
    """What everything else may read of a memory; nothing can be changed through it."""

    @property
    def block_size(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    @property
    def num_swap_blocks(self) -> int: ...
    @property
    def num_free_swap_blocks(self) -> int: ...
    @property
    def tables(self) -> Mapping[int, BlockTable]: ...
    @property
    def cached(self) -> Mapping[int, CacheKey]: ...
    @property
    def reserves(self) -> bool: ...
    def is_swapped(self, seq_id: int) -> bool: ...
    def ref_count(self, block: int) -> int: ...
    def swap_ref_count(self, block: int) -> int: ...
    def num_distinct_blocks(self, group: SequenceGroup) -> int: ...
    def usage(self) -> MemoryUsage: ...


class Memory(MemoryView, Protocol):
    """What a scheduler needs besides: each call that changes something. See `BlockManager`."""

    def fits(self, group: SequenceGroup) -> bool: ...
    def explain_rejection(self, group: SequenceGroup) -> str: ...
    def num_cached_tokens(self, seq: Sequence) -> int: ...
    def can_admit(self, group: SequenceGroup, alone: bool) -> bool: ...
    def admit(self, group: SequenceGroup) -> Admission: ...
    def can_append(self, group: SequenceGroup) -> bool: ...
    def append(self, seq: Sequence) -> list[BlockPair]: ...
    def fork(self, parent: Sequence, child: Sequence) -> None: ...
    def cache_blocks(self, seq: Sequence) -> list[int]: ...
    def pin(self, seq: Sequence) -> int: ...
    def free(self, seq: Sequence) -> None: ...
    def can_swap_out(self, group: SequenceGroup) -> bool: ...
    def swap_out(self, group: SequenceGroup) -> list[BlockPair]: ...
    def swap_in(self, group: SequenceGroup) -> list[BlockPair]: ...
