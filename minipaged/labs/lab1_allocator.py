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
                "A block is nothing but a number from 0 up to num_blocks. What must you know to "
                + "hand one out, and to tell later who owns it?",
                "Two lists will do: the numbers that are free, and a count of owners for each "
                + "block. `num_blocks` itself is read by others: keep it too.",
                "Take a number off the end of the free list (that is O(1)), set its count to 1 "
                + "and return it. With no number left, raise OutOfBlocks with a sentence.",
            ),
        ),
        Task(
            2,
            "count the owners",
            30,
            holes=("BlockAllocator.share", "BlockAllocator.ref_count", "BlockAllocator._is_owned"),
            hints=(
                "To share is to add an owner. Which block cannot be shared?",
                "A free block has no owner, and a number outside the pool is no block: both are "
                + "DoubleFree. Remember that Python takes -1 for the last of a list.",
            ),
        ),
        Task(
            3,
            "take blocks back",
            30,
            holes=("BlockAllocator.free",),
            hints=(
                "A block has two owners, and one frees it: is it free now?",
                "Count down first. Only at zero does the number return to the free list. Freeing a "
                + "block without owners raises DoubleFree and changes nothing.",
            ),
        ),
        Task(
            4,
            "serve a language model",
            10,
            hints=(
                "If the other tasks pass and this one does not, watch the trace that the failing "
                + "test has left: minipaged trace view <file>.",
            ),
            seconds=120.0,
        ),
    ),
)
