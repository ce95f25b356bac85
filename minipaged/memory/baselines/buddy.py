"""A buddy allocator: contiguous regions of blocks whose sizes are powers of two (section 6.1).

The paper gives this allocator to its baselines, which store a request's keys and values
contiguously. A region is split in halves until it is just large enough, and two halves are joined
again once both are free. The buddy of a region of size `s` at `a`, its other half, is at `a XOR s`.
"""

from minipaged.errors import DoubleFree, InvalidOption


class BuddyAllocator:
    """Allocates regions from a pool, whose own size need not be a power of two.

    The pool starts as regions of the longest size, then one of the largest size that fits into the
    rest, and so on: 983 blocks in regions of at most 128 are 7 x 128 + 64 + 16 + 4 + 2 + 1.
    """

    def __init__(self, num_blocks: int, longest: int) -> None:
        """Raises InvalidOption if `longest` is not a power of two, or the pool is empty."""
        if longest < 1 or longest & (longest - 1) or num_blocks < 1:
            raise InvalidOption(
                f"a pool of {num_blocks} blocks in regions of at most {longest}: give at least one "
                "block, and a power of two for the longest region."
            )
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._longest = longest
        # The first blocks of free regions, by size; dictionaries, for their order and fast removal.
        self._free: dict[int, dict[int, None]] = {1 << i: {} for i in range(longest.bit_length())}
        start, size = 0, longest
        while size >= 1:
            if start + size <= num_blocks:
                self._free[size][start] = None
                start += size
            else:
                size //= 2
        self._num_at_start = {size: len(starts) for size, starts in self._free.items()}
        self._owned: set[range] = set()

    def rounded(self, num_blocks: int) -> int:
        """The size of the region that `num_blocks` blocks get."""
        return 1 << (num_blocks - 1).bit_length()

    def max_regions(self, num_blocks: int) -> int:
        """The number of regions of at least `num_blocks` blocks that fit in an empty pool."""
        size = self.rounded(num_blocks)
        return sum(n * (large // size) for large, n in self._num_at_start.items())

    def num_free_regions(self, num_blocks: int) -> int:
        """The number of regions of at least `num_blocks` blocks that are free now."""
        size = self.rounded(num_blocks)
        return sum(len(starts) * (large // size) for large, starts in self._free.items())

    def allocate(self, num_blocks: int) -> range | None:
        """A region of at least `num_blocks` blocks, from the smallest free one; None if full."""
        size = found = self.rounded(num_blocks)
        while found <= self._longest and not self._free[found]:
            found *= 2
        if found > self._longest:
            return None
        start, _ = self._free[found].popitem()  # the one freed last
        while found > size:
            found //= 2
            self._free[found][start + found] = None  # the upper half stays free
        region = range(start, start + size)
        self._owned.add(region)
        self.num_free -= size
        return region

    def free(self, region: range) -> None:
        """Free a region, and join it with its buddy while that is free too. Raises DoubleFree."""
        if region not in self._owned:
            raise DoubleFree(f"the region {region} has no owner, so it cannot be freed.")
        self._owned.remove(region)
        self.num_free += len(region)
        start, size = region.start, len(region)
        while size < self._longest and (buddy := start ^ size) in self._free[size]:
            del self._free[size][buddy]
            start, size = min(start, buddy), size * 2
        self._free[size][start] = None
