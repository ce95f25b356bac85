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
                "Start with one sequence of one block: block_tables[0] is its number, and the "
                + "query is the first row of q. At which addresses are its keys? The top of "
                + "minipaged/attention/triton/__init__.py explains cells.",
                "A tile of keys is SLOTS rows and WIDTH columns of addresses: a column of cells "
                + "times HEAD_DIM plus a row of tl.arange(0, WIDTH). It needs two masks: against "
                + "slots after the query's position (or after BLOCK_SIZE), and against elements "
                + "after HEAD_DIM.",
                "A score is tl.sum(query[None, :] * keys, axis=1) * scale. Hidden keys must get a "
                + "score of minus infinity. The scale is already multiplied by log2(e), so "
                + "weights are tl.exp2 of score minus maximum.",
            ),
        ),
        Task(
            2,
            "all blocks, in one pass",
            25,
            hints=(
                "The query is at position context_lens[0], and attends to that many keys and its "
                + "own. How many blocks do they fill, if the last is exactly full, and if it has "
                + "one token?",
                "Load the number of the physical block inside the loop, from the table entry of "
                + "the logical block. Convert it to 64 bits before you multiply.",
                "Keep maximum, total and output from block to block, as in lab 3. With a larger "
                + "maximum, total and output must be scaled: multiply both by tl.exp2(old - new).",
            ),
        ),
        Task(
            3,
            "many sequences, grouped heads, prompts",
            25,
            hints=(
                "tl.program_id(0) is a token of the batch, program_id(1) a query head. Three "
                + "things depend on the token: the row of q and out, the sequence, the position.",
                "GROUP adjacent query heads share a KV head. Sequence s owns the tokens "
                + "cu_seqlens_q[s] up to cu_seqlens_q[s + 1]: search for the sequence that owns "
                + "your token. Its row of the tables starts at seq * table_stride.",
                "The first of a sequence's query tokens is at position context_lens[seq], the "
                + "next one position later. In q, a token's row starts at token * q_token_stride, "
                + "a head's at head * q_head_stride; out has no gaps.",
            ),
        ),
        Task(
            4,
            "serve a language model",
            15,
            hints=(
                "Nothing new is needed here. If it fails and the earlier tasks pass, compare your "
                + "kernel's output with the reference's, row by row: guides/debug_a_kernel.",
            ),
            seconds=120.0,
        ),
        Task(
            5,
            "compiled, on a GPU",
            10,
            hints=(
                "The interpreter accepts three things that the compiler does not: a variable that "
                + "changes its type or shape inside a loop, a tile whose size is not a power of "
                + "two, and elements that are used but were never loaded.",
                "Too slow? Load all SLOTS keys of a block as one tile, and no element twice. A "
                + "loop over slots is a loop of small reads, and the program waits for each.",
            ),
            seconds=300.0,
        ),
    ),
)
