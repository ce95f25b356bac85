"""Lab 1: classic mistakes, each with the task that it must cost points; and unusual right ones."""

BEGINNING = """
import heapq
from minipaged.errors import DoubleFree, InvalidOption, OutOfBlocks
from minipaged.memory.allocator import BlockAllocator as Library
"""

WRONG = {
    "one_block_too_few": (
        1,
        """
class BlockAllocator(Library):
    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self._free = self._free[:-1]
""",
    ),
    "the_same_block_twice": (
        1,
        """
class BlockAllocator(Library):
    def allocate(self):
        if not self._free:
            raise OutOfBlocks("none left")
        block = self._free[-1]
        if self._ref_counts[block]:
            self._free.pop()
        self._ref_counts[block] = 1
        return block
""",
    ),
    "runs_out_with_another_error": (
        1,
        """
class BlockAllocator(Library):
    def allocate(self):
        block = self._free.pop()
        self._ref_counts[block] = 1
        return block
""",
    ),
    "no_reference_count": (
        2,
        """
class BlockAllocator(Library):
    def share(self, block):
        if not self._is_owned(block):
            raise DoubleFree("free")
""",
    ),
    "shares_what_is_free": (
        2,
        """
class BlockAllocator(Library):
    def share(self, block):
        self._ref_counts[block] += 1
""",
    ),
    "takes_minus_one_for_a_block": (
        2,
        """
class BlockAllocator(Library):
    def _is_owned(self, block):
        return block < self.num_blocks and self._ref_counts[block] > 0
""",
    ),
    "frees_at_the_first_owner": (
        3,
        """
class BlockAllocator(Library):
    def free(self, block):
        if not self._is_owned(block):
            raise DoubleFree("free")
        self._ref_counts[block] = 0
        self._free.append(block)
""",
    ),
    "leaks_what_was_shared": (
        3,
        """
class BlockAllocator(Library):
    def free(self, block):
        if not self._is_owned(block):
            raise DoubleFree("free")
        was_shared = self._ref_counts[block] > 1
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0 and not was_shared and not hasattr(self, "shared"):
            self._free.append(block)
        if was_shared:
            self.shared = True
""",
    ),
    "accepts_a_double_free": (
        3,
        """
class BlockAllocator(Library):
    def free(self, block):
        self._ref_counts[block] -= 1
        if self._ref_counts[block] <= 0:
            self._free.append(block)
""",
    ),
    "never_ends": (
        3,
        """
class BlockAllocator(Library):
    def free(self, block):
        while True:
            pass
""",
    ),
}

RIGHT = {
    "a_heap_that_hands_out_the_lowest": """
class BlockAllocator:
    def __init__(self, num_blocks):
        if num_blocks < 0:
            raise InvalidOption("give 0 or more")
        self.num_blocks = num_blocks
        self.heap = list(range(num_blocks))
        self.owners = {}

    @property
    def num_free(self):
        return len(self.heap)

    def allocate(self):
        if not self.heap:
            raise OutOfBlocks("free one first")
        block = heapq.heappop(self.heap)
        self.owners[block] = 1
        return block

    def share(self, block):
        if block not in self.owners:
            raise DoubleFree("it has no owner")
        self.owners[block] += 1

    def free(self, block):
        if block not in self.owners:
            raise DoubleFree("it has no owner")
        self.owners[block] -= 1
        if not self.owners[block]:
            del self.owners[block]
            heapq.heappush(self.heap, block)

    def ref_count(self, block):
        return self.owners.get(block, 0)
""",
}
