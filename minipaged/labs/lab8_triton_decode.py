"""Lab 8: a Triton decode kernel (chapter 10)."""

from minipaged.labs.lab import Lab, Task

LAB = Lab(
    number=8,
    name="triton_decode",
    title="a Triton decode kernel",
    sources=(
        "minipaged.attention.triton.naive_decode.naive_paged_attention",
        "minipaged.attention.triton.naive_decode.naive_kernel",
    ),
    parts={"paged_attention": "naive_paged_attention"},
    tasks=(
        Task(
            1,
            "one query, one head, one block",
            25,
            holes=("naive_kernel",),
            hints=(
                "Begin with one sequence of one block: block_tables[0] names it, and the query is "
                + "the first row of q. Which addresses hold its keys? The cells are explained at "
                + "the top of minipaged/attention/triton/__init__.py.",
                "A tile of keys is SLOTS rows and WIDTH columns of addresses: a column of cells "
                + "times HEAD_DIM plus a row of tl.arange(0, WIDTH). Two masks trim it: slots "
                + "after the query's position (or after BLOCK_SIZE), and elements after "
                + "HEAD_DIM.",
                "A score is tl.sum(query[None, :] * keys, axis=1) * scale. Where no key is "
                + "visible it must become minus infinity. The scale has been multiplied by "
                + "log2(e) already, so weights are tl.exp2 of score minus maximum.",
            ),
        ),
        Task(
            2,
            "all blocks, in one pass",
            25,
            hints=(
                "The query is at position context_lens[0], and sees that many keys and its "
                + "own. How many blocks do they fill, when the last is just full, and when it "
                + "has one token?",
                "Load the physical block's number inside the loop, from the place that the "
                + "logical block has in the table. Make it 64 bits wide before you multiply.",
                "Keep maximum, total and output from block to block, as in lab 3. A larger maximum "
                + "makes total and output too large by tl.exp2(old - new): multiply both.",
            ),
        ),
        Task(
            3,
            "many sequences, grouped heads, prompts",
            25,
            hints=(
                "tl.program_id(0) is a token of the batch, program_id(1) a query head. Three "
                + "things depend on the first: the row of q and out, the sequence, the position.",
                "Neighbouring query heads share a KV head, GROUP of them. And sequence s owns "
                + "the tokens cu_seqlens_q[s] up to cu_seqlens_q[s + 1]: walk up to the one that "
                + "owns yours. Its row of the tables begins table_stride entries further on.",
                "The first of a sequence's query tokens is at context_lens[seq], the next one "
                + "place further. In q a token's row begins at token * q_token_stride, a head's at "
                + "head * q_head_stride; out has no gaps.",
            ),
        ),
        Task(
            4,
            "serve a language model",
            15,
            hints=(
                "Nothing new is needed here. If it fails and the tasks before pass, compare your "
                + "kernel's output with the reference's, row by row: guides/debug_a_kernel.",
            ),
            seconds=120.0,
        ),
        Task(
            5,
            "compiled, on a GPU",
            10,
            hints=(
                "What the interpreter forgives and the compiler does not: a variable that changes "
                + "its type or its shape inside a loop, a tile whose size is not a power of two, "
                + "elements that are used and were never loaded.",
                "Too slow? All SLOTS keys of a block are to be loaded as one tile, and no element "
                + "twice. A loop over slots is a loop of small reads, each of which waits.",
            ),
            seconds=300.0,
        ),
    ),
)
