"""Lab 3: paged attention by gathering, then block by block (chapter 4)."""

from minipaged.labs.lab import Lab, Task

LAB = Lab(
    number=3,
    name="paged_attention",
    title="paged attention by gathering, then block by block",
    sources=(
        "minipaged.attention.reference.reference_paged_attention",
        "minipaged.attention.reference.gather",
        "minipaged.attention.reference.causal_attention",
        "minipaged.attention.blockwise.blockwise_paged_attention",
        "minipaged.attention.blockwise._attend_to_blocks",
    ),
    parts={"paged_attention": "reference_paged_attention"},
    tasks=(
        Task(
            1,
            "gather through the block table",
            20,
            holes=("gather",),
            hints=(
                "Which entries of the table belong to a sequence of seq_len tokens, and which "
                + "slots of the last block?",
                "Indexing the pool with a tensor of block numbers copies those blocks, in that "
                + "order: [blocks, kv_heads, block_size, head_dim]. Round the number of blocks "
                + "up.",
                "Positions run over blocks and slots, but the head dimension is between these "
                + "two. Make block and slot adjacent before you flatten them into one dimension, "
                + "then cut off everything after the end.",
            ),
        ),
        Task(
            2,
            "attend, and see nothing ahead",
            25,
            holes=("causal_attention",),
            hints=(
                "Chapter 1: scores, a softmax over the keys, a sum of values by these weights. "
                + "Which keys does query head 3 read, when there are four heads and two KV heads?",
                "Query heads of a group are adjacent: repeat each KV head for its group, head by "
                + "head, so that keys have as many heads as queries. heads_per_kv_head returns "
                + "the group size.",
                "Query i is at position context_len + i and attends to keys up to and including "
                + "its own position. Compare a column of query positions with a row of key "
                + "positions, and set hidden scores to minus infinity before the softmax.",
            ),
        ),
        Task(
            3,
            "block by block, never gathering",
            35,
            holes=("_attend_to_blocks",),
            hints=(
                "What must you keep from the blocks so far, for each query and head, so that you "
                + "never read them again? Chapter 4 keeps three values.",
                "The largest score so far, the sum of the weights, and the sum of the weighted "
                + "values, both weighted by exp(score - maximum). They start at minus infinity, "
                + "zero and zero.",
                "When a block contains a larger maximum, both sums so far are too large by the "
                + "same factor: multiply them by exp(old - new) before you add the block's part. "
                + "Divide once, at the end.",
                "The last block may be partly filled: the sequence has context_len plus "
                + "num_queries tokens. A query of a prompt may attend to only part of a block, or "
                + "to none of it: use the mask of task 2, at positions that start at logical * "
                + "block_size.",
            ),
        ),
        Task(
            4,
            "serve a language model with both",
            20,
            hints=(
                "If the other tasks pass and this one does not, open the trace that the failing "
                + "test has written: minipaged trace view <file>.",
                "The engine splits prompts into chunks here, and its pool contains data of "
                + "earlier sequences. Which of your lines assume that a slot is empty, or that a "
                + "prompt starts at position 0?",
            ),
            seconds=120.0,
        ),
    ),
)
