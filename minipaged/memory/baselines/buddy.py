"""A buddy allocator: contiguous runs of blocks whose sizes are powers of two (section 6.1).

The paper gives its rivals this allocator, for a system that wants a request's keys and values side
by side. A run is split in halves until it is just large enough, and two halves that are free again
become one. Half `a` of a run of size `2 * s` has its other half, its buddy, at `a XOR s`.
"""

from minipaged.errors import DoubleFree, InvalidOption


class BuddyAllocator:
    """Runs out of a pool that need be no power of two.

    The pool is laid out as so many runs of the longest size as fit, then one of half of that, and
    so on: 983 blocks with runs of at most 128 are 7 x 128 + 64 + 16 + 4 + 2 + 1.
    """

    def __init__(self, num_blocks: int, longest: int) -> None:
        """Raises InvalidOption if the longest run is no power of two, or no pool is there."""
        if longest < 1 or longest & (longest - 1) or num_blocks < 1:
            raise InvalidOption(
                f"a pool of {num_blocks} blocks in runs of at most {longest}: give at least one "
                "block, and a power of two."
            )
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._longest = longest
        # By size, the first blocks of free runs; a dictionary, for its order and quick removal.
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
        """The size of the run that so many blocks get."""
        return 1 << (num_blocks - 1).bit_length()

    def most_runs(self, num_blocks: int) -> int:
        """How many runs for so many blocks each the pool holds when it is empty."""
        size = self.rounded(num_blocks)
        return sum(n * (large // size) for large, n in self._num_at_start.items())

    def num_runs(self, num_blocks: int) -> int:
        """How many runs for so many blocks each are free now."""
        size = self.rounded(num_blocks)
        return sum(len(starts) * (large // size) for large, starts in self._free.items())

    def allocate(self, num_blocks: int) -> range | None:
        """A run of at least so many blocks, from the smallest free one; None if none is left."""
        size = found = self.rounded(num_blocks)
        while found <= self._longest and not self._free[found]:
            found *= 2
        if found > self._longest:
            return None
        start, _ = self._free[found].popitem()  # the one that was freed last
        while found > size:
            found //= 2
            self._free[found][start + found] = None  # the upper half stays free
        run = range(start, start + size)
        self._owned.add(run)
        self.num_free -= size
        return run

    def free(self, run: range) -> None:
        """Give a run back, and join it with its buddy as often as that is free. DoubleFree."""
        if run not in self._owned:
            raise DoubleFree(f"the run {run} has no owner, so it cannot be freed.")
        self._owned.remove(run)
        self.num_free += len(run)
        start, size = run.start, len(run)
        while size < self._longest and (buddy := start ^ size) in self._free[size]:
            del self._free[size][buddy]
            start, size = min(start, buddy), size * 2
        self._free[size][start] = None
