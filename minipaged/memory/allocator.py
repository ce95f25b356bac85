"""Physical blocks and their reference counts (sections 4.2 and 4.4).

A physical block is a number from 0 to num_blocks - 1; its contents are stored elsewhere. Its
reference count is the number of its owners. It returns to the free list only when the last owner
frees it.
"""

from typing import Protocol

from minipaged.errors import DoubleFree, InvalidOption, OutOfBlocks


class Allocator(Protocol):
    """The role `allocator`: hands out physical blocks and counts their owners, all in O(1)."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    def allocate(self) -> int: ...
    def share(self, block: int) -> None: ...
    def free(self, block: int) -> None: ...
    def ref_count(self, block: int) -> int: ...


class BlockAllocator:
    """A stack of free blocks, with one reference count per block.

    The stack hands out low numbers first, and the most recently freed block before older ones. The
    part of the pool in use therefore stays small and in the processor's cache, unless a prefix
    cache keeps used blocks.
    """

    def __init__(self, num_blocks: int) -> None:
        """Raises InvalidOption for a pool of fewer than 0 blocks."""
        if num_blocks < 0:
            raise InvalidOption(f"a pool of {num_blocks} blocks is impossible: give 0 or more.")
        self.num_blocks = num_blocks
        self._free = list(reversed(range(num_blocks)))
        self._ref_counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """The number of blocks without owners."""
        return len(self._free)

    def allocate(self) -> int:
        """Take a free block; the caller is its only owner. Raises OutOfBlocks if none is free."""
        if not self._free:
            raise OutOfBlocks(
                f"no free block is left in a pool of {self.num_blocks}: free one first."
            )
        block = self._free.pop()
        self._ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add an owner. Raises DoubleFree if the block has no owner."""
        if not self._is_owned(block):
            raise DoubleFree(f"block {block} has no owner, so it cannot be shared.")
        self._ref_counts[block] += 1

    def free(self, block: int) -> None:
        """Remove one owner; the block is free without owners. Raises DoubleFree if it has none."""
        if not self._is_owned(block):
            raise DoubleFree(f"block {block} has no owner, so it cannot be freed again.")
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            self._free.append(block)

    def ref_count(self, block: int) -> int:
        """Return the number of owners of a block; 0 means free."""
        return self._ref_counts[block]

    def _is_owned(self, block: int) -> bool:
        """Whether this is a block of the pool and has an owner. (-1 would index the last block.)"""
        return 0 <= block < self.num_blocks and self._ref_counts[block] > 0
