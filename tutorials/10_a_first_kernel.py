# %% [markdown]
# # 10. A first Triton kernel, under the interpreter
#
# You write a kernel that reads keys and values in place, through the block table, and the engine
# generates with it.
#
# **Needs** [chapter 4](04_paged_attention.md) · **Time** 40 minutes · **Lab**
# [8, a Triton decode kernel](labs/08.md)
#
# ![One program per sequence and head reads its blocks through the block table.](openings/10.svg)
#
# ## Goals
#
# - How a GPU program finds its data: a program number, a base address, strides and a mask.
# - How twenty lines read a block table and compute attention without copying a key (Figure 5 of the
#   paper; section 5.1 names the kernel).
# - How to test a kernel so that the usual mistakes cannot hide, on a machine without a GPU.
#
# ## Invariants
#
# 1. A kernel returns what the reference attention returns, for every length: one token, a block
#    that is exactly full, one token more.
# 2. It never uses an element after the end of a sequence, nor an entry after the end of its block
#    table.
# 3. No program needs anything that another one writes: they may run in any order.
#
# ## Predict
#
# Blocks have 4 slots. Four sequences of 1, 4, 5 and 16 tokens decode one token each, with 4 query
# heads over 2 KV heads.
#
# - With one program per sequence and head: how many programs are there, and how many blocks of one
#   head's keys do they read in total?
# - You forget to hide the scores after the end of a sequence. Which of the four outputs are still
#   right?
# - You read every position through the first entry of the block table. Which are right then?
#
# ## Build it: a kernel of your own
#
# A *GPU* runs thousands of copies of one short *program* in parallel, in no defined order. Each
# works on whole *tiles* of elements. The memory is far away: in the time it takes to load one
# number, the GPU can do hundreds of operations. So a program should read each element once, and
# many neighbours at a time.
#
# *Triton* is a language for such programs that looks like Python. Python does not run a function
# under `@triton.jit` (a *kernel*). Triton compiles it for the GPU, and `kernel[grid](...)` starts
# one program for each place in the *grid*. On a machine without a GPU, Triton's *interpreter* runs
# the same text on the CPU with NumPy, one program after another. That is slow, but good for
# checking every index. This turns it on:

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

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
# The simplest useful kernel copies one block per program, for copy-on-write (chapter 7).
# `tl.program_id(0)` is the number of the program. A tensor passed to a kernel arrives as the
# *address* of its first element, and adding `n` gives the address of the element `n` places further
# on. `tl.arange(0, CHUNK)` is a tile of the numbers 0, 1, 2, ..., so
# `pool + start + tl.arange(0, CHUNK)` is a tile of addresses, and `tl.load` reads all of them.
#
# The size of a tile must be a power of two and known when the kernel is compiled (`tl.constexpr`).
# Blocks can have any size, so the last tile may reach past the end of the block. A *mask* excludes
# the elements outside.


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
print("blocks 0 and 3 are copied to 1 and 4, and no other block has changed")

# %% [markdown]
# 80 elements are one tile of 64 and a quarter of the next. Without the mask, the second tile of
# block 1 would overwrite block 2, which may belong to another sequence. The GPU would not report
# it.
#
# ### Scores of one block
#
# Tiles can have rows and columns: `[:, None]` makes a tile a column, `[None, :]` a row, as in
# NumPy. The keys of a block are a tile of `SLOTS` rows and `DIM` columns. The query times each key
# gives the scores (chapter 1). An empty slot gets the score $-\infty$, so that the softmax gives it
# the weight 0.


# %%
@triton.jit
def scores_kernel(out, query, keys, filled, scale, SLOTS: tl.constexpr, DIM: tl.constexpr):
    slots = tl.arange(0, SLOTS)
    dims = tl.arange(0, DIM)
    has_token = slots < filled
    tile = slots[:, None] * DIM + dims[None, :]  # [SLOTS, DIM], row by row, as in memory
    k = tl.load(keys + tile, mask=has_token[:, None], other=0.0)
    scores = tl.sum(k * tl.load(query + dims)[None, :], axis=1) * scale  # [SLOTS]
    scores = tl.where(has_token, scores, float("-inf"))
    tl.device_print("scores", scores)
    tl.store(out + slots, scores)


generator = torch.Generator().manual_seed(0)
query, keys = (torch.randn(n, 16, generator=generator) for n in (1, 4))
out = torch.empty(4)
scores_kernel[(1,)](out, query, keys, 3, 0.25, SLOTS=4, DIM=16)
assert torch.allclose(out[:3], 0.25 * keys[:3] @ query[0], atol=1e-6)

# %% [markdown]
# `tl.device_print` prints the number of the program and the tile. (On a GPU, it prints one line per
# element.) The fourth score is $-\infty$, because the slot is empty.
#
# ### Through the block table
#
# Now the whole kernel. One program serves one sequence and one head, with a single tile that has a
# row for each position. The row of a position is in physical block
# `block_table[position // BLOCK_SIZE]`, slot `position % BLOCK_SIZE`. Each row has an address of
# its own, so the rows need not be neighbours in memory.
#
# A layer's keys are one tensor `[num_blocks, kv_heads, block_size, head_dim]`. To find an element
# in it, start at the address of the first, and for every axis add index times *stride*: the number
# of elements from one index to the next.

# %% Where the elements of one key are: block 4, KV head 1, slot 2, and the stride of each axis
levels = [("block", 6, 4, 128), ("KV head", 2, 1, 64), ("slot", 4, 2, 16), ("", 16, None, 1)]
figure, axes = drawing.picture(7.2, 3.2)
for line, (axis, count, chosen, stride) in enumerate(levels):
    for index in range(count):
        face, ink = ("C0", "white") if index == chosen else ("none", drawing.GREY)
        axes.barh(-line, 1 / count, left=index / count, height=0.5, color=face, edgecolor="#808080")
        name, middle = f"{axis} {index}" if axis else 608 + index, (index + 0.5) / count
        axes.text(middle, -line, name, ha="center", va="center", color=ink, fontsize=8)
    axes.text(1.02, -line, f"stride {stride}", va="center")
    if chosen is not None:  # enlarged in the next line
        for side in (0, 1):
            ends = [(chosen + side) / count, side]
            axes.plot(ends, [-line - 0.25, -line - 0.75], color=drawing.GREY, lw=0.7)
axes.text(0.5, -3.6, "4 · 128 + 1 · 64 + 2 · 16 = 608, the first element of the key", ha="center")
axes.set(xlim=(-0.01, 1.2), ylim=(-3.8, 0.4))
axes.axis("off")

# %% [markdown]
# The kernel converts the table's 32-bit block numbers to 64 bits before it multiplies them by a
# stride. For Llama 3 8B (8 KV heads of 128 elements, blocks of 16 slots) the stride of a block is
# 16,384. In 32 bits the product overflows at block 131,072, where a layer's keys fill 4 GiB in half
# precision, and a large GPU has more than that. With a small pool no test would notice.
#
# Here is the kernel. Type it, and check the shape in each comment:


# %%
@triton.jit
def paged_decode_kernel(
    out, q, k_cache, v_cache, block_tables, seq_lens, scale,
    block_stride, head_stride, slot_stride, table_stride,
    GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // GROUP  # query heads of a group share a KV head
    dims = tl.arange(0, HEAD_DIM)  # [HEAD_DIM]
    positions = tl.arange(0, LENGTH)  # [LENGTH], at least as many as the sequence has
    in_seq = positions < tl.load(seq_lens + seq)
    row = (seq * tl.num_programs(1) + head) * HEAD_DIM + dims
    query = tl.load(q + row).to(tl.float32)  # [HEAD_DIM]

    entries = block_tables + seq * table_stride + positions // BLOCK_SIZE
    blocks = tl.load(entries, mask=in_seq, other=0).to(tl.int64)  # [LENGTH]
    slots = positions % BLOCK_SIZE
    starts = blocks * block_stride + kv_head * head_stride + slots * slot_stride
    tile = starts[:, None] + dims[None, :]  # [LENGTH, HEAD_DIM]
    keys = tl.load(k_cache + tile, mask=in_seq[:, None], other=0.0).to(tl.float32)
    values = tl.load(v_cache + tile, mask=in_seq[:, None], other=0.0).to(tl.float32)

    scores = tl.sum(query[None, :] * keys, axis=1) * scale  # [LENGTH]
    scores = tl.where(in_seq, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=0))
    output = tl.sum(weights[:, None] * values, axis=0) / tl.sum(weights, axis=0)  # [HEAD_DIM]
    tl.store(out + row, output)


# %% [markdown]
# Its *launcher* is plain Python, with the signature of every attention in this library. Each
# sequence has one query, so its length is one more than what is in the cache. The tile must be
# large enough for the longest.

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
            LENGTH=triton.next_power_of_2(int(batch.context_lens.max()) + 1),
        )  # fmt: skip
        return out

    return paged_decode


# %% [markdown]
# Never compute strides from a shape: the tensor may be a part of a larger one.
#
# ### An adversarial test
#
# Random numbers in a tidy pool find few mistakes. Our test shuffles the blocks and puts NaN in
# every free one. Empty slots of last blocks hold large finite values, which must get the weight 0.
# Entries after the end of a block table are invalid. And something changes at each of the four
# lengths.

# %%
from minipaged.attention.batch import BatchBuilder
from minipaged.attention.reference import reference_paged_attention
from minipaged.scheduler.output import SequenceInput

LENGTHS = (1, 4, 5, 16)
HEADS, KV_HEADS, BLOCK_SIZE, HEAD_DIM = 4, 2, 4, 16
tables = [[7], [2], [9, 4], [1, 8, 5, 0]]  # 3 and 6 are free


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

# %% Blocks that each program reads: a row per program, a column per block and KV head
from matplotlib.colors import ListedColormap

reads = torch.zeros(16, 20)
for row in range(16):
    kv_head = row % 4 // 2
    for block in tables[row // 4]:
        reads[row, 2 * block + kv_head] = 1 + kv_head

figure, axes = drawing.picture(7.2, 3.6)
colours = ListedColormap(["none", *drawing.COLOURS[:2]])
axes.pcolormesh(reads, cmap=colours, edgecolors="#80808050")
names = [f"sequence {'ABCD'[row // 4]}, head {row % 4}" for row in range(16)]
axes.set_yticks([row + 0.5 for row in range(16)], names, fontsize=7)
axes.set_xticks(range(1, 20, 2), range(10))
axes.hlines([4, 8, 12], 0, 20, color=drawing.GREY)
axes.set(xlabel="physical block: keys of KV head 0 (left) and of KV head 1 (right)")
axes.invert_yaxis()

# %% [markdown]
# Each of the sixteen programs finds its blocks wherever they are. Heads 0 and 1 of a sequence both
# read KV head 0, so every key is read twice. Chapter 11 changes that.
#
# ### Run the model on it
#
# `Parts` has a role for attention. Your kernel handles one query per sequence, so it serves the
# steps in which all sequences decode. A step with a prompt goes to the reference.

# %%
from minipaged import LLM, Parts, SamplingParams

calls = {"mine": 0, "reference": 0}


def mine_if_it_can(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, scale: float
) -> Tensor:
    name = "reference" if batch.has_prefills else "mine"
    calls[name] += 1
    attention = {"mine": mine, "reference": reference_paged_attention}[name]
    return attention(q, k_cache, v_cache, batch, scale)


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
# Attention is called once for each of the four layers. Two steps had a prompt and went to the
# reference (the second request waits one step, to share the story's block: chapter 8). The three
# others ran on your kernel.
#
# One tile for a whole sequence is simple, but limits the length: 1,024 positions with 64 elements
# of 4 bytes take 256 KiB, which fills all registers of one of a GPU's multiprocessors (chapter 11).
# The library's plain kernel walks the block table instead. It has a tile per block, and keeps three
# results from block to block, as in chapter 4. It also handles prompts, 8-bit pools and heads of
# any size. You write its body in [lab 8](labs/08.md). Compare its launcher with yours:
#
# @@ minipaged.attention.triton.naive_decode.naive_paged_attention
#
# ### Limits of the interpreter
#
# The interpreter tells you nothing about speed. It runs one program after another, so two that
# write to the same place never collide: you have to reason about invariant 3. With float32, as
# here, its results agree with a GPU's, but not with smaller types: in bfloat16, `tl.dot` multiplies
# bit patterns instead of values ([kernels](../kernels.md), "What was tried", lists the others). In
# return, `print` and `breakpoint()` work in an interpreted kernel. Before you trust a kernel, run
# its tests on a GPU as well (the library's are in `tests/attention/test_triton.py`).
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
# Is the test worth anything? Change one line of your kernel at a time, as a tired person would, and
# see which lengths notice. (Triton reads source files, so the changed text goes into one.)

# %%
import inspect
import runpy
import tempfile
from pathlib import Path

MISTAKES = {
    "scores after the end not hidden": ("scores = tl.where(in_seq, scores, float('-inf'))", "pass"),
    "first entry of the table only": ("positions // BLOCK_SIZE", "positions // LENGTH"),
    "stride of another axis": ("kv_head * head_stride", "kv_head * slot_stride"),
    "heads 0 and 2 share a KV head": ("head // GROUP", "head % 2"),
}
source = inspect.getsource(paged_decode_kernel.fn).replace('"', "'")
print(f"{'largest error':31}", *(f"length {length:2}" for length in LENGTHS))
with tempfile.TemporaryDirectory() as folder:
    for name, (right, wrong) in MISTAKES.items():
        assert source.count(right) == 1
        text = "import triton\nimport triton.language as tl\n\n" + source.replace(right, wrong)
        file = Path(folder, "mistaken.py")
        file.write_text(text)
        mistaken = launched(runpy.run_path(str(file))["paged_decode_kernel"])
        wrong_by = errors(mistaken)
        print(f"{name:31}", *(f"{error:9.0e}" for error in wrong_by))
        assert not max(wrong_by) < 1e-2, f"the test does not notice: {name}"

# %% [markdown]
# Look at the columns. With four tokens, exactly a block, the kernel that reads only the first entry
# of the table is right. With 16, exactly the tile, the one that hides nothing is right. A test that
# used only one length (and people always pick the round one) would have passed.
#
# ### Exercise: store the new keys
#
# Before attention, a step writes its new keys and values into their slots (the paper's "fused
# reshape and block write", section 5.1). One program copies one token's key of one KV head. `slots`
# has the slot of each token, counted through the whole pool: `block * BLOCK_SIZE + offset`. The
# pool has no gaps and the layout `[num_blocks, kv_heads, block_size, head_dim]`. At which element
# does the key begin?


# %%
@triton.jit
def store_kernel(
    pool, new, slots, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr
):
    token = tl.program_id(0)
    kv_head = tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    dims = tl.arange(0, HEAD_DIM)
    key = tl.load(new + (token * KV_HEADS + kv_head) * HEAD_DIM + dims)
    start = slot * HEAD_DIM  # your turn
    tl.store(pool + start + dims, key)


# %%
from minipaged.attention.reference import store_kv


def check_exercise(kernel) -> bool:
    """Store 7 tokens into pools of several shapes, and compare with the library's store_kv."""
    solved = True
    for kv_heads, block_size, head_dim in ((1, 4, 16), (2, 4, 16), (3, 5, 32)):
        batch = BatchBuilder(1, 3, block_size).build([SequenceInput(0, [0] * 7, 2, [4, 1, 5])])
        new = torch.arange(1.0, 1 + 7 * kv_heads * head_dim).view(7, kv_heads, head_dim)
        yours, right = torch.zeros(2, 6, kv_heads, block_size, head_dim)
        kernel[(7, kv_heads)](
            yours, new, batch.slot_mapping,
            KV_HEADS=kv_heads, BLOCK_SIZE=block_size, HEAD_DIM=head_dim,
        )  # fmt: skip
        store_kv(new, new, right, right.clone(), batch)
        ends = [(pool == new[-1, -1, 0]).nonzero().tolist() for pool in (yours, right)]
        print(f"KV heads: {kv_heads}, blocks of {block_size:2}, start of the last key:", end=" ")
        print(f"yours at {ends[0]}, expected at {ends[1]}")
        solved = solved and torch.equal(yours, right)
    return solved


print("solved" if check_exercise(store_kernel) else "not solved yet")

# %% [markdown]
# <details markdown="1"><summary>Hint</summary>
#
# With one KV head, slot after slot is right. With two, the keys of KV head 1 begin only after all
# slots that the block has for KV head 0. First compute the block and the offset of the slot.
#
# </details>
#
# <details markdown="1"><summary>Solution</summary>
#
# Take the slot apart, and put it together in the order of the axes: block, KV head, offset,
# element.
#
# ```python
# @triton.jit
# def store_kernel(
#     pool, new, slots, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr
# ):
#     token = tl.program_id(0)
#     kv_head = tl.program_id(1)
#     slot = tl.load(slots + token).to(tl.int64)
#     dims = tl.arange(0, HEAD_DIM)
#     key = tl.load(new + (token * KV_HEADS + kv_head) * HEAD_DIM + dims)
#     block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
#     start = ((block * KV_HEADS + kv_head) * BLOCK_SIZE + offset) * HEAD_DIM
#     tl.store(pool + start + dims, key)
# ```
#
# </details>
#
# <details markdown="1"><summary>Your predictions</summary>
#
# There are 16 programs: 4 sequences times 4 heads. The sequences have 1, 1, 2 and 4 blocks, and
# each of 4 heads reads those of its sequence: 32 blocks of one head's keys. Without the mask, only
# the sequence of 16 tokens is right, because it fills the tile of 16 positions. With the first
# entry only, those of 1 and 4 tokens are right, because they have one block.
#
# </details>
#
# ## Questions
#
# **Why is the mask given to `tl.load`, when the scores of empty slots become $-\infty$ anyway?**
#
# <details markdown="1"><summary>Answer</summary>
#
# A score of $-\infty$ makes the weight 0, and 0 times a finite value is 0, but 0 times NaN is NaN.
# The engine keeps empty slots finite: it clears a block before a sequence writes its first slot. A
# kernel that masks its loads does not depend on this, and saves the read. The block table needs the
# mask, too: after its end there is no valid block number.
#
# </details>
#
# **Blocks of 16 slots and heads of 80 elements: what must change?**
#
# <details markdown="1"><summary>Answer</summary>
#
# `tl.arange` accepts powers of two only. So the tile gets 128 columns, and every load and the store
# get a mask `dims < 80`. Masked columns load 0, which adds nothing to a sum of products. The
# library's kernels call this size `WIDTH`. Block sizes need no change: `LENGTH` counts positions.
#
# </details>
#
# ## Results
#
# What attention moves for the four sequences of the test, in elements of keys and values. The
# reference gathers: it reads each element (of whole blocks), writes it to contiguous memory, and
# reads it again.

# %%
a_slot = 2 * KV_HEADS * HEAD_DIM  # elements of one token's keys and values
gathered = 3 * a_slot * sum(len(blocks) * BLOCK_SIZE for blocks in tables)
in_place = a_slot * sum(LENGTHS) * (HEADS // KV_HEADS)
floor = a_slot * sum(LENGTHS)
print(f"gathered first, elements moved {gathered:6,}  {gathered / floor:.1f} times what is needed")
print(f"your kernel, elements read     {in_place:6,}  {in_place / floor:.1f} times")
print(f"each key and value once        {floor:6,}  1.0 times")

# %% [markdown]
# To write the kernel that walks the table, for sequences of any length and for prompts, take
# [lab 8](labs/08.md).
#
# Next: [from this kernel to the speed of the memory](11_to_the_speed_of_light.md).
