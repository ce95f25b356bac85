"""Lab 5: fork, copy-on-write, parallel sampling (chapter 7)."""

from minipaged.labs.lab import Lab, Task

LAB = Lab(
    number=5,
    name="sharing",
    title="fork, copy-on-write, parallel sampling",
    sources=(
        "minipaged.memory.block_manager.BlockManager",
        "minipaged.engine.sampling_request.SamplingRequest",
    ),
    parts={"memory": "BlockManager", "sampling_request": "SamplingRequest"},
    tasks=(
        Task(
            1,
            "fork",
            20,
            holes=("BlockManager.fork",),
            hints=(
                "A fork takes no free block. What does the child get instead, and which counts "
                + "change?",
                "The child gets its own table with the same block numbers, and every block in it "
                + "gets one more owner. `BlockTable.beginning` makes such a table for the first "
                + "tokens: which attribute of the child says how many?",
                "It is `child.num_computed_tokens`. Share each block of that table in the pool "
                + "that the parent's table refers to (`_pool_of`), store the table under the "
                + "child's id, and if the parent is in `_swapped`, add the child.",
            ),
        ),
        Task(
            2,
            "free",
            15,
            holes=("BlockManager.free",),
            hints=(
                "How many owners does each block lose when a sequence ends? Read what the "
                + "allocator does when the owner is not the last.",
                "Remove the table from `_tables` and free each block once, in the pool that the "
                + "table refers to. A sequence can also be in `_swapped` and in `_pinned`: remove "
                + "it from both.",
                "The prefix cache evicts the blocks that were freed first, but must never evict a "
                + "block before its children. Therefore free the last block first.",
            ),
        ),
        Task(
            3,
            "copy-on-write",
            35,
            holes=("BlockManager.append",),
            hints=(
                "Ask two questions about each block that is about to be written: does it exist "
                + "yet, and is this sequence its only owner? Which blocks are about to be "
                + "written?",
                "They run from the block of the first token without a slot to the block of the "
                + "last token. `table.num_tokens` tokens already have a slot, including cached "
                + "ones. Allocate a block that does not exist yet. Replace a block with other "
                + "owners by a new one in the table; the pair is (from, to).",
                "After the replacement, the sequence owns the copy and no longer the original: "
                + "free the original. The last of several writers is then its only owner and "
                + "copies nothing. At the end, set `table.num_tokens` to the sequence's number of "
                + "tokens.",
                "The original is in the prefix cache, the copy is not. `table.num_cached_blocks` "
                + "is the number of leading blocks that are cached: after a copy, none from there "
                + "on.",
            ),
        ),
        Task(
            4,
            "samples",
            20,
            holes=("SamplingRequest.rows", "SamplingRequest.advance"),
            hints=(
                "The prompt of a request is computed once, and its last logits are sampled once "
                + "per sample. How do you find out whether a sequence still exists?",
                "Sample i uses the request's seed plus i, before and after the fork. Each "
                + "`Completion` has a `row` with its seed; for the prompt, there is only the "
                + "first one.",
                "In `advance`, fork first and add the tokens afterwards: a fork has all tokens of "
                + "its parent, including one that it should not have. `_add_completion` takes the "
                + "new sequence, `Completion.add` the token. Afterwards, `finish_reason` is set if "
                + "the token was the last one.",
            ),
        ),
        Task(
            5,
            "serve a language model",
            10,
            hints=(
                "If the other tasks pass and this one does not, open the trace that the failing "
                + "test has written: minipaged trace view <file>. Look at the step after the "
                + "fork.",
            ),
            seconds=120.0,
        ),
    ),
)
