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
                "A fork takes no free block. What does the child get then, and which counts "
                + "change?",
                "The child gets a table of its own with the same numbers, and every block in it "
                + "gets one more owner. `BlockTable.beginning` makes such a table, for the first "
                + "so many tokens: which number says how many of them are the child's?",
                "`child.num_computed_tokens` says it. Share each block of that table in the pool "
                + "that the parent's table refers to (`_pool_of`), keep the table under the "
                + "child's id, and if the parent is in `_swapped`, so is the child.",
            ),
        ),
        Task(
            2,
            "free",
            15,
            holes=("BlockManager.free",),
            hints=(
                "How many owners does a sequence take off each of its blocks? Look what the "
                + "allocator does when it is not the last.",
                "Take the table out of `_tables` and free each block once, in the pool that the "
                + "table refers to. A sequence can also be in `_swapped` and in `_pinned`: it "
                + "leaves both.",
                "The prefix cache evicts the blocks that were freed first, and must never evict a "
                + "block before its children. So the last block goes first.",
            ),
        ),
        Task(
            3,
            "copy-on-write",
            35,
            holes=("BlockManager.append",),
            hints=(
                "Two questions for each block that is about to be written: is it there yet, and "
                + "am I its only owner? Which blocks are about to be written?",
                "From the block of the first token without a slot to the block of the last token. "
                + "`table.num_tokens` have a slot, cached ones among them. A block "
                + "that is not there is allocated. One with other owners is exchanged in the table "
                + "for a new one, and the pair is (from, to).",
                "After the exchange you own the copy and not the original: free it, and the last "
                + "of several writers is its only owner and copies nothing. At the end, "
                + "`table.num_tokens` is the sequence's.",
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
                "The prompt of a request is computed once, and its last logits are sampled as "
                + "often as samples are wanted. How do you know that a sequence is still there?",
                "Sample i draws with the request's seed plus i, before and after the fork. Each "
                + "`Completion` has a `row` with its seed; of the prompt, there is only the first "
                + "one.",
                "In `advance` fork first, and add the tokens afterwards: a fork has all tokens of "
                + "its parent, also the one that it should not have. `_add_completion` takes the "
                + "new sequence; `Completion.add` the token; `finish_reason` says if it was the "
                + "last.",
            ),
        ),
        Task(
            5,
            "serve a language model",
            10,
            hints=(
                "If the other tasks pass and this one does not, watch the trace that the failing "
                + "test has left: minipaged trace view <file>. Look at the step after the fork.",
            ),
            seconds=120.0,
        ),
    ),
)
