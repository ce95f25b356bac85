# %% [markdown]
# # 4. Paged attention
#
# A query reads its keys and values through the block table: first by gathering a contiguous copy,
# then block by block in place.
#
# **Needs** [chapter 1](01_attention_and_the_kv_cache.md) and
# [chapter 3](03_blocks_and_block_tables.md) · **Time** 35 minutes ·
# **Lab** [3, paged attention](labs/03.md)
#
# ![The query of C reads C's blocks in table order and updates one result.](openings/04.svg)
#
# ## Goals
#
# - How attention finds the keys of a sequence that is stored in scattered blocks (section 4.1 of
#   the paper).
# - How softmax over many blocks is computed in one pass, though it seems to need two (Equation 4).
# - Why one function serves whole prompts, chunks of prompts and single tokens.
#
# ## Invariants
#
# 1. The result is that of plain attention over the same keys in one tensor.
# 2. The query at position $p$ sees positions $0$ to $p$, and nothing else.
# 3. Only a sequence's own keys and values affect its result. Other blocks and unused entries of the
#    block tables are never read. An empty slot is not read, or has weight zero and holds finite
#    numbers.
#
# ## Predict
#
# - C has 9 tokens in blocks of 4 slots, and computes a tenth. How many blocks does its query read,
#   and how many slots of the last one must it leave out?
# - The first 4 of a prompt's 7 tokens are in the pool. How many queries does the next step have,
#   and how many (query, key) pairs are visible?
# - A sum has the terms $\exp(\text{score} - m)$, where $m$ is the largest score so far. $m$ is 2,
#   and the next score is 5. By what factor must the sum be multiplied?
#
# ## Build it
#
# ### Read through the block table
#
# Here is the pool at the end of chapter 3. Attention for C needs C's keys in order, and C's table
# lists their blocks.

# %% Left: the pool. Right: C's logical blocks, by its block table
import drawing
import torch
from matplotlib.patches import ConnectionPatch

tables = {"A": [0, 1, 4], "C": [2, 3, 5]}
words = {
    "A": "four score and seven years ago our fathers brought forth".split(),
    "C": "once upon a time there was a small frog".split(),
}
contents, owners = {}, {}
for name, table in tables.items():
    for logical, physical in enumerate(table):
        contents[physical], owners[physical] = words[name][4 * logical :][:4], name

figure, (pool, piece) = drawing.picture(7.2, 3.6, ncols=2)
drawing.blocks(pool, contents, owners, num_blocks=8, block_size=4)
in_order = {logical: contents[physical] for logical, physical in enumerate(tables["C"])}
drawing.blocks(piece, in_order, dict.fromkeys(in_order, "C"), num_blocks=3, block_size=4)
piece.set_ylim(pool.get_ylim())
piece.get_legend().remove()
pool.set_title("physical blocks")
piece.set_title("logical blocks of C")
for logical, physical in enumerate(tables["C"]):
    ends = (4.05, -1.25 * physical - 0.5), (-0.5, -1.25 * logical - 0.5)
    arrow = ConnectionPatch(*ends, "data", "data", axesA=pool, axesB=piece, arrowstyle="->")
    arrow.set_color(drawing.GREY)
    figure.add_artist(arrow)

# %% [markdown]
# To *gather* is to copy the blocks of a sequence in order, along these arrows. Position $p$ is in
# block `table[p // 4]` at offset `p % 4`. With tensors, one line computes that for all positions:

# %%
positions = torch.arange(9)
blocks, offsets = torch.tensor(tables["C"])[positions // 4], positions % 4
print([contents[int(block)][offset] for block, offset in zip(blocks, offsets, strict=True)])

# %% [markdown]
# ### Gather, then attend
#
# In the real pool a slot holds vectors. The keys of a layer are one tensor
# `[num_blocks, kv_heads, block_size, head_dim]`, and the values another.
#
# A step computes tokens of several sequences. Their queries are in one tensor, sequence after
# sequence. For each sequence, `batch` has a row of the block tables and a *span* of three numbers:
# `start`, the row of its first query; `query_len`, the number of its queries; and `context_len`,
# the number of tokens that earlier steps have computed. The new keys are written to the pool first,
# since a token attends to itself. It then holds `seq_len = context_len + query_len` of them.
#
# Several query heads share a KV head (chapter 1); `unflatten` splits them into `[kv_heads, group]`.
# `einsum` multiplies two tensors and sums over each dimension that its result lacks. The dimensions
# are `q`ueries, `h` (KV heads), `g` (query heads of a group), `k`eys and `d` (elements of a
# vector).

# %%
from torch import Tensor

from minipaged.attention.batch import Batch


def by_gathering(q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, scale: float) -> Tensor:
    """Attention of every sequence of a batch, over a contiguous copy of its keys."""
    block_size, out = k_cache.shape[2], []
    for span, table in zip(batch.spans, batch.block_tables, strict=True):
        positions = torch.arange(span.seq_len)
        blocks, offsets = table[positions // block_size].long(), positions % block_size
        keys = k_cache[blocks, :, offsets]  # [length, kv_heads, head_dim]
        values = v_cache[blocks, :, offsets]

        queries = q[span.start : span.stop].unflatten(1, (keys.shape[1], -1))
        scores = scale * torch.einsum("qhgd,khd->qhgk", queries, keys)
        later = positions > positions[span.context_len :, None]  # [queries, length]
        weights = scores.masked_fill(later[:, None, None], -torch.inf).softmax(-1)
        out.append(torch.einsum("qhgk,khd->qhgd", weights, values).flatten(1, 2))
    return torch.cat(out)  # [tokens, heads, head_dim]


# %% [markdown]
# Let it serve, in the role `paged_attention` of `Parts`. A step computes at most 40 tokens, so
# longer prompts are cut into chunks: *chunked prefill*.

# %%
from minipaged import LLM, Parts, SamplingParams
from minipaged.evaluation.stories import prompt, tell

greedy = SamplingParams(temperature=0, max_tokens=24)
stories = [tell(num_facts=size, seed=size) for size in (1, 2, 3, 4, 6, 8)]
prompts = [prompt(story, story.questions[0]) for story in stories]


def tokens_with(parts: Parts) -> list[list[int]]:
    llm = LLM(parts=parts, num_blocks=64, max_num_seqs=8, max_num_batched_tokens=40)
    outputs = llm.generate(prompts, greedy, use_tqdm=False)
    assert llm.engine.scheduler.memory.num_free == 64
    return [output.outputs[0].token_ids for output in outputs]


expected = tokens_with(Parts())
assert tokens_with(Parts(paged_attention=by_gathering)) == expected
print(sum(len(tokens) for tokens in expected), "tokens for 6 requests, the same as the library's")

# %% [markdown]
# The library has several implementations of attention, its *backends*. `reference` is the
# specification of the others, and gathers whole blocks. Do [lab 3](labs/03.md) before you look:
#
# <details markdown="1"><summary>Spoiler for lab 3: the library's gather</summary>
#
# @@ minipaged.attention.reference.gather
#
# </details>
#
# ### One function for three kinds of work
#
# Query $i$ of a span is at position `context_len + i`, and sees the keys up to its own position:

# %% Which keys each query sees (blue)
from matplotlib.colors import ListedColormap

figure, axes = drawing.picture(7.2, 2.9, ncols=3, sharey=True)
spans = {"prefill": (0, 7), "chunk": (4, 3), "decode": (6, 1)}
colours = ListedColormap(["none", drawing.COLOURS[0]])
grid = {"cmap": colours, "vmin": 0, "vmax": 1, "edgecolor": drawing.GREY, "lw": 0.3}
edges = torch.arange(8) - 0.5
for axis, (kind, (context_len, query_len)) in zip(axes, spans.items(), strict=True):
    seen = torch.ones(query_len, 7).tril(context_len)
    axis.pcolormesh(edges, edges[context_len:], seen, **grid)
    axis.set(xticks=range(7), yticks=range(7), ylim=(6.6, -0.6), aspect="equal", xlabel="key")
    axis.set_title(f"{kind}, context {context_len}: {int(seen.sum())} pairs", fontsize="small")
axes[0].set_ylabel("query")

# %% [markdown]
# The second picture is the lower part of the first, and the third is its last row. A prompt may
# therefore be cut anywhere: with the earlier keys in the pool, each query sees the same as in a
# whole prompt.
#
# ### One block at a time
#
# Gathering reads every key, writes it elsewhere, and reads it again. The paper's attention reads it
# in place. Let $K_j$ and $V_j$ be the keys and values of block $j$, and $q_i$ one query. Equation 4
# is
#
# $$
# A_{ij} = \frac{\exp(q_i^\top K_j / \sqrt{d})}
#          {\sum_{t=1}^{\lceil i/B \rceil} \exp(q_i^\top K_t / \sqrt{d})\,\mathbf{1}},
# \qquad o_i = \sum_{j=1}^{\lceil i/B \rceil} V_j A_{ij}^\top .
# $$
#
# ($\mathbf{1}$ is a vector of ones; multiplying by it sums a row.) The denominator runs over all
# blocks. That alone needs no second pass: sum numerator and denominator separately, and divide at
# the end. The problem is the exponential. $\exp(89)$ is too large for a 32-bit number, so softmax
# first subtracts the largest score. That changes no ratio, but the largest score is known only
# after all blocks were read.
#
# One pass is enough if we subtract the largest score *so far*. When a block contains a larger one,
# all earlier terms are too large by the same factor: multiply the sums by
# $\exp(\text{old maximum} - \text{new maximum})$. This is *online softmax*. It keeps `maximum`,
# `total` (the denominator so far) and `output` (the numerator so far). Here are one query and ten
# keys in three blocks, with one number per value:

# %%
from math import exp, inf

scores = [[1.0, 2.0, 0.0, 1.0], [5.0, 1.0, 2.0, 0.0], [3.0, 4.0]]
values = [[10.0, 20.0, 30.0, 40.0], [50.0, 60.0, 70.0, 80.0], [90.0, 100.0]]

maximum, total, output = -inf, 0.0, 0.0
print("maximum  correction   total   output  output / total")
for some_scores, some_values in zip(scores, values, strict=True):
    new_maximum = max(maximum, *some_scores)
    correction = exp(maximum - new_maximum)
    weights = [exp(score - new_maximum) for score in some_scores]
    total = correction * total + sum(weights)
    output = correction * output + sum(w * v for w, v in zip(weights, some_values, strict=True))
    maximum = new_maximum
    print(f"{maximum:7}{correction:12.4f}{total:8.3f}{output:9.3f}{output / total:16.3f}")

all_scores, all_values = (torch.tensor([*x[0], *x[1], *x[2]]) for x in (scores, values))
print(f"all ten at once: {float(all_scores.softmax(0) @ all_values):36.3f}")

# %% [markdown]
# The second block contains the 5, so the sums of the first shrink to a twentieth. The third
# contains nothing larger, so its correction is 1.
#
# ### Build it block by block
#
# Now with tensors. Each block is computed alone, and `merge` combines two results, each with its
# own correction. The order therefore does not matter, and blocks could be computed in parallel, as
# chapter 11 does. (`reduce` merges the first two, then the result with the third, and so on.)

# %%
from collections.abc import Iterator
from functools import reduce

from minipaged.attention.batch import Span

Partial = tuple[Tensor, Tensor, Tensor]  # maximum, total, output: [queries, kv_heads, group, .]


class BlockByBlock:
    """Attention that reads each block in place, as in Equation 4."""

    def __call__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        out = []
        for span, table in zip(batch.spans, batch.block_tables, strict=True):
            queries = scale * q[span.start : span.stop].unflatten(1, (k_cache.shape[1], -1))
            partials = self.partials(queries, k_cache, v_cache, span, table)
            _, total, output = reduce(self.merge, partials)
            out.append((output / total).flatten(1, 2))
        return torch.cat(out)

    def partials(
        self, queries: Tensor, k_cache: Tensor, v_cache: Tensor, span: Span, table: Tensor
    ) -> Iterator[Partial]:
        block_size = k_cache.shape[2]
        for first in range(0, span.seq_len, block_size):
            physical, filled = table[first // block_size], self.filled(first, block_size, span)
            keys, values = k_cache[physical, :, :filled], v_cache[physical, :, :filled]
            scores = torch.einsum("qhgd,hkd->qhgk", queries, keys)
            hidden = self.hidden(first + torch.arange(filled), span)
            scores = scores.masked_fill(hidden[:, None, None], -inf)
            # If a query sees nothing of a block, -inf - -inf would be NaN.
            maximum = scores.amax(-1, keepdim=True).clamp(min=-1e30)
            weights = (scores - maximum).exp()
            output = torch.einsum("qhgk,hkd->qhgd", weights, values)
            yield maximum, weights.sum(-1, keepdim=True), output

    def filled(self, first: int, block_size: int, span: Span) -> int:
        return min(block_size, span.seq_len - first)  # the last block may be partly full

    def hidden(self, positions: Tensor, span: Span) -> Tensor:
        return positions > span.context_len + torch.arange(span.query_len)[:, None]

    def merge(self, one: Partial, two: Partial) -> Partial:
        maximum = torch.maximum(one[0], two[0])
        a, b = (one[0] - maximum).exp(), (two[0] - maximum).exp()
        return maximum, a * one[1] + b * two[1], a * one[2] + b * two[2]


# %% [markdown]
# Watch a real query, that of the last token of a prompt with eight sentences, in layer 1, head 0.
# The question is who put the brown tray behind the wall.

# %% Maximum so far, and distance of the output so far from the final one, block by block
from itertools import accumulate

story = tell(num_facts=8, seed=5)
question = next(question for question in story.questions if question.answer == "Una.")
calls = []


def noted(*arguments):
    calls.append(arguments)
    return by_gathering(*arguments)


watched = LLM(num_blocks=64, block_size=4, parts=Parts(paged_attention=noted))
[answer] = watched.generate(prompt(story, question), greedy, use_tqdm=False)
print(question.text, answer.outputs[0].text)

q, k_cache, v_cache, batch, scale = calls[1]  # layer 1, in the step that reads the prompt
queries, online = scale * q[-1:].unflatten(1, (2, -1)), BlockByBlock()
span = Span(start=0, query_len=1, context_len=len(q) - 1)  # its last query as a span
partials = online.partials(queries, k_cache, v_cache, span, batch.block_tables[0])
states = [[x[0, 0, 0] for x in state] for state in accumulate(partials, online.merge)]
maxima, totals, outputs = (torch.stack(each) for each in zip(*states, strict=True))

figure, (left, right) = drawing.picture(ncols=2)
left.plot(maxima)
left.set(xlabel="block", ylabel="maximum so far")
right.plot((outputs / totals - outputs[-1] / totals[-1]).norm(dim=1), color=drawing.COLOURS[2])
right.set(xlabel="block", ylabel="distance to the final output")
tray = watched.get_tokenizer().decode(answer.prompt_token_ids[4 * 19 : 4 * 20])
print(f"{len(states)} blocks; block 19 holds {tray!r}")

# %% [markdown]
# The first nineteen blocks contribute almost nothing to this head. Block 19 contains the tray: the
# maximum jumps, the correction wipes out the sums so far, and later blocks barely change the
# output.
#
# The library's version, task 3 of [lab 3](labs/03.md), keeps one running result instead of merging:
#
# <details markdown="1"><summary>Spoiler for lab 3: the library's loop over blocks</summary>
#
# @@ minipaged.attention.blockwise._attend_to_blocks
#
# </details>
#
# A Python loop over blocks is slow. On a CPU the library computes all decoding sequences in one
# call ([Fast on a plain CPU](../speed.md)); on a GPU the loop becomes a kernel (chapters 10 and
# 11).
#
# ## Check
#
# We compare with plain attention in float64, for a step with all three kinds of work. Then we add
# poison: unowned slots are NaN, which spreads to every result computed with it, and unused table
# entries are numbers of blocks that do not exist.

# %%
from dataclasses import replace

from minipaged.attention.backend import reference_paged_attention
from minipaged.attention.batch import BatchBuilder
from minipaged.memory import BlockTable
from minipaged.scheduler.output import SequenceInput

random = torch.Generator().manual_seed(0)
free, parts, held = torch.randperm(32, generator=random).tolist(), [], []
for seq_id, (context_len, query_len) in enumerate([(0, 7), (4, 3), (8, 5), (6, 1), (16, 1)]):
    length = context_len + query_len
    table = BlockTable(4, [free.pop() for _ in range(0, length, 4)], length)
    parts.append(SequenceInput(seq_id, [0] * query_len, context_len, table.blocks))
    held.append(table)
batch = BatchBuilder(max_num_seqs=8, max_blocks_per_seq=8, block_size=4).build(parts)
q = 3 * torch.randn(17, 4, 8, generator=random)  # 17 queries, 4 heads of 8 elements
cache = torch.randn(2, 32, 2, 4, 8, generator=random)  # keys and values: 32 blocks, 2 heads
exact = reference_paged_attention(q.double(), *cache.double(), batch, 8**-0.5)

slots = torch.tensor([table.slot(p) for table in held for p in range(table.num_tokens)])
poisoned = torch.full_like(cache, torch.nan)
poisoned[:, slots // 4, :, slots % 4] = cache[:, slots // 4, :, slots % 4]
tables = torch.tensor([(table.blocks + 5 * [1_000_000])[:5] for table in held])


def error(attention) -> float:
    return float((attention(q, *cache, batch, 8**-0.5) - exact).abs().max())


for attention in (by_gathering, online):
    with_poison = attention(q, *poisoned, replace(batch, block_tables=tables), 8**-0.5)
    assert torch.equal(with_poison, attention(q, *cache, batch, 8**-0.5))
    assert error(attention) < 1e-5
    print(f"off by {error(attention):.0e}, and exactly the same with poison")

# %% [markdown]
# (Your functions cut off the end of the last block. Fast attention multiplies whole blocks and
# gives empty slots weight zero. But zero times NaN is NaN, and an earlier owner may have left one,
# so the engine clears a block before its first slot is written.)
#
# Now three mistakes that look like good ideas:


# %%
class ForgetsToRescale(BlockByBlock):
    def merge(self, one: Partial, two: Partial) -> Partial:  # "just add them up"
        return torch.maximum(one[0], two[0]), one[1] + two[1], one[2] + two[2]


class ReadsTheTail(BlockByBlock):
    def filled(self, first: int, block_size: int, span: Span) -> int:
        return block_size  # "the mask hides the rest"

    def hidden(self, positions: Tensor, span: Span) -> Tensor:
        # "a decode sees everything, it needs no mask"
        return super().hidden(positions, span) & (span.query_len > 1)


class SeesOneAhead(BlockByBlock):
    def hidden(self, positions: Tensor, span: Span) -> Tensor:
        return super().hidden(positions - 1, span)  # off by one


for attention in (ForgetsToRescale(), ReadsTheTail(), SeesOneAhead(), BlockByBlock()):
    tokens = tokens_with(Parts(paged_attention=attention))
    same = sum(mine == theirs for mine, theirs in zip(tokens, expected, strict=True))
    name, off = type(attention).__name__, error(attention)
    print(f"{name:17} off by {off:5.0e}, {same} of 6 answers the same")
    assert (off < 1e-5) == (name == "BlockByBlock")

# %% [markdown]
# With two of the three bugs the model still gave the same answers. The empty slots held zeros,
# which got little weight, and seeing one token ahead did this model no harm. Models are robust, and
# so they hide bugs. That is why attention is compared with a specification, element by element.
#
# ### Exercise: merge finished results
#
# Kernels often return the divided output $o$ and the logarithm of the denominator,
# $\text{lse} = \log \sum_t \exp(\text{score}_t)$. The two are enough to merge the results over two
# sets of keys, such as the earlier and the new tokens of a prompt (vLLM's `merge_attn_states`). The
# mean below is wrong. Replace the body, and run this cell and the next one again.

# %%
Finished = tuple[Tensor, Tensor]  # output: [queries, head_dim], lse: [queries, 1]


def merge_finished(one: Finished, two: Finished) -> Finished:
    """The result over the keys of both, from the results over the keys of each."""
    return (one[0] + two[0]) / 2, torch.maximum(one[1], two[1])  # your turn


# %%
def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Finished:
    scores = queries @ keys.T
    return scores.softmax(-1) @ values, scores.logsumexp(-1, keepdim=True)


def check_exercise(merge_finished) -> bool:
    """Compare with attention over all keys at once."""
    random, solved = torch.Generator().manual_seed(0), True
    queries, keys, values = torch.randn(3, 24, 8, generator=random, dtype=torch.float64)
    empty = torch.zeros(24, 8, dtype=torch.float64), torch.full((24, 1), -inf, dtype=torch.float64)
    cases = {
        "12 keys and 12": (1, [12, 12]),
        "six parts": (1, [1, 2, 3, 4, 5, 9]),
        "scores up to 5,000": (500, [5, 8, 11]),
        "no keys and 24": (1, [0, 24]),
    }
    for name, (factor, sizes) in cases.items():
        splits = zip(keys.split(sizes), values.split(sizes), strict=True)
        parts = [attend(factor * queries, *part) if len(part[0]) else empty for part in splits]
        expected, merged = attend(factor * queries, keys, values), parts[0]
        for part in parts[1:]:
            merged = merge_finished(merged, part) or (torch.full_like(expected[0], torch.nan),) * 2
        errors = [float((a - b).abs().max()) for a, b in zip(merged, expected, strict=True)]
        print(f"{name:19} error of output and lse, yours: {errors[0]:.0e} and {errors[1]:.0e}")
        solved = solved and all(each < 1e-9 for each in errors)
    print("expected: below 1e-09")
    return solved


print("solved" if check_exercise(merge_finished) else "not solved yet")

# %% [markdown]
# <details markdown="1"><summary>Hint</summary>
#
# The denominator of a part is $\exp(\text{lse})$, so its numerator is $\exp(\text{lse})\, o$. Add
# the numerators, add the denominators, and divide. As in `merge`, subtract a maximum first, or
# large scores overflow. (`torch.logaddexp` adds two denominators safely.)
#
# </details>
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# def merge_finished(one: Finished, two: Finished) -> Finished:
#     """The result over the keys of both, from the results over the keys of each."""
#     lse = torch.logaddexp(one[1], two[1])
#     return (one[1] - lse).exp() * one[0] + (two[1] - lse).exp() * two[0], lse
# ```
#
# Each factor is a part's share of the common denominator.
#
# </details>
#
# <details markdown="1"><summary>Your predictions</summary>
#
# C's tenth token sees 10 keys in 3 blocks, and leaves out 2 slots of the last. The step has 3
# queries and 5 + 6 + 7 = 18 pairs. The sum is multiplied by $\exp(2 - 5)$, about 0.05.
#
# </details>
#
# ## Questions
#
# **`merge` does not depend on the order of blocks. May a block table be sorted, then?**
#
# <details markdown="1"><summary>Answer</summary>
#
# No: an entry's index determines the positions in its block, which the mask needs. But the blocks
# may be *visited* in any order, even in parallel.
#
# </details>
#
# **In a prefill of 1,000 tokens, how much of the work of `BlockByBlock` is wasted, and how would
# you save it?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Almost half: all queries are multiplied with all blocks, and later keys are masked. Process the
# queries in groups, and let each group stop at the block of its last query, as the library's Triton
# kernel for prompts does.
#
# </details>
#
# ## Results
#
# The keys and values that one layer moves in a decode step of a sequence of 2,000 tokens, with the
# heads of OPT-13B (40 of 128 elements, 2 bytes each):

# %%
per_token = 2 * 40 * 128 * 2  # keys and values
print(f"gathered:     {2000 * per_token / 2**20:4.1f} MiB, read, written and read again")
print(f"blocks of 16: {16 * per_token / 2**20:4.1f} MiB at a time, read once")

# %% [markdown]
# Write the library's two versions in [lab 3](labs/03.md). Next: [whole models on
# pages](05_models_on_pages.md).
