"""Lab 2: block tables, and how a sequence grows (chapter 3)."""

from minipaged.labs.lab import Lab, Task

LAB = Lab(
    number=2,
    name="block_tables",
    title="block tables, and a block when it is needed",
    sources=(
        "minipaged.memory.block_table.BlockTable",
        "minipaged.memory.block_manager.BlockManager",
    ),
    parts={"block_table": "BlockTable", "memory": "BlockManager"},
    tasks=(
        Task(
            1,
            "find a token's slot",
            25,
            holes=("BlockTable.slot", "BlockTable.filled"),
            hints=(
                "A position has two parts: the logical block, and the offset in it. `divmod` "
                + "gives both. Which physical block stores that logical block?",
                "Slots are numbered through the whole pool, so the physical block starts at its "
                + "number times the block size. Use an assert to refuse a position without a "
                + "token, including a negative one.",
                "For `filled`: how many tokens are there from the start of this logical block on? "
                + "That many, but never more than the block size. Try 8 tokens in blocks of 4.",
            ),
        ),
        Task(
            2,
            "map the first tokens only",
            15,
            holes=("BlockTable.beginning",),
            hints=(
                "How many blocks do n tokens need, if the last may be partly empty? `//` rounds "
                + "down; `-(-n // size)` rounds up.",
                "The new table needs its own list, even if it contains all blocks: what one table "
                + "appends later must not appear in the other. A slice of a list is a new list.",
                "`num_cached_blocks` counts full blocks in the prefix cache. If the first tokens "
                + "end inside a block, that block is no longer full.",
            ),
        ),
        Task(
            3,
            "a block when it is needed",
            30,
            holes=("BlockManager.append", "BlockManager._blocks_for"),
            hints=(
                "The table is in `self._tables`, and `self._pool.allocate()` returns new blocks. "
                + "Compare the number of logical blocks that the tokens need with the number in "
                + "the table.",
                "Try it on paper with blocks of 4: going from 4 to 5 tokens takes a block, from 3 "
                + "to 4 and from 5 to 6 does not. On admission the table is empty, and several "
                + "blocks are needed at once.",
                "Append to `table.blocks` until it has `_blocks_for(seq.num_tokens)` blocks, then "
                + "set the table's number of tokens. As long as each block has one owner, there "
                + "is nothing to copy: return an empty list.",
            ),
        ),
        Task(
            4,
            "ask first, and free",
            20,
            holes=("BlockManager.can_append", "BlockManager.free"),
            hints=(
                "A check takes no blocks. `_growth` counts the blocks that a group's next step "
                + "needs; pass it the function that counts owners, `self._pool.ref_count`.",
                "Exactly enough is enough. Count the blocks of all sequences of the group "
                + "together.",
                "To free: remove the table from `self._tables`, and free its blocks in its pool "
                + "(`_pool_of`), the last one first. Then check in `__init__` what else is "
                + "recorded by the sequence's id; a set has `discard`.",
            ),
        ),
        Task(
            5,
            "serve a language model",
            10,
            hints=(
                "If the other tasks pass and this one does not, open the trace that the failing "
                + "test has written: minipaged trace view <file>.",
                "If the tokens differ from the library's, a token is written to one slot and read "
                + "from another. Compare the block table with the number of tokens at that step.",
            ),
            seconds=120.0,
        ),
    ),
)
