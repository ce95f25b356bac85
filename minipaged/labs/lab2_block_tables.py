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
                "A position has two halves: which logical block, and how far into it. `divmod` "
                + "gives both. Which physical block is that logical block?",
                "The slot is counted through the whole pool, so it starts at the physical block "
                + "times the block size. Refuse a position that has no token with an assert, a "
                + "negative one too.",
                "For `filled`: how many tokens are left from the beginning of this logical block "
                + "on? That many, and never more than a block holds. Try 8 tokens in blocks of 4.",
            ),
        ),
        Task(
            2,
            "map the first tokens only",
            15,
            holes=("BlockTable.beginning",),
            hints=(
                "How many blocks do n tokens need, if the last may be half empty? `//` rounds "
                + "down; `-(-n // size)` rounds up.",
                "The new table must have a list of its own, even if it takes all blocks: what one "
                + "of the two appends later is not the other's. A slice of a list is a new list.",
                "`num_cached_blocks` counts full blocks in the prefix cache. In a beginning that "
                + "ends inside a block, that block is not full any more.",
            ),
        ),
        Task(
            3,
            "a block when it is needed",
            30,
            holes=("BlockManager.append", "BlockManager._blocks_for"),
            hints=(
                "The table is in `self._tables`, the blocks come from `self._pool.allocate()`. "
                + "Compare how many logical blocks the tokens need with how many the table has.",
                "Try it on paper with blocks of 4: from 4 to 5 tokens, a block is taken, from 3 to "
                + "4 and from 5 to 6 none. On admission there is no block yet, and several are "
                + "needed at once.",
                "Append to `table.blocks` until it has what `_blocks_for(seq.num_tokens)` says, "
                + "then tell the table how many tokens it has now. As long as each block has one "
                + "owner there is nothing to copy: return an empty list.",
            ),
        ),
        Task(
            4,
            "ask first, and free",
            20,
            holes=("BlockManager.can_append", "BlockManager.free"),
            hints=(
                "Asking takes no blocks. `_growth` counts the blocks that a group's next step "
                + "takes, given the function that counts owners: `self._pool.ref_count`.",
                "Exactly enough is enough. The sequences of a group take theirs together.",
                "To free: take the table out of `self._tables`, and free its blocks in the pool "
                + "that it refers to (`_pool_of`), the last one first. Then look at `__init__` for "
                + "what else is recorded by the sequence's id; a set has `discard`.",
            ),
        ),
        Task(
            5,
            "serve a language model",
            10,
            hints=(
                "If the other tasks pass and this one does not, watch the trace that the failing "
                + "test has left: minipaged trace view <file>.",
                "If the tokens differ from the library's, a token is stored in a slot where it is "
                + "not looked for. Compare the block table with the number of tokens at that step.",
            ),
            seconds=120.0,
        ),
    ),
)
