# %% [markdown]
# # 11. From that kernel to the speed of light (GQA packing, split-KV, roofline)
#
# What bounds attention, how far chapter 10's kernel is from it, and the two changes that bring it
# near.
#
# ## Goals
#
# - How to work out the least time that a kernel can take, before you write it.
# - Why query heads that share a KV head belong in one program, and long sequences in several.
# - How pieces of a softmax become the whole again, exactly.
#
# ## Invariants
#
# 1. The answer does not depend on how the work is cut: by heads, by pieces, by programs.
# 2. Each key and each value is read from memory once a step, for all query heads that need it.
# 3. A piece with nothing in it changes nothing.
#
# ## Predict
#
# Llama 3 8B has 32 query heads over 8 KV heads of 128 elements. A GPU does 150 to 300 operations in
# the time in which one byte arrives from its memory.
#
# - How many operations does decode attention do for each byte of keys and values that it reads,
#   with two bytes per element?
# - How often does the kernel of chapter 10 read each key?
# - One sequence decodes on a GPU that holds 528 programs at a time. How many does a program for
#   each sequence and KV head give?
#
# ## Build it: first bytes and operations
#
# A sequence of $L$ tokens decodes one token, with $H$ query heads over $K$ KV heads of $D$ elements
# of $b$ bytes. It must read all keys and values, and with each element of a key it does a
# multiplication and an addition for every query head that shares the key, and the same for values:
#
# $$
# \text{bytes} = 2 L K D b, \qquad \text{operations} = 4 L H D, \qquad
# \frac{\text{operations}}{\text{bytes}} = \frac{2 H}{K b}
# $$
#
# $L$ is gone from the last: decode attention does few operations for each byte, however long the
# sequence is. A prompt is different. There $L$ queries share what is read, and in
# $L H / ((K + H) b)$ the length remains (half of the pairs are hidden; queries and results are read
# and written, too).
#
# A *roofline* is the picture that goes with this. To the left memory is the limit: operations a
# second are bandwidth times operations per byte. To the right the arithmetic is. The dots are
# decode with 1, 4 and 8 query heads per KV head, and whole prompts of Llama 3 8B, on the line of
# the H100. Peak numbers are those of NVIDIA's data sheets: for dense matrices in bfloat16, which no
# program quite reaches.

# %% The roofline of three GPUs: decode sits far to the left, where only bytes count
import math

import drawing

GPUS = {  # bytes a second, operations a second
    "A100 80 GB SXM": (2.04e12, 312e12),
    "H100 SXM": (3.35e12, 989e12),
    "H200": (4.8e12, 989e12),
}


def decode_intensity(heads: int, kv_heads: int, num_bytes: int = 2) -> float:
    return 2 * heads / (kv_heads * num_bytes)


def prefill_intensity(length: int, heads: int, kv_heads: int, num_bytes: int = 2) -> float:
    return length * heads / ((kv_heads + heads) * num_bytes)


points = {
    "decode, 1": decode_intensity(40, 40),
    "decode, 4": decode_intensity(32, 8),
    "decode, 8": decode_intensity(64, 8),
    "prompt of 512": prefill_intensity(512, 32, 8),
    "prompt of 2,048": prefill_intensity(2048, 32, 8),
}
figure, axes = drawing.picture(7.2, 3.6)
xs = [2 ** (power / 4) for power in range(-4, 45)]
for colour, (name, (bandwidth, operations)) in enumerate(GPUS.items()):
    ys = [min(x * bandwidth, operations) / 1e12 for x in xs]
    axes.plot(xs, ys, label=name, color=drawing.COLOURS[colour])
for name, x in points.items():
    y = min(x * GPUS["H100 SXM"][0], GPUS["H100 SXM"][1]) / 1e12
    axes.plot([x, x], [0.1, y], color=drawing.GREY, lw=0.8, linestyle=":")
    axes.plot([x], [y], marker="o", color=drawing.COLOURS[1])
    axes.text(x * 1.08, 0.12, name, rotation=90, ha="left", va="bottom", fontsize=8)
axes.set(xscale="log", yscale="log", ylim=(0.1, 1500), xlabel="operations per byte")
axes.set(ylabel="10¹² operations a second, at most")
axes.legend(loc="upper left", fontsize=8)

# %%
for name, (bandwidth, operations) in GPUS.items():
    share = points["decode, 4"] * bandwidth / operations
    print(f"{name:15} {operations / bandwidth:3.0f} operations in the time of a byte,", end=" ")
    print(f"{share:.1%} of them used by decode, 4")

# %% [markdown]
# So for decode the arithmetic is free, and the *floor* is bytes over bandwidth. To come near it,
# two things are needed. Read each byte once, and have so many reads under way that the memory never
# waits.
#
# ### Read each key once
#
# In *grouped-query attention* (GQA) several query heads share a KV head. Chapter 10 gave each query
# head a program, and each of them read the same keys. How often, exactly? Under the interpreter
# that can be counted: all loads go through one function, which gets the addresses. We put a counter
# before it.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from minipaged.attention.triton.machine import why_no_triton

CPU = torch.device("cpu")
if reason := why_no_triton(CPU, head_dim=64):
    drawing.stop(f"This chapter ends here: {reason}. Its page shows what it would have printed.")

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from minipaged.attention.batch import Batch
from minipaged.attention.reference import gather, reference_paged_attention
from minipaged.attention.triton.decode import decode
from minipaged.attention.triton.naive_decode import naive_paged_attention
from minipaged.evaluation.bench.cases import Case, Heads, make_inputs


@contextmanager
def counted_reads(tensor: Tensor) -> Generator[Any, None, None]:
    """How often each element of the tensor is loaded by the kernels that run inside."""
    begin, size, times = tensor.data_ptr(), tensor.itemsize, numpy.zeros(tensor.numel(), int)
    load = interpreter_builder.create_masked_load

    def counting(addresses: Any, mask: Any, *others: Any) -> Any:
        loaded = addresses.data[mask.data].astype(numpy.int64)
        inside = loaded[(loaded >= begin) & (loaded < begin + tensor.nbytes)]
        numpy.add.at(times, (inside - begin) // size, 1)
        return load(addresses, mask, *others)

    interpreter_builder.create_masked_load = counting
    try:
        yield times
    finally:
        interpreter_builder.create_masked_load = load


four_share_one = Heads("four query heads share one KV head", heads=4, kv_heads=1, head_dim=64)
inputs = make_inputs(Case(four_share_one, num_seqs=1, length=320), CPU, torch.float32)
arguments = inputs.q, inputs.k_cache, inputs.v_cache, inputs.batch, inputs.scale


def packed(splits: int) -> Tensor:
    out = torch.empty_like(inputs.q)
    decode(*arguments, out, to_fill=splits)
    return out


kernels = {
    "naive, a program per query head": lambda: naive_paged_attention(*arguments),
    "packed, a program per KV head": lambda: packed(splits=1),
    "packed, and cut in two": lambda: packed(splits=2),
}
times_read, answers = {}, {}
for name, kernel in kernels.items():
    with counted_reads(inputs.k_cache) as times:
        answers[name] = kernel()
    times_read[name] = set(times.tolist())
    print(f"{name:32} times that each element of the keys is read: {times_read[name]}")

# %% [markdown]
# The library's `decode` reads each element of each key once. One program serves one *KV* head: its
# query heads are the rows of one matrix, a tile of keys is another, and `tl.dot` multiplies them at
# once. That is also what lets the *tensor cores* do it, the units of a GPU that multiply matrices
# and hold nearly all of its arithmetic. They take 16 rows at least, so with four heads a group
# twelve rows are zeros: wasted arithmetic, which is free, for saved reads, which are not. (On a GPU
# a cache catches some of the naive kernel's repeated reads. How many depends on the order of
# execution, so do not rely on it.)
#
# ```mermaid
# flowchart LR
#   q0["head 0: a program"] --> k0[(keys)]
#   q1["head 1: a program"] --> k0
#   q2["head 2: a program"] --> k0
#   q3["head 3: a program"] --> k0
#   q["heads 0 to 3: one program"] --> k1[(keys)]
# ```
#
# The tile is not the block: blocks of 16 waste little memory (chapter 3), but a tile of 64
# positions is what the hardware likes to load and multiply. Each position of a tile is looked up in
# the block table on its own, so a tile may cross blocks, and its size is chosen by what the
# hardware has room for:
#
# @@ minipaged.attention.triton.decode.choose_tile
#
# ### Cut long sequences
#
# Packing leaves fewer programs: sequences times KV heads. A GPU has some hundred *multiprocessors*
# (SMs), an H100 132, and each holds several programs at a time: four of `decode`, as you will see.
# One sequence over 8 KV heads is 8 programs for 528 places: the memory waits. So a sequence is cut
# into *splits* of neighbouring positions, a program each (this is known as flash-decoding, or
# split-KV). Each gives an answer as if its keys were all, and a second kernel merges the answers.
# Write the two parts in PyTorch first. A piece returns its output, and the logarithm of the sum of
# its weights:


# %%
def attend_to_piece(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [heads, dim], keys and values [length, kv_heads, dim] -> [heads, dim] and [heads]."""
    group = q.shape[0] // keys.shape[1]
    keys, values = (each.repeat_interleave(group, dim=1) for each in (keys, values))
    scores = scale * torch.einsum("hd,lhd->hl", q, keys)
    log_sum = scores.logsumexp(dim=1)
    weights = (scores - log_sum[:, None]).exp()  # they add up to 1
    return torch.einsum("hl,lhd->hd", weights, values), log_sum


def merge(outputs: Tensor, log_sums: Tensor) -> Tensor:
    """outputs [pieces, heads, dim], log_sums [pieces, heads] -> [heads, dim]."""
    largest = log_sums.amax(dim=0)
    shares = (log_sums - largest).exp()
    shares = shares / shares.sum(dim=0)  # of each piece in the whole
    return (shares[:, :, None] * outputs).sum(dim=0)


# %% [markdown]
# Why this is exact: a piece $p$ has divided by its own sum $S_p = \sum_i e^{s_i}$, and the whole
# would have divided by the sum of all. So the whole is $\sum_p S_p o_p / \sum_p S_p$, an average of
# the pieces' answers, each weighted by its sum. The sums themselves would overflow, so their
# logarithms are kept, and the largest is subtracted before they come back.

# %%
generator = torch.Generator().manual_seed(0)
q, keys, values = (
    torch.randn(shape, generator=generator, dtype=torch.float64)
    for shape in ((4, 64), (1000, 2, 64), (1000, 2, 64))
)
q *= 2
whole, _ = attend_to_piece(q, keys, values, 0.125)
pairs = zip(keys.split(256), values.split(256), strict=True)  # 256, 256, 256 and 232 positions
pieces = [attend_to_piece(q, k, v, 0.125) for k, v in pairs]
outputs, log_sums = (torch.stack(each) for each in zip(*pieces, strict=True))
print(f"merged, difference to the whole: {(merge(outputs, log_sums) - whole).abs().max():.0e}")

# %% [markdown]
# The library's kernel does the same in base 2, because a GPU has an instruction for $2^x$. How many
# splits? As many as make programs for all places, and no more, or the last ones would wait for a
# place:
#
# @@ minipaged.attention.triton.splits.splits_to_fill
#
# Programs that fit at the same time are a *wave*. If there are two waves and the second has one
# program in it, the GPU stands idle for half of the time. Here is the share of the places that are
# used, by the number of splits, for a GPU with 132 multiprocessors and 8 KV heads:

# %% Places of the GPU in use, by splits of each sequence; the dots are the library's choice
from minipaged.attention.triton.splits import PROGRAMS_PER_SM, splits_to_fill

places = 132 * PROGRAMS_PER_SM
figure, axes = drawing.picture(7.2, 3.0)
for colour, num_seqs in enumerate((1, 4, 16, 64)):

    def in_use(splits: int, num_seqs: int = num_seqs) -> float:
        programs = num_seqs * 8 * splits
        return 100 * programs / (places * math.ceil(programs / places))

    splits = list(range(1, 129))
    axes.plot(splits, [in_use(s) for s in splits], color=drawing.COLOURS[colour], lw=1)
    chosen = splits_to_fill(num_seqs, kv_heads=8, num_sms=132)
    axes.plot([chosen], [in_use(chosen)], marker="o", color=drawing.COLOURS[colour])
    axes.plot([], [], color=drawing.COLOURS[colour], label=f"batch of {num_seqs}")
    used, uncut = in_use(chosen), in_use(1)
    print(f"batch of {num_seqs:2}: {chosen:2} splits, {used:5.1f} % in use (uncut {uncut:4.1f} %)")
ticks = [1, 2, 4, 8, 16, 32, 64, 128]
axes.set(xscale="log", xticks=ticks, xticklabels=ticks, ylim=(0, 105))
axes.set(xlabel="splits of each sequence", ylabel="places in use, %")
axes.legend(fontsize=8, loc="lower right")

# %% [markdown]
# A batch of 64 needs no cut. One sequence alone would leave 98 of 100 places empty. And one long
# sequence among many short ones would still be read by eight programs after all others have ended.
# So the library also cuts by length: every 4,096 positions at least, and never into pieces below
# 256.
#
# The model runs on your pieces, too. Here every sequence is cut after each 16 positions, far more
# than is sensible:

# %%
from minipaged import LLM, Parts, SamplingParams
from minipaged.evaluation.stories import prompt, tell


def attention_in_pieces(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, scale: float
) -> Tensor:
    if batch.has_prefills:
        return reference_paged_attention(q, k_cache, v_cache, batch, scale)
    out = torch.empty_like(q)
    for row, (span, table) in enumerate(zip(batch.spans, batch.block_tables, strict=True)):
        keys, values = (gather(cache, table, span.seq_len) for cache in (k_cache, v_cache))
        pairs = zip(keys.split(16), values.split(16), strict=True)
        pieces = [attend_to_piece(q[row], k, v, scale) for k, v in pairs]
        out[row] = merge(*(torch.stack(each) for each in zip(*pieces, strict=True)))
    return out


stories = [tell(num_facts=size, seed=size) for size in (1, 4, 8)]
prompts = [prompt(story, story.questions[0]) for story in stories]
greedy = SamplingParams(temperature=0, max_tokens=24)
yours = LLM(num_blocks=40, device="cpu", parts=Parts(paged_attention=attention_in_pieces))
served = yours.generate(prompts, greedy, use_tqdm=False)
for output in served:
    print(len(output.prompt_token_ids), "tokens:", output.outputs[0].text)

# %% [markdown]
# ### What the compiler says
#
# A kernel can be right, read each byte once, and still be slow, because it does not fit. A
# multiprocessor has 65,536 *registers*, where threads keep their values, and some 160 to 230 KiB of
# *shared memory*, where tiles wait. What finds no register is *spilled* to the far memory. All of
# that is decided by the compiler, and the compiler needs no GPU. `minipaged bench compile` does it
# for every kernel. Here are two, as for Llama 3 8B, in a process of their own, since in this one
# kernels are interpreted:

# %%
import subprocess
import sys

COMPILE = """
import torch
from minipaged.evaluation.bench.compile import *

llama = Setting(heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16, kv_dtype="auto")
with catch_launches() as launches:
    launch_everything(llama)
kernels = {launch.kernel.__name__: launch for launch in reversed(launches)}
for name in ("naive_kernel", "decode_kernel"):
    for sm in (80, 90):
        row = compile_launch(kernels[name], llama, sm)
        print(f"{row.kernel:7} sm_{sm} {row.registers:4} registers, {row.stack_bytes} spilled",
              f"{row.shared_bytes:7,} shared bytes, {row.programs} programs, {row.instructions}")
"""
process = subprocess.run(
    [sys.executable, "-c", COMPILE],
    env={**os.environ, "TRITON_INTERPRET": "0"},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
)
print(process.stdout)

# %% [markdown]
# (sm_80 is Ampere, as in an A100; sm_90 is Hopper, as in an H100 and H200.) `HMMA` is a
# multiplication by the tensor cores: `decode` has it, the naive kernel does not. With Triton 3.9,
# `decode` uses 128 registers in each of 128 threads: four programs take all that a multiprocessor
# has, and spill nothing. While one waits for its next tile of keys and values, the others multiply.
# Larger tiles, more stages and other variants were tried and rejected by such
# tables: [what was tried](../kernels.md) lists them, with what was expected and what was found.
#
# ### Fewer bytes
#
# When bytes are the floor, halve the bytes. With `kv_cache_dtype="int8"` a key is stored as 8-bit
# elements and one scale, 132 bytes in place of 256. The kernels multiply no key by its scale: $q
# \cdot (c\,k) = c\,(q \cdot k)$, so the score is multiplied, once. It costs some accuracy. This is
# the error of attention over 1,024 random keys, against float64:

# %%
from minipaged.evaluation.bench.formats import attention_error

error_of = {kept_as: attention_error(kept_as) for kept_as in ("float16", "bfloat16", "int8", "fp8")}
for kept_as, error in error_of.items():
    print(f"{kept_as:9} {error:.4f}")

# %% [markdown]
# ### Fewer launches
#
# Launching a kernel costs the host a few microseconds, and a decode step has hundreds. If the GPU
# is done with one before the next is started, it waits. A *CUDA graph* records all launches of a
# step once; replaying them is one launch. It needs the same grids and addresses each time. That is
# why the splits of each sequence are computed on the GPU, from lengths in its memory, and the grid
# has room for the largest possible number.
#
# ### What was not measured
#
# **No GPU has run these kernels yet.** The byte, wave and register figures above are counted, not
# measured, and a floor is not a speed. On a machine with a GPU this command measures every kernel
# against the bandwidth of a large copy and against PyTorch's attention over contiguous keys:
#
# ```sh
# minipaged bench kernel --save kernel.json
# ```
#
# The same thinking can be tried where you are. A processor has a floor, too: the bytes of keys and
# values over the bandwidth of a large copy. The library's PyTorch attention, 32 sequences of 1,024
# tokens in float32:

# %%
from minipaged.attention.backend import BACKENDS
from minipaged.evaluation.bench.timing import copy_work, median_seconds

on_cpu = make_inputs(Case(Heads("no groups", 8, 8, 128), 32, 1024), CPU, torch.float32)
torch_backend = BACKENDS["torch"]
batch = torch_backend.prepare(on_cpu.batch, on_cpu.k_cache, 8, torch.float32)  # once per step
tensors = on_cpu.q, on_cpu.k_cache, on_cpu.v_cache, batch, on_cpu.scale
copy, copied_bytes = copy_work(CPU)
works = {"copy": copy, "attention": lambda: torch_backend.paged_attention(*tensors)}
seconds = median_seconds(works, CPU, rounds=5)  # alternately, so both see the same background load
read_bytes = on_cpu.k_cache.nbytes + on_cpu.v_cache.nbytes
floor_seconds = read_bytes * seconds["copy"] / copied_bytes
print(f"{read_bytes / 1e6:.0f} MB of keys and values")
print(f"attention reaches about {floor_seconds / seconds['attention']:.0%} of a copy's bandwidth")

# %% [markdown]
# Your figure will be another, and it changes from run to run. What is left over between it and 100
# % is the room for a better kernel, and never more than that. [Fast on a plain CPU](../speed.md)
# does this for a whole step.
#
# ## Check
#
# All kernels agree with the reference, keys are read as often as was said, tokens are the
# library's, and pieces make the whole.

# %%
expected = reference_paged_attention(*arguments)
for name, answer in answers.items():
    assert torch.allclose(answer, expected, atol=1e-5), name
assert list(times_read.values()) == [{4}, {1}, {1}]

library = LLM(num_blocks=40, device="cpu").generate(prompts, greedy, use_tqdm=False)
assert [o.outputs[0].token_ids for o in served] == [o.outputs[0].token_ids for o in library]
assert yours.engine.scheduler.memory.num_free == 40

merged = merge(outputs, log_sums)
assert (merged - whole).abs().max() < 1e-13
print("same answers, same tokens, and the pieces are the whole")

# %% [markdown]
# Two mistakes. The first is to forget what each piece was divided by. The second is a piece with
# nothing in it: a batch of a long and a short sequence has the same number of pieces for both, and
# some of the short one's are after its end. All their scores are $-\infty$.

# %%
lengths = torch.tensor([256.0, 256, 256, 232], dtype=torch.float64)
wrong = {
    "a plain average": outputs.mean(dim=0),
    "weighted by their lengths": (lengths[:, None, None] * outputs).sum(dim=0) / lengths.sum(),
}
for name, answer in wrong.items():
    error = ((answer - whole).norm() / whole.norm()).item()
    print(f"{name:26} is off by {error:.0%}")
    assert error > 0.1, f"not noticed: {name}"

hidden = torch.full((4, 256), -torch.inf, dtype=torch.float64)
empty_log_sum = hidden.logsumexp(dim=1)
empty_output = (hidden - empty_log_sum[:, None]).exp() @ values[:256, 0]
with_empty = torch.cat((outputs, empty_output[None])), torch.cat((log_sums, empty_log_sum[None]))
print(f"{'with an empty piece':26}   {merge(*with_empty)[0, :3].tolist()}")
assert merge(*with_empty).isnan().all()

written = (with_empty[1] > -torch.inf)[:, :, None]
mended = merge(with_empty[0].where(written, 0), with_empty[1])
assert torch.equal(mended, merged)
print(f"{'... and its output ignored':26}   as before, to the last bit")

# %% [markdown]
# An empty piece has the share 0, but its output is $e^{-\infty - (-\infty)}$, NaN, and 0 times NaN
# is NaN. The library's merge does not load what no program wrote: `written` is the mask of its
# loads.
#
# <details markdown="1"><summary>Your predictions</summary>
#
# Decode does 4 operations a byte, where 150 to 300 would be free. The kernel of chapter 10 reads
# each key four times, once for each query head of its group. And one sequence is 8 programs, for
# 528 places.
#
# </details>
#
# ## Questions
#
# **OPT 13B has 40 query heads over 40 KV heads. What does packing gain there?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Nothing in bytes: a group is one head, and each key is read once anyway. What remains are wide
# tiles, reads that are under way early, and splits. Per byte it does one operation, so it is even
# further on the left of the roofline, and its cache is much larger: 40 KV heads instead of 8.
#
# </details>
#
# **Why not cut every sequence into 128 pieces, always?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Each piece writes a partial output and the merge reads it again: bytes that are not keys. A piece
# of a few positions is mostly beginning and end. And if the batch fills the GPU already, more
# programs wait in more waves without anything being gained.
#
# </details>
#
# **The model's weights are read once a step as well. When do keys and values weigh more?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Llama 3 8B has 16 GB of weights in half precision, and 131 KB of keys and values a token in its 32
# layers. From 122,000 tokens on, all sequences together, attention reads more than everything else.
# 64 sequences of 2,000 tokens are there.
#
# </details>
#
# ## Results
#
# One layer of Llama 3 8B, 64 sequences that decode after 1,024 tokens, and the floor on an H200
# from its published bandwidth. Computed, not measured:

# %%
one_layer = 64 * 1024 * 2 * 8 * 128 * 2
ways = {
    "a program per query head": 4 * one_layer,
    "each key once": one_layer,
    "each key once, int8": one_layer * 132 // 256,
}
for name, num_bytes in ways.items():
    microseconds = 1e6 * num_bytes / GPUS["H200"][0]
    print(f"{name:25} {num_bytes / 1e6:7,.0f} MB  at least {microseconds:4.0f} us")

# %% [markdown]
# Next: [one token, from the prompt to the screen](12_one_tokens_journey.md).
