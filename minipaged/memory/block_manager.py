"""Manages the blocks of all sequences: admit, append, fork, copy-on-write, swap, free.

The block manager never touches a tensor. If keys and values must move (copy-on-write, swapping), it
returns (source, destination) pairs of blocks, and the runner copies them before the step's
attention reads anything. Section numbers are the paper's.
"""

from collections import Counter
from collections.abc import Callable, Mapping

from minipaged.memory.allocator import Allocator, BlockAllocator
from minipaged.memory.block_table import BlockTable
from minipaged.memory.interface import Admission, BlockPair, MemoryUsage, explain_lack_of_pages
from minipaged.memory.prefix_cache import CacheKey, PrefixCache
from minipaged.sequence import Sequence, SequenceGroup


class BlockManager:
    """Paged memory over two pools of blocks: the pool that attention reads, and the swap pool."""

    reserves = False  # a sequence has the blocks of its tokens, and no others

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_swap_blocks: int = 0,
        watermark_blocks: int = 0,
        allocator: Callable[[int], Allocator] = BlockAllocator,
        enable_prefix_caching: bool = False,
        prefix_cache: Callable[..., PrefixCache] = PrefixCache,
    ) -> None:
        self.block_size = block_size
        self._watermark_blocks = watermark_blocks
        self._is_caching = enable_prefix_caching
        self._pool = prefix_cache(allocator(num_blocks), block_size, enable_prefix_caching)
        self._swap_pool = allocator(num_swap_blocks)
        self._tables: dict[int, BlockTable] = {}  # by sequence id
        self.tables: Mapping[int, BlockTable] = self._tables  # the public, read-only view
        self._swapped: set[int] = set()  # sequences whose table refers to the swap pool
        self._pinned: set[int] = set()  # pinned prefixes, by sequence id

    # ---- admission -----------------------------------------------------------------------------

    def fits(self, group: SequenceGroup) -> bool:
        """Return whether the group's next step fits if only pinned prefixes stay in the pool."""
        staying = Counter(b for seq_id in self._pinned for b in self._tables[seq_id].blocks)
        claimed, new = self._claim(group, lambda block: staying[block])
        return len(claimed | staying.keys()) + new <= self.num_blocks

    explain_rejection = explain_lack_of_pages

    def can_admit(self, group: SequenceGroup, alone: bool) -> bool:
        """Return whether enough blocks are free for a waiting or swapped group.

        Unless it is alone, the watermark must stay free as well. The watermark, vLLM's addition to
        the paper, reserves blocks that running groups will soon need.
        """
        shared, new = self._claim(group, self._pool.ref_count)
        idle = sum(self._pool.ref_count(block) == 0 for block in shared)  # counted as free so far
        watermark = 0 if alone else self._watermark_blocks
        return self.num_free - new - idle >= watermark

    def admit(self, group: SequenceGroup) -> Admission:
        """Give every sequence of a waiting group the blocks for its present tokens.

        Cached blocks are shared, the others are new. None are reserved for later tokens: reserving
        by `max_tokens` is the waste that the paper removes (section 3.1).
        """
        num_cached: list[int] = []
        for seq in group.sequences:
            assert seq.seq_id not in self._tables, f"sequence {seq.seq_id} was already admitted"
            table = self._tables[seq.seq_id] = self._pool.share_cached(seq)
            table.num_tokens = self._num_cached_of(seq, table.blocks)
            num_cached.append(table.num_tokens)
        copies = [pair for seq in group.sequences for pair in self.append(seq)]
        return Admission(num_cached, copies)

    # ---- growing -------------------------------------------------------------------------------

    def can_append(self, group: SequenceGroup) -> bool:
        """Return whether enough blocks are free for the tokens of the next step."""
        for seq in group.sequences:
            blocks = self._tables[seq.seq_id].blocks
            is_full = len(seq.token_ids) > len(blocks) * self.block_size
            if is_full or self._pool.ref_count(blocks[-1]) > 1:
                return self._growth(group, self._pool.ref_count) <= self._pool.num_free
        return True  # the usual case: each sequence writes to a last block that it owns alone

    def append(self, seq: Sequence) -> list[BlockPair]:
        """Give each token without a slot a slot, in blocks that the sequence owns alone.

        Returns the copies to make first: if a block to be written has other owners, it is copied,
        and the sequence then owns the copy (section 4.4, copy-on-write). Raises OutOfBlocks if the
        pool runs out; call `can_append` first.
        """
        table = self._tables[seq.seq_id]
        pairs: list[BlockPair] = []
        first_written = table.num_tokens // self.block_size
        for logical in range(first_written, self._blocks_for(len(seq.token_ids))):
            if logical == len(table.blocks):
                table.blocks.append(self._pool.allocate())
            elif self._pool.ref_count(old := table.blocks[logical]) > 1:
                table.blocks[logical] = self._pool.allocate()
                self._pool.free(old)
                # The copy is not cached, so no block after it is.
                table.num_cached_blocks = min(table.num_cached_blocks, logical)
                pairs.append((old, table.blocks[logical]))
        table.num_tokens = len(seq.token_ids)
        return pairs

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let a child share its parent's blocks (section 4.4). Takes no free block.

        The child shares the blocks of its computed tokens: all of them, if it begins as a copy.
        """
        table = self._tables[parent.seq_id].beginning(child.num_computed_tokens)
        for block in table.blocks:
            self._pool_of(parent).share(block)
        self._tables[child.seq_id] = table
        if parent.seq_id in self._swapped:
            self._swapped.add(child.seq_id)

    def free(self, seq: Sequence) -> None:
        """Free a sequence's blocks; those with other owners stay."""
        pool = self._pool_of(seq)
        for block in reversed(self._tables.pop(seq.seq_id).blocks):  # children before parents
            pool.free(block)
        self._swapped.discard(seq.seq_id)
        self._pinned.discard(seq.seq_id)

    # ---- prefixes (section 4.4, shared prefix) ---------------------------------------------------

    def num_cached_tokens(self, seq: Sequence) -> int:
        """Return how many first tokens of a waiting sequence need not be computed.

        The last one is never counted: its logits are needed. If all are cached, the last token's
        keys are written again, with the same values; if others own the block, to a copy of it.
        """
        return self._num_cached_of(seq, self._pool.find(seq))

    def _num_cached_of(self, seq: Sequence, cached: list[int]) -> int:
        return min(len(cached) * self.block_size, seq.num_tokens - 1)

    def cache_blocks(self, seq: Sequence) -> list[int]:
        """Cache the sequence's full blocks; returns the newly cached ones.

        Call it after a step, when keys and values of `num_computed_tokens` are written.
        """
        table = self._tables[seq.seq_id]
        has_new = seq.num_computed_tokens // self.block_size > table.num_cached_blocks
        return self._pool.cache_blocks(seq, table) if has_new and self._is_caching else []

    def pin(self, seq: Sequence) -> int:
        """Own all cached blocks of a prefix until it is freed (the paper's predefined prefix);
        returns how many tokens they hold."""
        table = self._tables[seq.seq_id] = self._pool.share_cached(seq)
        self._pinned.add(seq.seq_id)
        return table.num_tokens

    # ---- swapping (section 4.5) ----------------------------------------------------------------

    def can_swap_out(self, group: SequenceGroup) -> bool:
        """Return whether the swap pool has room for all blocks of the group."""
        return self._swap_pool.num_free >= self.num_distinct_blocks(group)

    def swap_out(self, group: SequenceGroup) -> list[BlockPair]:
        """Move the group to the swap pool; returns (pool block, swap block) pairs to copy."""
        self._swapped.update(s.seq_id for s in group.sequences)
        return self._move(group, self._pool, self._swap_pool, {})

    def swap_in(self, group: SequenceGroup) -> list[BlockPair]:
        """Move the group back to the pool; returns (swap block, pool block) pairs to copy.

        Blocks that are still cached are shared again and need no copy.
        """
        cached = self._still_cached(group)
        for block in cached.values():
            self._pool.share(block)  # so that an allocation below does not evict it
        pairs = self._move(group, self._swap_pool, self._pool, cached)
        for block in cached.values():
            self._pool.free(block)
        self._swapped.difference_update(s.seq_id for s in group.sequences)
        return pairs

    def _move(
        self, group: SequenceGroup, source: Allocator, target: Allocator, cached: dict[int, int]
    ) -> list[BlockPair]:
        """Move each block once, even if several sequences share it; `cached` ones stay."""
        moved = cached.copy()  # from old to new block, which preserves sharing
        pairs: list[BlockPair] = []
        for seq in group.sequences:
            table = self._tables[seq.seq_id]
            old, table.blocks = table.blocks, []
            for block in old:
                if block in moved:
                    target.share(moved[block])
                else:
                    moved[block] = target.allocate()
                    pairs.append((block, moved[block]))
                table.blocks.append(moved[block])
            for block in reversed(old):  # children before parents
                source.free(block)
            table.num_cached_blocks = sum(block in cached for block in old)
        return pairs

    def _still_cached(self, group: SequenceGroup) -> dict[int, int]:
        """Map each swap block to the cached block of the pool with the same content."""
        cached: dict[int, int] = {}
        for seq in group.sequences:
            num_full = seq.num_computed_tokens // self.block_size
            swapped = self._tables[seq.seq_id].blocks[:num_full]
            cached.update(zip(swapped, self._pool.find(seq), strict=False))
        return cached

    # ---- read-only views ------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_free(self) -> int:
        """The number of blocks that no sequence owns, including those in the prefix cache."""
        return self._pool.num_free

    @property
    def num_swap_blocks(self) -> int:
        return self._swap_pool.num_blocks

    @property
    def num_free_swap_blocks(self) -> int:
        return self._swap_pool.num_free

    @property
    def cached(self) -> Mapping[int, CacheKey]:
        """The key of each cached block of the pool; read-only."""
        return self._pool.cached

    def is_swapped(self, seq_id: int) -> bool:
        """Return whether this sequence's block table refers to the swap pool."""
        return seq_id in self._swapped

    def ref_count(self, block: int) -> int:
        """Return how many sequences own this block of the pool."""
        return self._pool.ref_count(block)

    def swap_ref_count(self, block: int) -> int:
        """Return how many sequences own this block of the swap pool."""
        return self._swap_pool.ref_count(block)

    def num_distinct_blocks(self, group: SequenceGroup) -> int:
        """Return how many blocks the group holds, counting a shared one once."""
        return len({b for s in group.sequences for b in self._tables[s.seq_id].blocks})

    def usage(self) -> MemoryUsage:
        """Count the pool's slots by the categories of the paper's Figure 2."""
        return MemoryUsage.of_pages(self)

    # ---- arithmetic ----------------------------------------------------------------------------

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)  # rounded up

    def _pool_of(self, seq: Sequence) -> Allocator:
        return self._swap_pool if seq.seq_id in self._swapped else self._pool

    def _blocks_of(self, seq: Sequence) -> list[int]:
        """Return the blocks of a sequence; for a waiting one, its cached blocks."""
        table = self._tables.get(seq.seq_id)
        return self._pool.find(seq) if table is None else table.blocks

    def _growth(self, group: SequenceGroup, num_owners: Callable[[int], int]) -> int:
        """Return the exact number of blocks that `append` will take for the whole group.

        If two forks write to a shared block, the first gets a copy and the second keeps it.
        """
        growth = 0
        written: dict[int, int] = {}  # by block: how many of the group's sequences write to it
        for seq in group.sequences:
            table, blocks = self._tables.get(seq.seq_id), self._blocks_of(seq)
            filled = self._num_cached_of(seq, blocks) if table is None else table.num_tokens
            growth += max(0, self._blocks_for(len(seq.token_ids)) - len(blocks))
            for block in blocks[filled // self.block_size :]:
                written[block] = written.get(block, 0) + 1
        for block, num_writers in written.items():
            growth += min(num_writers, num_owners(block) - 1)
        return growth

    def _claim(self, group: SequenceGroup, others: Callable[[int], int]) -> tuple[set[int], int]:
        """Return the pool blocks that a group holds or will share, and how many more it will take.

        `others` returns how many owners outside the group a block of the pool has.
        """
        own = Counter(block for seq in group.sequences for block in self._blocks_of(seq))
        if group.sequences[0].seq_id not in self._swapped:
            return set(own), self._growth(group, lambda block: own[block] + others(block))
        known = self._still_cached(group)
        growth = self._growth(group, lambda block: own[block])
        return set(known.values()), len(own) - len(known) + growth
