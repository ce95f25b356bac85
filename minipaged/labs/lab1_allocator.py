"""Lab 1: the block allocator (chapter 3)."""

from minipaged.labs.lab import Lab, Task

LAB = Lab(
    number=1,
    name="allocator",
    title="the block allocator and its reference counts",
    sources=("minipaged.memory.allocator.BlockAllocator",),
    parts={"allocator": "BlockAllocator"},
    tasks=(
        Task(
            1,
            "hand out free blocks",
            30,
            holes=("BlockAllocator.__init__", "BlockAllocator.num_free", "BlockAllocator.allocate"),
            hints=(
                "A block is just a number from 0 to num_blocks - 1. What must you record to hand "
                + "one out, and to tell later how many owners it has?",
                "Two lists are enough: the free block numbers, and the number of owners of each "
                + "block. Other code reads `num_blocks`, so keep it too.",
                "Pop a number off the end of the free list (that is O(1)), set its count to 1 and "
                + "return it. If the list is empty, raise OutOfBlocks with a sentence.",
            ),
        ),
        Task(
            2,
            "count the owners",
            30,
            holes=("BlockAllocator.share", "BlockAllocator.ref_count", "BlockAllocator._is_owned"),
            hints=(
                "Sharing adds an owner. Which blocks cannot be shared?",
                "A free block has no owner, and a number outside the pool is not a block: both "
                + "raise DoubleFree. Remember that in Python, index -1 is the last element of a "
                + "list.",
            ),
        ),
        Task(
            3,
            "take blocks back",
            30,
            holes=("BlockAllocator.free",),
            hints=(
                "A block has two owners, and one frees it: is it free now?",
                "Decrement the count first. Only when it reaches zero does the number return to "
                + "the free list. Freeing a block without owners raises DoubleFree and changes "
                + "nothing.",
            ),
        ),
        Task(
            4,
            "serve a language model",
            10,
            hints=(
                "If the other tasks pass and this one does not, open the trace that the failing "
                + "test has written: minipaged trace view <file>.",
            ),
            seconds=120.0,
        ),
    ),
)
