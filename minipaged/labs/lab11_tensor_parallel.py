"""Lab 11: a model cut in two, each half in a process of its own (chapter 14)."""

from minipaged.labs.lab import Lab, Task

_MODULE = "minipaged.labs.tensor_parallel.rank"

LAB = Lab(
    number=11,
    name="tensor_parallel",
    title="a model cut in two",
    sources=tuple(
        f"{_MODULE}.{name}"
        for name in (
            "cut_columns",
            "heads_of",
            "cut_heads",
            "cut_rows",
            "row_linear",
            "cut_vocabulary",
            "embed",
            "gather_logits",
            "Rank",
        )
    ),
    parts={"rank": "Rank"},
    tasks=(
        Task(
            1,
            "cut by outputs",
            20,
            holes=("cut_columns", "heads_of", "cut_heads"),
            hints=(
                "PyTorch stores a weight as [outputs, inputs], and computes x @ weight.T. Which "
                + "dimension do you cut to keep some of the outputs? What about the bias?",
                "A slice is a view: as long as it exists, the whole matrix stays in memory. "
                + "`.clone()` makes a copy of the slice alone.",
                "With 8 query heads and 2 KV heads, query heads 0 to 3 read KV head 0. On 4 "
                + "ranks, rank 1 has query heads 2 and 3. Which KV head do they read, and which "
                + "other rank also has it?",
                "A rank's KV heads are those of its first to its last query head, each divided by "
                + "the number of query heads per KV head. `range` does not include its end.",
            ),
        ),
        Task(
            2,
            "cut by inputs, and sum",
            20,
            holes=("cut_rows", "row_linear"),
            hints=(
                "Each output is a sum over all inputs. A rank has some of the inputs, so it "
                + "computes a part of every output.",
                "`dist.all_reduce(out)` adds up the tensors of all ranks, in place: afterwards "
                + "`out` is the sum on each of them. It returns nothing.",
                "If every rank adds the bias before the sum, how many times does the result "
                + "contain it?",
            ),
        ),
        Task(
            3,
            "cut the vocabulary",
            25,
            holes=("cut_vocabulary", "embed", "gather_logits"),
            hints=(
                "With 765 rows on 2 ranks, append rows of zeros until the number is divisible. "
                + "`-765 % 2` is how many are missing. torch.nn.functional.pad takes (left, "
                + "right, top, bottom).",
                "A rank's first row is token rank * len(rows). Subtract it from the token ids. "
                + "The result may be negative or too large: these tokens belong to other ranks.",
                "Look up row 0 for every token that belongs to another rank, then replace these "
                + "results by zeros. The sum over all ranks then has one nonzero addend per "
                + "token.",
                "`dist.gather(logits, parts, dst=0)`: on rank 0, `parts` is a list of tensors to "
                + "fill; on other ranks it must be None. Concatenate them, and cut off the scores "
                + "of the rows that you have appended.",
            ),
        ),
        Task(
            4,
            "compute a step",
            20,
            holes=("Rank.attention", "Rank.mlp", "Rank.step"),
            hints=(
                "Follow `whole_logits` line by line. Your layers contain only your share, so the "
                + "calls look the same; `attend` works on any number of heads.",
                "Four places differ from `whole_logits`: the embedding, the layers `o` and "
                + "`down`, and the logits. You have written a function for each of them.",
                "Count the sums: one for the embedding and two per layer. Between `q`, `k`, `v` "
                + "and `o`, and between `gate`, `up` and `down`, no rank needs anything of "
                + "another.",
            ),
        ),
        Task(
            5,
            "run the loop",
            15,
            holes=("Rank.send", "Rank.receive", "Rank.work", "Rank.generate"),
            hints=(
                "`dist.broadcast(tensor, src=0)` sends rank 0's tensor and fills everyone "
                + "else's. All ranks call it, with tensors of the same shape and type.",
                "Rank 0 takes part in the step that it has announced: in `generate`, a `step` "
                + "follows each `send`. The others only call `receive` and `step`.",
                "If a test says that a rank waits forever, write down the collectives of both "
                + "ranks in two columns. Where do the columns first differ?",
            ),
        ),
    ),
)
