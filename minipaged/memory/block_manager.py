"""Which sequence owns which blocks: admit, append, fork, copy-on-write, swap, free.

The block manager plans and never touches a tensor. Where keys and values must move (copy-on-write,
swapping) it returns (source, destination) pairs of blocks, and the runner copies them before the
step's attention reads anything. Section numbers are the paper's.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from minipaged.memory.allocator import Allocator, BlockAllocator
from minipaged.memory.block_table import BlockTable
from minipaged.sequence import Sequence, SequenceGroup

BlockPair = tuple[int, int]  # copy the first block into the second


@dataclass(frozen=True)
class MemoryUsage:
    """Token slots of the pool by the categories of the paper's Figure 2; they add up to `total`.

    used      hold a token of some sequence (a slot that several sequences share counts once)
    reserved  kept for tokens that a sequence is known to generate; always 0 with paging
    internal  inside an owned block but never needed, or not yet: the tail of a last block
    external  free, but in pieces too small to be used; always 0, for all blocks are alike
    free      in blocks that nobody owns (the figure counts these to "external & others")
    """

    used: int
    reserved: int
    internal: int
    external: int
    free: int

    @property
    def total(self) -> int:
        return self.used + self.reserved + self.internal + self.external + self.free


class Memory(Protocol):
    """The role `memory`: what the scheduler may ask and do. See `BlockManager` for each."""

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
    def blocks_needed(self, group: SequenceGroup) -> int: ...
    def can_admit(self, group: SequenceGroup, alone: bool) -> bool: ...
    def admit(self, group: SequenceGroup) -> None: ...
    def can_append(self, group: SequenceGroup) -> bool: ...
    def append(self, seq: Sequence) -> list[BlockPair]: ...
    def fork(self, parent: Sequence, child: Sequence) -> None: ...
    def free(self, seq: Sequence) -> None: ...
    def can_swap_out(self, group: SequenceGroup) -> bool: ...
    def swap_out(self, group: SequenceGroup) -> list[BlockPair]: ...
    def can_swap_in(self, group: SequenceGroup, alone: bool) -> bool: ...
    def swap_in(self, group: SequenceGroup) -> list[BlockPair]: ...
    def is_swapped(self, seq_id: int) -> bool: ...
    def block_table(self, seq_id: int) -> BlockTable: ...
    def ref_count(self, block: int) -> int: ...
    def swap_ref_count(self, block: int) -> int: ...
    def usage(self) -> MemoryUsage: ...


class BlockManager:
    """Paged memory over two pools of blocks: the pool that attention reads, and the swap pool."""

    def __init__(
        self,
        num_blocks: int,
        num_swap_blocks: int = 0,
        block_size: int = 16,
        watermark_blocks: int = 0,
        allocator: Callable[[int], Allocator] = BlockAllocator,
    ) -> None:
        self.block_size = block_size
        self._watermark_blocks = watermark_blocks
        self._pool = allocator(num_blocks)
        self._swap_pool = allocator(num_swap_blocks)
        self._tables: dict[int, BlockTable] = {}  # by sequence id
        self._swapped: set[int] = set()  # the sequences whose table speaks of the swap pool

    # ---- admission -----------------------------------------------------------------------------

    def blocks_needed(self, group: SequenceGroup) -> int:
        """Blocks of the pool that the group would hold if it took part in the next step."""
        return len(self._unique_blocks(group)) + self._growth(group)

    def can_admit(self, group: SequenceGroup, alone: bool) -> bool:
        """Whether a waiting group's blocks are free, beyond the watermark unless it is alone.

        The watermark, vLLM's addition to the paper, keeps newcomers from taking the blocks that
        those who run will soon need. A group that would have the pool to itself takes nobody's.
        """
        watermark = 0 if alone else self._watermark_blocks
        return self._pool.num_free - self.blocks_needed(group) >= watermark

    def admit(self, group: SequenceGroup) -> None:
        """Give every sequence of a waiting group the blocks of the tokens it has, and no more.

        Never those of the tokens it may come to have: reserving by `max_tokens` is the very waste
        that the paper removes (section 3.1).
        """
        for seq in group.unfinished:
            assert seq.seq_id not in self._tables, f"sequence {seq.seq_id} is admitted already"
            self._tables[seq.seq_id] = BlockTable(self.block_size, [], 0)
            self.append(seq)

    # ---- growing -------------------------------------------------------------------------------

    def can_append(self, group: SequenceGroup) -> bool:
        """Whether the blocks are free that the next step's new tokens need."""
        return self._pool.num_free >= self._growth(group)

    def append(self, seq: Sequence) -> list[BlockPair]:
        """Make the sequence ready to be written to: a slot for each token, in a block of its own.

        Returns the copies to make first: a block that is about to be written and has other owners
        is copied, and the sequence then owns the copy (section 4.4, copy-on-write). Raises
        OutOfBlocks if the pool runs out; `can_append` tells beforehand.
        """
        table = self._tables[seq.seq_id]
        pairs: list[BlockPair] = []
        first_written = seq.num_computed_tokens // self.block_size
        for logical in range(first_written, self._blocks_for(seq.num_tokens)):
            if logical == len(table):
                table.blocks.append(self._pool.allocate())
            elif self._pool.ref_count(shared := table.blocks[logical]) > 1:
                table.blocks[logical] = self._pool.allocate()
                self._pool.free(shared)
                pairs.append((shared, table.blocks[logical]))
        table.num_tokens = seq.num_tokens
        return pairs

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let a child share all blocks of its parent (section 4.4). Takes no free block."""
        table = self._tables[parent.seq_id]
        for block in table.blocks:
            self._pool_of(parent).share(block)
        self._tables[child.seq_id] = table.copy()
        if parent.seq_id in self._swapped:
            self._swapped.add(child.seq_id)

    def free(self, seq: Sequence) -> None:
        """Let go of a sequence's blocks; those without another owner become free."""
        pool = self._pool_of(seq)
        for block in self._tables.pop(seq.seq_id).blocks:
            pool.free(block)
        self._swapped.discard(seq.seq_id)

    # ---- swapping (section 4.5) ----------------------------------------------------------------

    def can_swap_out(self, group: SequenceGroup) -> bool:
        """Whether the swap pool has room for all blocks of the group."""
        return self._swap_pool.num_free >= len(self._unique_blocks(group))

    def swap_out(self, group: SequenceGroup) -> list[BlockPair]:
        """Move the group to the swap pool; returns (pool block, swap block) pairs to copy."""
        pairs = self._move(group, self._pool, self._swap_pool)
        self._swapped.update(s.seq_id for s in group.unfinished)
        return pairs

    def can_swap_in(self, group: SequenceGroup, alone: bool) -> bool:
        """Whether a swapped group fits, together with the blocks that its next step needs.

        Blocks are blocks: the question is the one that is asked of a newcomer.
        """
        return self.can_admit(group, alone)

    def swap_in(self, group: SequenceGroup) -> list[BlockPair]:
        """Move the group back to the pool; returns (swap block, pool block) pairs to copy."""
        pairs = self._move(group, self._swap_pool, self._pool)
        self._swapped.difference_update(s.seq_id for s in group.unfinished)
        return pairs

    def _move(self, group: SequenceGroup, source: Allocator, target: Allocator) -> list[BlockPair]:
        # Each block moves once, however many sequences share it: the map keeps the sharing.
        moved: dict[int, int] = {}
        for seq in group.unfinished:
            table = self._tables[seq.seq_id]
            for logical, block in enumerate(table.blocks):
                if block in moved:
                    target.share(moved[block])
                else:
                    moved[block] = target.allocate()
                source.free(block)
                table.blocks[logical] = moved[block]
        return list(moved.items())

    # ---- what others may know ------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def num_swap_blocks(self) -> int:
        return self._swap_pool.num_blocks

    @property
    def num_free_swap_blocks(self) -> int:
        return self._swap_pool.num_free

    @property
    def tables(self) -> Mapping[int, BlockTable]:
        """The block tables of all sequences that hold blocks, by sequence id; to be read only."""
        return MappingProxyType(self._tables)

    def block_table(self, seq_id: int) -> BlockTable:
        return self._tables[seq_id]

    def is_swapped(self, seq_id: int) -> bool:
        """Whether this sequence's block table speaks of the swap pool."""
        return seq_id in self._swapped

    def ref_count(self, block: int) -> int:
        """How many sequences own this block of the pool."""
        return self._pool.ref_count(block)

    def swap_ref_count(self, block: int) -> int:
        """How many sequences own this block of the swap pool."""
        return self._swap_pool.ref_count(block)

    def usage(self) -> MemoryUsage:
        """How the slots of the pool are used, by the categories of the paper's Figure 2."""
        filled: dict[int, int] = {}  # by physical block, so that a shared one counts once
        for seq_id, table in self._tables.items():
            if seq_id not in self._swapped:
                for logical, block in enumerate(table.blocks):
                    filled[block] = table.filled(logical)
        used = sum(filled.values())
        return MemoryUsage(
            used=used,
            reserved=0,
            internal=len(filled) * self.block_size - used,
            external=0,
            free=self._pool.num_free * self.block_size,
        )

    # ---- arithmetic ----------------------------------------------------------------------------

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)  # rounded up

    def _pool_of(self, seq: Sequence) -> Allocator:
        return self._swap_pool if seq.seq_id in self._swapped else self._pool

    def _unique_blocks(self, group: SequenceGroup) -> set[int]:
        tables = (self._tables.get(s.seq_id) for s in group.unfinished)
        return {block for table in tables if table is not None for block in table.blocks}

    def _growth(self, group: SequenceGroup) -> int:
        """Blocks that `append` will take for all sequences of the group together, exactly."""
        missing = 0
        writers = Counter[int]()  # by block: how many of the group are about to write to it
        for seq in group.unfinished:
            table = self._tables.get(seq.seq_id)
            blocks = table.blocks if table is not None else []
            missing += max(0, self._blocks_for(seq.num_tokens) - len(blocks))
            writers.update(blocks[seq.num_computed_tokens // self.block_size :])
        pool = self._pool_of(group.unfinished[0])
        # If all owners of a block write to it, the last one finds itself alone and keeps it.
        return missing + sum(min(n, pool.ref_count(b) - 1) for b, n in writers.items())
