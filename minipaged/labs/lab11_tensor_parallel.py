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
                + "dimension do you cut, to keep some of the outputs? And the bias?",
                "A slice is a view: as long as it exists, the whole matrix stays in memory. "
                + "`.clone()` makes a copy of the slice alone.",
                "With 8 query heads and 2 KV heads, query heads 0 to 3 read KV head 0. On 4 ranks, "
                + "rank 1 has query heads 2 and 3. Which KV head do they read, and which other "
                + "rank has it, too?",
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
                "Each output is a sum over all inputs. A rank has some of the inputs, so what it "
                + "computes is a part of every output.",
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
                "765 rows on 2 ranks: append rows of zeros until the number can be divided. "
                + "`-765 % 2` is how many are missing. torch.nn.functional.pad takes (left, "
                + "right, top, bottom).",
                "A rank's first row is token rank * len(rows). Subtract it from the token ids. "
                + "What is left may be negative, or too large: these tokens are another rank's.",
                "Look up row 0 in place of every token that is not here, then replace what was "
                + "found for them by zeros. Now the sum over all ranks has one addend per token "
                + "that is not zero.",
                "`dist.gather(logits, parts, dst=0)`: on rank 0 `parts` is a list of tensors to be "
                + "filled, on other ranks it must be None. Concatenate them, and cut off the "
                + "scores of the rows that you have appended.",
            ),
        ),
        Task(
            4,
            "compute a step",
            20,
            holes=("Rank.attention", "Rank.mlp", "Rank.step"),
            hints=(
                "Follow `whole_logits` line by line. Your layers already hold your share only, so "
                + "the calls look the same; `attend` works on any number of heads.",
                "Four places differ from `whole_logits`: the embedding, the layers `o` and "
                + "`down`, and the logits. Each of them is a function of yours.",
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
                "Rank 0 takes part in the step that it has announced: in `generate`, each `send` "
                + "is followed by a `step`. The others do nothing but `receive` and `step`.",
                "If a test says that a rank waits forever, write down both ranks' collectives, "
                + "one below the other. Where do the two columns differ first?",
            ),
        ),
    ),
)
