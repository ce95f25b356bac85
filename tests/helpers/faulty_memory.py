"""Allocators, block managers and prefix caches with deliberate faults, which tests must catch."""

from minipaged.memory import (
    BlockAllocator,
    BlockManager,
    BlockTable,
    PrefixCache,
)


class LeaksAReference(BlockAllocator):
    def free(self, block: int) -> None:
        if self.ref_count(block) != 2:
            super().free(block)


class NeverReturnsABlock(BlockAllocator):
    def free(self, block: int) -> None:
        super().free(block)
        if self.ref_count(block) == 0 and block == 1:
            self._free.remove(block)


class HandsOutABlockTwice(BlockAllocator):
    def allocate(self) -> int:
        block = super().allocate()
        if block == 2:
            self._free.append(block)
        return block


class WritesIntoSharedBlocks(BlockManager):
    """No copy-on-write."""

    def append(self, seq):
        table = self._tables[seq.seq_id]
        while len(table) < self._blocks_for(seq.num_tokens):
            table.blocks.append(self._pool.allocate())
        table.num_tokens = seq.num_tokens
        return []


class ForgetsTheCopy(BlockManager):
    """Repoints the table, but returns no copy of the block."""

    def append(self, seq):
        super().append(seq)
        return []


class CopiesTheWrongWay(BlockManager):
    def append(self, seq):
        return [(target, source) for source, target in super().append(seq)]


class SharesTheTableItself(BlockManager):
    def fork(self, parent, child):
        super().fork(parent, child)
        self._tables[child.seq_id] = self._tables[parent.seq_id]


class ForksWithoutCounting(BlockManager):
    def fork(self, parent, child):
        self._tables[child.seq_id] = self._tables[parent.seq_id].beginning(
            child.num_computed_tokens
        )


class LosesSharingInTheSwap(BlockManager):
    def _move(self, group, source, target, there):
        pairs = []
        for seq in group.sequences:
            table = self._tables[seq.seq_id]
            for logical, block in enumerate(table.blocks):
                table.blocks[logical] = target.allocate()
                source.free(block)
                pairs.append((block, table.blocks[logical]))
        return pairs


class FreesIntoTheWrongPool(BlockManager):
    def _pool_of(self, seq):
        return self._pool


class KeepsAFreedTable(BlockManager):
    def free(self, seq):
        for block in self._tables[seq.seq_id].blocks:
            self._pool_of(seq).free(block)


class AllocatesOneBlockTooFew(BlockManager):
    def _blocks_for(self, num_tokens):
        return max(1, num_tokens // self.block_size)


class WrongSlot(BlockTable):
    """Two tokens of a block change places, as long as the block is not full."""

    def slot(self, position):
        slot = super().slot(position)
        return slot ^ 1 if self.block_size % 2 == 0 and self.num_tokens % 2 else slot


class LooksIntoTheWrongSlot(BlockManager):
    def append(self, seq):
        pairs = super().append(seq)
        self._tables[seq.seq_id].__class__ = WrongSlot
        return pairs


class FreesParentsBeforeChildren(BlockManager):
    def free(self, seq):
        self._tables[seq.seq_id].blocks.reverse()
        super().free(seq)


class LetsUnwrittenBlocksBeFound(BlockManager):
    """The same prompt twice in one step: the second would read what is not there yet."""

    def append(self, seq):
        pairs = super().append(seq)
        computed, seq.num_computed_tokens = seq.num_computed_tokens, seq.num_tokens
        self.cache_blocks(seq)
        seq.num_computed_tokens = computed
        return pairs


class ForgetsThatACopyIsNotPublished(BlockManager):
    def append(self, seq):
        published = self._tables[seq.seq_id].num_cached_blocks
        pairs = super().append(seq)
        self._tables[seq.seq_id].num_cached_blocks = published
        return pairs


class ForgetsThatASwapUnpublishes(BlockManager):
    def _move(self, group, source, target, there):
        published = {s.seq_id: self._tables[s.seq_id].num_cached_blocks for s in group.sequences}
        pairs = super()._move(group, source, target, there)
        for seq_id, number in published.items():
            self._tables[seq_id].num_cached_blocks = max(
                number, self._tables[seq_id].num_cached_blocks
            )
            self._was = published
        return pairs

    def swap_in(self, group):
        pairs = super().swap_in(group)
        for seq in group.sequences:
            table = self._tables[seq.seq_id]
            table.num_cached_blocks = seq.num_computed_tokens // self.block_size
        return pairs


class ComputesNotEvenTheLastToken(BlockManager):
    def _num_cached_of(self, seq, cached):
        return len(cached) * self.block_size


class PinsWithoutOwning(BlockManager):
    def pin(self, seq):
        num_tokens = super().pin(seq)
        for block in reversed(self._tables[seq.seq_id].blocks):
            self._pool.free(block)
        return num_tokens


class StaleIndex(PrefixCache):
    """An evicted block can still be found."""

    def _evict(self):
        block, _ = self._idle.popitem(last=False)
        self._keys.pop(block)
        self._allocator.free(block)


class ListsWhatItDoesNotOwn(PrefixCache):
    """A block goes back to the allocator and can be found all the same."""

    def cache_blocks(self, seq, table):
        published = super().cache_blocks(seq, table)
        for block in published:
            self._allocator.free(block)
        return published


class LooksAtTheBlocksOwnTokensOnly(PrefixCache):
    def _key(self, seq, blocks, logical):
        return None, super()._key(seq, blocks, logical)[1]


class IgnoresTheSalt(PrefixCache):
    def _key(self, seq, blocks, logical):
        parent, tokens = super()._key(seq, blocks, logical)
        return parent if logical else None, tokens


class EvictsTheNewestFirst(PrefixCache):
    def evict_candidate(self):
        return next(reversed(self._idle))

    def is_leaf(self, block):
        return True  # or the cache would refuse it at once


class LeavesASharedBlockIdle(PrefixCache):
    def share(self, block):
        self._allocator.share(block)


class FindsWithoutSharing(PrefixCache):
    def share_cached(self, seq):
        table = super().share_cached(seq)
        for block in reversed(table.blocks):
            self.free(block)
        return table


class PublishesAPartialBlock(PrefixCache):
    def cache_blocks(self, seq, table):
        computed = seq.num_computed_tokens
        seq.num_computed_tokens = min(computed + self._block_size - 1, seq.num_tokens)
        published = super().cache_blocks(seq, table)
        seq.num_computed_tokens = computed
        return published


ALLOCATORS = [LeaksAReference, NeverReturnsABlock, HandsOutABlockTwice]


MANAGERS = [
    WritesIntoSharedBlocks, ForgetsTheCopy, CopiesTheWrongWay, SharesTheTableItself,
    ForksWithoutCounting, LosesSharingInTheSwap, FreesIntoTheWrongPool, KeepsAFreedTable,
    AllocatesOneBlockTooFew, LooksIntoTheWrongSlot, FreesParentsBeforeChildren,
    LetsUnwrittenBlocksBeFound,
    ForgetsThatACopyIsNotPublished, ForgetsThatASwapUnpublishes, ComputesNotEvenTheLastToken,
    PinsWithoutOwning,
]  # fmt: skip


CACHES = [
    StaleIndex, ListsWhatItDoesNotOwn, LooksAtTheBlocksOwnTokensOnly, IgnoresTheSalt,
    EvictsTheNewestFirst, LeavesASharedBlockIdle, FindsWithoutSharing, PublishesAPartialBlock,
]  # fmt: skip


def with_cache(fault: type[PrefixCache]) -> type[BlockManager]:
    class Manager(BlockManager):
        def __init__(self, **options):
            super().__init__(**options)
            self._pool.__class__ = fault

    return Manager
