"""The role `memory`: the calls of a scheduler, and the read-only view for all other parts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from minipaged.memory.block_table import BlockTable
from minipaged.memory.prefix_cache import CacheKey
from minipaged.sequence import Sequence, SequenceGroup
from minipaged.utils.counts import counted

BlockPair = tuple[int, int]  # copy the first block into the second


class Admission(NamedTuple):
    """The result of an admission. The scheduler updates the sequences afterwards."""

    num_cached_tokens: list[int]  # per sequence: first tokens that need not be computed
    copies: list[BlockPair]  # to make before the step, as from `append`


@dataclass(frozen=True)
class MemoryUsage:
    """Token slots of the pool by the categories of the paper's Figure 2; the sum is `total`.

    used      hold a token of a sequence (a slot that several sequences share counts once)
    reserved  reserved for tokens that a sequence will still generate; always 0 with paging
    internal  reserved but never needed; with paging, the empty slots of a last block
    external  lost by rounding up to the allocator's sizes; always 0 with paging
    free      not allocated (the figure counts these in "external & others": where pieces differ in
              size, some are too small for the waiting requests)
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
        """Return the usage of a memory that takes blocks one by one, as paging does."""
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
    """Divide and round up."""
    return -(-number // by)


def explain_lack_of_pages(memory: "MemoryView", group: SequenceGroup) -> str:
    """Return what to change if a waiting group does not fit a pool of pages."""
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
    """The read-only view of a memory."""

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
    """The view and the calls of a scheduler that change a memory. See `BlockManager`."""

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
