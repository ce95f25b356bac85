# %% [markdown]
# # 10. A first Triton kernel, under the interpreter
#
# You write the paper's kernel, which reads keys and values in place, and the engine generates with
# it.
#
# ## Goals
#
# - How a GPU program finds its data: a number of its own, a base address, strides and a mask.
# - How thirty lines read a block table and compute attention without copying a key (Figure 5 of the
#   paper; section 5.1 names the kernel).
# - How to test a kernel so that the usual mistakes cannot hide, on a machine without a GPU.
#
# ## Invariants
#
# 1. A kernel gives what the reference attention gives, for every length: one token, a block that is
#    exactly full, one token more.
# 2. It never uses an element after a sequence's end, nor an entry after the end of its block table.
# 3. No program needs anything that another one writes: they may run in any order.
#
# ## Predict
#
# Blocks have 4 slots. Four sequences of 1, 4, 5 and 11 tokens decode one token each, with 4 query
# heads, of which pairs share a KV head.
#
# - With a program for each sequence and head: how many programs, and how many blocks of one head's
#   keys do they read together?
# - You forget the mask that hides the empty slots of a last block. Which of the four sequences come
#   out right all the same?
# - You forget to rescale the partial result when a larger score comes. Which do then?
#
# ## Build it: a kernel of your own
#
# A *GPU* runs thousands of copies of one short *program* in parallel, in no defined order. Each
# program works on whole *tiles* of elements. Its threads share a tile, so that each thread holds
# many elements of it, and they all do the same thing at the same time. The memory is large and far
# away: in the time it takes to load one number, the GPU can do hundreds of operations. So a program
# should read little, in wide pieces, and each element once.
#
# *Triton* is a language for such programs that looks like Python. A function under `@triton.jit` (a
# *kernel*) is not run by Python. It is compiled for the GPU, and `kernel[grid](...)` starts as many
# programs as the *grid* has places. Where there is no GPU, Triton's *interpreter* runs the same
# text on the CPU, program after program, tile by tile with NumPy. That is slow, and good for
# checking every index. It is switched on by a variable that must be set before Triton is imported:

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"

import drawing
import torch

from minipaged.attention.triton.machine import why_no_triton

if reason := why_no_triton(torch.device("cpu"), head_dim=64):
    drawing.stop(f"This chapter ends here: {reason}. Its page shows what it would have printed.")

import triton
import triton.language as tl

# %% [markdown]
# ### Load, mask, store
#
# The simplest useful kernel copies blocks, which is what copy-on-write needs (chapter 7). A program
# copies one block. `tl.program_id(0)` says which program this is. A tensor that is passed to a
# kernel arrives as the *address* of its first element; adding `n` to it gives the address of the
# element `n` places further on. `tl.arange(0, CHUNK)` is a tile of the numbers 0, 1, 2, ..., so
# `pool + start + tl.arange(0, CHUNK)` is a tile of addresses, and `tl.load` reads all of them.
#
# The size of a tile must be a power of two and known when the kernel is compiled (`tl.constexpr`).
# Blocks are of any size. So the last tile of a block sticks out, and a *mask* leaves out those
# elements that are outside.


# %%
@triton.jit
def copy_kernel(pool, sources, targets, block_elements, CHUNK: tl.constexpr):
    pair = tl.program_id(0)
    source = pool + tl.load(sources + pair).to(tl.int64) * block_elements
    target = pool + tl.load(targets + pair).to(tl.int64) * block_elements
    for start in range(0, block_elements, CHUNK):
        elements = start + tl.arange(0, CHUNK)
        inside = elements < block_elements
        copied = tl.load(source + elements, mask=inside)
        tl.store(target + elements, copied, mask=inside)


pool = torch.arange(6 * 80.0).view(6, 80)  # 6 blocks of 80 elements: five slots of 16
expected = pool.clone()
expected[[1, 4]] = pool[[0, 3]]
copy_kernel[(2,)](pool, torch.tensor([0, 3]), torch.tensor([1, 4]), 80, CHUNK=64)
assert torch.equal(pool, expected)
print("blocks 0 and 3 are copied to 1 and 4, the others are as they were")

# %% [markdown]
# 80 elements are one tile of 64 and a quarter of the next. Without the mask the second tile of
# block 1 would run on into block 2, which may belong to another sequence. The GPU would not report
# it.
#
# ### One block
#
# Attention of one query over one block: the query times each key, a softmax over those scores, and
# the values weighted by it (chapter 1). Tiles have rows and columns now: `[:, None]` makes a tile a
# column, `[None, :]` a row, as in NumPy. The keys of a block are a tile of `SLOTS` rows and `DIM`
# columns. The softmax has its own mask: a slot without a token gets the score $-\infty$, which is
# the weight 0.


# %%
@triton.jit
def one_block_kernel(
    out, query, keys, values, filled, scale, SLOTS: tl.constexpr, DIM: tl.constexpr
):
    slots = tl.arange(0, SLOTS)
    dims = tl.arange(0, DIM)
    has_token = slots < filled
    tile = slots[:, None] * DIM + dims[None, :]  # row by row, as in memory
    k = tl.load(keys + tile, mask=has_token[:, None], other=0.0)
    v = tl.load(values + tile, mask=has_token[:, None], other=0.0)
    scores = tl.sum(k * tl.load(query + dims)[None, :], axis=1) * scale  # one for each slot
    scores = tl.where(has_token, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=0))
    tl.device_print("weights", weights)
    tl.store(out + dims, tl.sum(weights[:, None] * v, axis=0) / tl.sum(weights, axis=0))


generator = torch.Generator().manual_seed(0)
query, keys, values = (torch.randn(n, 16, generator=generator) for n in (1, 4, 4))
out = torch.empty(1, 16)
one_block_kernel[(1,)](out, query, keys, values, 3, 0.25, SLOTS=4, DIM=16)
expected = (0.25 * query @ keys[:3].T).softmax(dim=1) @ values[:3]
assert torch.allclose(out, expected, atol=1e-6)

# %% [markdown]
# `tl.device_print` is how to look inside. It prints the number of the program and the tile; on a
# GPU as well, a line for each element. The fourth weight is 0: the slot is empty.
#
# ### Through the block table
#
# Now the whole kernel. A program serves one sequence and one head. It walks the sequence's block
# table, and three numbers are all that it keeps from block to block (chapter 4): the largest score
# so far $m$, the sum of the weights so far $\ell$, and the weighted sum of values so far $o$. A
# block with the scores $s_i$ and the values $v_i$ turns them into
#
# $$
# m' = \max(m, \max_i s_i), \qquad
# \ell' = e^{m - m'} \ell + \sum_i e^{s_i - m'}, \qquad
# o' = e^{m - m'} o + \sum_i e^{s_i - m'} v_i
# $$
#
# and at the end $o / \ell$ is the paper's $o_i$ (Equation 4).
#
# A layer's keys are one tensor `[num_blocks, kv_heads, block_size, head_dim]`. To find an element
# in it, begin at the address of the first, and for every axis add index times *stride*: the number
# of elements from one index to the next. This is all the arithmetic that there is:

# %% Where the elements of one key are: block 4, KV head 1, slot 2, and the stride of each axis
levels = [("block", 6, 4, 128), ("KV head", 2, 1, 64), ("slot", 4, 2, 16)]
figure, axes = drawing.picture(7.2, 3.2)
for line, (axis, count, chosen, stride) in enumerate(levels):
    for index in range(count):
        face, ink = ("none", drawing.GREY) if index != chosen else (drawing.COLOURS[0], "white")
        axes.barh(-line, 1 / count, left=index / count, height=0.5, color=face, edgecolor="#808080")
        middle = (index + 0.5) / count
        axes.text(middle, -line, f"{axis} {index}", ha="center", va="center", color=ink)
    axes.text(1.02, -line, f"stride {stride}", va="center")
    for side in (0, 1):  # the chosen part, enlarged in the next line
        ends = [(chosen + side) / count, side]
        axes.plot(ends, [-line - 0.25, -line - 0.75], color=drawing.GREY, lw=0.7)
for number in range(16):
    axes.barh(-3, 1 / 16, left=number / 16, height=0.5, color="none", edgecolor="#808080")
    axes.text((number + 0.5) / 16, -3, 608 + number, ha="center", va="center", fontsize=8)
axes.text(1.02, -3, "stride 1", va="center")
axes.text(0.5, -3.6, "4 · 128 + 1 · 64 + 2 · 16 = 608, the first element of the key", ha="center")
axes.set(xlim=(-0.01, 1.2), ylim=(-3.8, 0.4))
axes.axis("off")

# %% [markdown]
# The block's number comes from the table as 32 bits, and the kernel makes it 64 before it
# multiplies. The reason: Llama 3 8B has 8 KV heads of 128 elements, so a block of 16 slots has
# 16,384 elements of one layer's keys. In 32 bits the product runs over at block 131,072, where the
# layer's keys fill 4 GiB in half precision. That is not much for a large GPU:

# %%
block = torch.tensor(131_072, dtype=torch.int32)
print("in 32 bits:", (block * 16_384).item())
print("in 64 bits:", (block.long() * 16_384).item())

# %% [markdown]
# A negative offset reads before the tensor. With a small pool no test would ever notice.
#
# Here is the kernel. Type it, and say at each line what shape it has:


# %%
@triton.jit
def paged_decode_kernel(
    out, q, k_cache, v_cache, block_tables, seq_lens, scale,
    block_stride, head_stride, slot_stride, table_stride,
    GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // GROUP  # query heads of a group share a KV head
    seq_len = tl.load(seq_lens + seq)
    slots = tl.arange(0, BLOCK_SIZE)
    dims = tl.arange(0, HEAD_DIM)
    row = (seq * tl.num_programs(1) + head) * HEAD_DIM + dims
    query = tl.load(q + row).to(tl.float32)

    maximum = float("-inf")
    total = 0.0
    output = tl.zeros([HEAD_DIM], tl.float32)
    for logical in range(tl.cdiv(seq_len, BLOCK_SIZE)):
        physical = tl.load(block_tables + seq * table_stride + logical).to(tl.int64)
        start = physical * block_stride + kv_head * head_stride
        tile = start + slots[:, None] * slot_stride + dims[None, :]
        in_seq = logical * BLOCK_SIZE + slots < seq_len
        keys = tl.load(k_cache + tile, mask=in_seq[:, None], other=0.0).to(tl.float32)
        values = tl.load(v_cache + tile, mask=in_seq[:, None], other=0.0).to(tl.float32)

        scores = tl.sum(query[None, :] * keys, axis=1) * scale
        scores = tl.where(in_seq, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        correction = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        total = total * correction + tl.sum(weights, axis=0)
        output = output * correction + tl.sum(weights[:, None] * values, axis=0)
        maximum = new_maximum
    tl.store(out + row, output / total)


# %% [markdown]
# Around it goes a *launcher*, plain Python with the signature that every attention of this library
# has. Its batch is to hold sequences with one query each, so the length of each is what is in the
# cache and one more.

# %%
from collections.abc import Callable
from typing import Any

from torch import Tensor

from minipaged.attention.batch import Batch

Attention = Callable[[Tensor, Tensor, Tensor, Batch, float], Tensor]


def launched(kernel: Any) -> Attention:
    def paged_decode(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        num_seqs, heads, head_dim = q.shape
        kv_heads, block_size = k_cache.shape[1:3]
        q = q.contiguous()  # the kernel assumes contiguous rows
        out = torch.empty_like(q)
        kernel[(num_seqs, heads)](
            out, q, k_cache, v_cache, batch.block_tables, batch.context_lens + 1, scale,
            *k_cache.stride()[:3], batch.block_tables.stride(0),
            GROUP=heads // kv_heads, BLOCK_SIZE=block_size, HEAD_DIM=head_dim,
        )  # fmt: skip
        return out

    return paged_decode


# %% [markdown]
# Ask a tensor for its strides and never compute them from its shape: it may be a part of a larger
# one.
#
# ### An adversarial test
#
# Random numbers in a tidy pool find few mistakes. So: blocks in shuffled order; NaN in every free
# block; large finite values in the empty slots of last blocks, which must have the weight zero;
# entries after the ends of shorter tables that are no block at all; and the four lengths at which
# something changes.

# %%
from minipaged.attention.batch import BatchBuilder
from minipaged.attention.reference import reference_paged_attention
from minipaged.scheduler.output import SequenceInput

LENGTHS = (1, 4, 5, 11)
HEADS, KV_HEADS, BLOCK_SIZE, HEAD_DIM = 4, 2, 4, 16
tables = [[7], [2], [9, 4], [1, 8, 5]]  # 0, 3, 6 are free


def adversarial_inputs() -> tuple[Tensor, Tensor, Tensor, Batch, float]:
    generator = torch.Generator().manual_seed(0)
    caches = torch.full((2, 10, KV_HEADS, BLOCK_SIZE, HEAD_DIM), torch.nan)
    queries = []
    for number, (length, blocks) in enumerate(zip(LENGTHS, tables, strict=True)):
        fresh = torch.randn(2, len(blocks), KV_HEADS, BLOCK_SIZE, HEAD_DIM, generator=generator)
        caches[:, blocks] = fresh
        empty = len(blocks) * BLOCK_SIZE - length
        if empty:
            caches[:, blocks[-1], :, -empty:] *= 30
        queries.append(SequenceInput(number, [0], length - 1, blocks))
    batch = BatchBuilder(len(LENGTHS), 4, BLOCK_SIZE).build(queries)
    for row, blocks in zip(batch.block_tables, tables, strict=True):
        row[len(blocks) :] = 10**6
    q = 3 * torch.randn(len(LENGTHS), HEADS, HEAD_DIM, generator=generator)
    return q, caches[0], caches[1], batch, HEAD_DIM**-0.5


def errors(attention: Attention) -> list[float]:
    """The largest error in each sequence."""
    inputs = adversarial_inputs()
    difference = attention(*inputs) - reference_paged_attention(*inputs)
    return difference.abs().amax(dim=(1, 2)).tolist()


mine = launched(paged_decode_kernel)
print("largest error:", f"{max(errors(mine)):.0e}")
assert max(errors(mine)) < 1e-5

# %% Which program reads which blocks: a row is a program, a column one KV head's part of a block
from matplotlib.colors import ListedColormap

reads = torch.zeros(len(LENGTHS) * HEADS, 10 * KV_HEADS)
for row in range(len(reads)):
    sequence, kv_head = row // HEADS, row % HEADS // (HEADS // KV_HEADS)
    for block in tables[sequence]:
        reads[row, KV_HEADS * block + kv_head] = 1 + kv_head

figure, axes = drawing.picture(7.2, 3.6)
colours = ListedColormap(["none", *drawing.COLOURS[:2]])
axes.pcolormesh(reads, cmap=colours, edgecolors="#80808050", linewidth=0.5)
names = [f"sequence {'ABCD'[row // 4]}, head {row % 4}" for row in range(16)]
axes.set_yticks([row + 0.5 for row in range(16)], names, fontsize=7)
axes.set_xticks([2 * block + 1 for block in range(10)], range(10))
axes.hlines([4, 8, 12], 0, 20, color=drawing.GREY, lw=1)
axes.vlines(range(2, 20, 2), 0, 16, color=drawing.GREY, lw=0.6)
axes.set(xlabel="physical block, its part for KV head 0 (left) and for KV head 1")
axes.invert_yaxis()
axes.tick_params(length=0)

# %% [markdown]
# Sixteen programs, and each finds its blocks wherever they are. Programs of one group read the
# same: heads 0 and 1 of a sequence both read KV head 0. So every key is read twice here. Chapter 11
# begins with that.
#
# ### The model runs on it
#
# `Parts` has a role for attention. Your kernel handles one query per sequence, so it takes the
# steps in which all sequences decode; a step with a prompt in it goes to the reference.

# %%
from minipaged import LLM, Parts, SamplingParams

calls = {"mine": 0, "reference": 0}


def mine_if_it_can(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, scale: float
) -> Tensor:
    if batch.has_prefills:
        calls["reference"] += 1
        return reference_paged_attention(q, k_cache, v_cache, batch, scale)
    calls["mine"] += 1
    return mine(q, k_cache, v_cache, batch, scale)


story = "Once upon a time Theo the frog put the white key in the meadow."
prompts = [f"{story}\nQ: Where is the key of Theo?\nA:", f"{story}\nQ: Who is Theo?\nA:"]
greedy = SamplingParams(temperature=0, max_tokens=8)
parts = Parts(paged_attention=mine_if_it_can)
yours = LLM("storyteller", num_blocks=16, device="cpu", parts=parts)
served = yours.generate(prompts, greedy, use_tqdm=False)
for output in served:
    print(output.outputs[0].text)
print(calls)

# %% [markdown]
# Attention is called once for each of the four layers. Two steps had a prompt in them and went to
# the reference (the second request waits one step, to share the story's block with the first:
# chapter 8), the three others were yours.
#
# The library has a kernel of this kind too. It also takes prompts, 8-bit pools and heads of any
# size. It gets no strides of the pool, since the library lays out its pools itself and the order
# never changes. Compare its launcher with yours:
#
# @@ minipaged.attention.triton.naive_decode.naive_paged_attention
#
# ### What the interpreter does not show
#
# It runs one program after the other, so two that write to the same place never meet: rule 3 is
# yours to think through, no test here sees it. It says nothing about speed. And in a few places its
# numbers are not those of a GPU: it multiplies the bit patterns of bfloat16 in `tl.dot` as if they
# were whole numbers, cuts bfloat16 off where a GPU rounds, and loses a carry when it stores float8
# ([kernels](../kernels.md), "What was tried"). With float32, as here, it agrees. Under the
# interpreter a plain `print` works in a kernel, and so does `breakpoint()`. Before you trust a
# kernel, run its tests on a GPU as well: the library's `tests/attention/test_triton.py` takes a GPU
# where there is one, and the interpreter elsewhere.
#
# ## Check
#
# The tokens are those of the library, and every block is free again.

# %%
expected = LLM("storyteller", num_blocks=16, device="cpu").generate(prompts, greedy, use_tqdm=False)
assert [o.outputs[0].token_ids for o in served] == [o.outputs[0].token_ids for o in expected]
assert yours.engine.scheduler.memory.num_free == 16
assert calls["mine"] > calls["reference"]
print("same tokens, and every block is free")

# %% [markdown]
# And is the test worth anything? Change one line of your kernel at a time, as a tired person would,
# and see which lengths notice. (The changed text goes into a file of its own, since Triton reads a
# kernel's source.)

# %%
import inspect
import runpy
import tempfile
from pathlib import Path

MISTAKES = {
    "empty slots not hidden": ("scores = tl.where(in_seq, scores, float('-inf'))", "pass"),
    "output not rescaled": ("output * correction", "output"),
    "stride of another axis": ("kv_head * head_stride", "kv_head * slot_stride"),
    "every head its own KV head": ("head // GROUP", "head % 2"),
}
source = inspect.getsource(paged_decode_kernel.fn).replace('"', "'")
print(f"{'largest error':30}", *(f"length {length:2}" for length in LENGTHS))
with tempfile.TemporaryDirectory() as folder:
    for name, (right, wrong) in MISTAKES.items():
        assert source.count(right) == 1
        text = "import triton\nimport triton.language as tl\n\n" + source.replace(right, wrong)
        file = Path(folder, "mistaken.py")
        file.write_text(text)
        mistaken = launched(runpy.run_path(str(file))["paged_decode_kernel"])
        wrong_by = errors(mistaken)
        print(f"{name:30}", *(f"{error:9.0e}" for error in wrong_by))
        assert not max(wrong_by) < 1e-2, f"the test does not notice: {name}"

# %% [markdown]
# Look at the columns. With four tokens, exactly a block, two of the four mistakes do not show. A
# test that used only one length (and people always pick the round one) would have passed. With five
# tokens the missing rescale does not show either: it takes a larger score in a *later* block, and
# here the first block had the largest.
#
# <details markdown="1"><summary>Your predictions</summary>
#
# There are 16 programs: 4 sequences times 4 heads. The sequences have 1, 1, 2 and 3 blocks, and
# each of 4 heads reads its sequence's: 28 blocks of one head's keys, and as many of values. Without
# the mask that hides empty slots the sequence of 4 tokens is right, for its block has none. Without
# the rescale those of 1 and 4 are right, because they have one block, and that of 5 is right by
# luck.
#
# </details>
#
# ## Questions
#
# **Why is the mask given to `tl.load`, when the scores of empty slots become $-\infty$ anyway?**
#
# <details markdown="1"><summary>Answer</summary>
#
# A score of $-\infty$ makes the weight 0, and 0 times a finite number is 0. The engine keeps empty
# slots finite: it clears a block before a sequence writes its first slot. A kernel that masks its
# loads works without this: the mask gives zeros even where memory holds NaN, and saves the read.
#
# </details>
#
# **Can the first block make `maximum - new_maximum` into $-\infty - (-\infty)$, which is NaN?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Only if all its slots were hidden. A sequence that decodes has at least the token itself, and it
# is in the first block or there is a full one before it. So each block that the loop visits has a
# visible slot, the first `new_maximum` is a number, and $e^{-\infty - m}$ is 0, as it should be.
# Chapter 11 cuts sequences into pieces, and there the question returns.
#
# </details>
#
# **Blocks of 16 slots and heads of 80 elements: what must change?**
#
# <details markdown="1"><summary>Answer</summary>
#
# `tl.arange` takes powers of two only. So the tile gets 128 columns and a mask `dims < 80` in every
# load and in the store, with 0 for the others, which add nothing to a sum of products. That is the
# `WIDTH` of the library's kernels.
#
# </details>
#
# ## Results
#
# What attention moves for the four sequences of the test, in elements of keys and values. The
# reference gathers: it reads each, writes it to contiguous memory, and reads it again. (It takes
# whole blocks, empty slots and all.)

# %%
a_slot = 2 * KV_HEADS * HEAD_DIM  # elements of one token's keys and values
gathered = 3 * a_slot * sum(len(blocks) * BLOCK_SIZE for blocks in tables)
in_place = a_slot * sum(LENGTHS) * (HEADS // KV_HEADS)
floor = a_slot * sum(LENGTHS)
print(f"gathered first, elements moved {gathered:6,}  {gathered / floor:.1f} times what is needed")
print(f"your kernel, elements read     {in_place:6,}  {in_place / floor:.1f} times")
print(f"each key and value once        {floor:6,}  1.0 times")

# %% [markdown]
# Next: [from this kernel to the speed of the memory](11_to_the_speed_of_light.md).
