# %% [markdown]
# # 11. From that kernel to the speed of light (GQA packing, split-KV, roofline)
#
# What limits attention, how far chapter 10's kernel is from that limit, and the two changes that
# bring it near.
#
# **Needs** [chapter 10](10_a_first_kernel.md) · **Time** 40 minutes
#
# ![One program serves all heads that share keys; a long sequence gets several.](openings/11.svg)
#
# ## Goals
#
# - How to compute the least time that a kernel can take, before you write it.
# - Why query heads that share a KV head belong in one program, and long sequences in several.
# - How to merge the pieces of a softmax exactly.
#
# ## Invariants
#
# 1. The output does not depend on how the work is divided: by heads, by pieces, by programs.
# 2. Each key and each value is read from memory once per step, for all query heads that need it.
# 3. An empty piece changes nothing.
#
# ## Predict
#
# Llama 3 8B has 32 query heads over 8 KV heads of 128 elements. A GPU does 150 to 300 operations in
# the time in which one byte arrives from its memory.
#
# - How many operations does decode attention do per byte of keys and values that it reads, with two
#   bytes per element?
# - How many times does the kernel of chapter 10 read each key?
# - One sequence decodes on a GPU that runs 528 programs at a time. With one program per sequence
#   and KV head, how many programs are there?
#
# ## Build it: a floor, and three kernels
#
# A sequence of $L$ tokens decodes one token, with $H$ query heads over $K$ KV heads of $D$ elements
# of $b$ bytes. It must read all keys and values. Every query head does one multiplication and one
# addition per element of each key, and as many for values:
#
# $$
# \text{bytes} = 2 L K D b, \qquad \text{operations} = 4 L H D, \qquad
# \frac{\text{operations}}{\text{bytes}} = \frac{2 H}{K b}
# $$
#
# The quotient does not contain $L$: decode attention does few operations per byte, however long the
# sequence is. The $L$ queries of a prompt share what is read, so its quotient grows with the
# length. It is $L H / ((K + H) b)$, counting the visible half of the pairs, and the queries and
# results that are also moved.
#
# A *roofline* draws this. On the left the memory is the limit: operations per second are bandwidth
# times operations per byte. On the right the arithmetic is. The dots on the H100's line are decode
# with 1, 4 and 8 query heads per KV head, and prompts of Llama 3 8B. The peaks are from NVIDIA's
# data sheets, for dense matrices in bfloat16; no program quite reaches them.

# %% The roofline of three GPUs: decode sits far to the left, where only bytes count
import math

import drawing

GPUS = {  # bytes per second, operations per second
    "A100 80 GB SXM": (2.04e12, 312e12),
    "H100 SXM": (3.35e12, 989e12),
    "H200": (4.8e12, 989e12),
}


points = {  # operations per byte, with 2 bytes per element
    "decode, 1": 2 * 40 / (40 * 2),
    "decode, 4": 2 * 32 / (8 * 2),
    "decode, 8": 2 * 64 / (8 * 2),
    "prompt of 512": 512 * 32 / ((8 + 32) * 2),
    "prompt of 2,048": 2048 * 32 / ((8 + 32) * 2),
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
axes.set(ylabel="10¹² operations per second, at most")
axes.legend(loc="upper left", fontsize=8)

# %%
for name, (bandwidth, operations) in GPUS.items():
    share = points["decode, 4"] * bandwidth / operations
    print(f"{name:15} {operations / bandwidth:3.0f} operations possible per byte,", end=" ")
    print(f"{share:.1%} of them used by decode with 4 query heads per KV head")

# %% [markdown]
# For decode, the arithmetic is free. The *floor* of its time is bytes divided by bandwidth. To come
# near it, a kernel must read each byte once, and keep so many reads in flight that the memory never
# waits.
#
# ### Read each key once
#
# Chapter 10 gave each query head a program, and the heads that share a KV head (*grouped-query
# attention*, GQA) all read the same keys. The library's `decode` has one program per *KV* head,
# which serves all query heads of the group. They are the rows of one matrix, a tile of keys is
# another, and `tl.dot` multiplies them in one operation. A GPU has matrix units for that, the
# *tensor cores*. They take at least 16 rows, so with four heads per group twelve rows are zeros.
# The wasted arithmetic is free, the saved reads are not. (A GPU's cache catches some of the
# repeated reads, depending on the order of execution.)
#
# Here is the same attention three times, on a pool with four query heads per KV head. The third
# kernel comes in the next section.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from minipaged.attention.triton.machine import why_no_triton

CPU = torch.device("cpu")
if reason := why_no_triton(CPU, head_dim=64):
    drawing.stop(f"This chapter ends here: {reason}. Its page shows what it would have printed.")

from torch import Tensor

from minipaged.attention.batch import Batch
from minipaged.attention.reference import gather, reference_paged_attention
from minipaged.attention.triton.decode import decode
from minipaged.attention.triton.naive_decode import naive_paged_attention
from minipaged.evaluation.bench.cases import Case, Heads, make_inputs

four_share_one = Heads("four query heads share one KV head", heads=4, kv_heads=1, head_dim=64)
inputs = make_inputs(Case(four_share_one, num_seqs=1, length=320), CPU, torch.float32)
arguments = inputs.q, inputs.k_cache, inputs.v_cache, inputs.batch, inputs.scale


def packed(splits: int) -> Tensor:
    out = torch.empty_like(inputs.q)
    decode(*arguments, out, to_fill=splits)
    return out


kernels = {  # the name, how many programs, and the kernel
    "naive": (4, lambda: naive_paged_attention(*arguments)),
    "packed": (1, lambda: packed(splits=1)),
    "packed and split": (2, lambda: packed(splits=2)),
}
expected, answers = reference_paged_attention(*arguments), {}
for name, (programs, kernel) in kernels.items():
    answers[name] = kernel()
    error = (answers[name] - expected).abs().max()
    print(f"{name:17} programs: {programs}, largest difference to the reference {error:.0e}")

# %% [markdown]
# The naive kernel, with one program per query head like yours, reads every key four times, the
# other two once. The [appendix](#appendix-counted-not-measured) counts it.
#
# A tile is not a block. Blocks of 16 waste little memory (chapter 3), but the hardware prefers
# tiles of 64 positions. Each position of a tile is looked up in the block table, so a tile may span
# several blocks.
#
# ### Split long sequences
#
# Packing leaves fewer programs: sequences times KV heads. An H100 has 132 *multiprocessors* (SMs),
# and each runs four programs of this `decode` at a time (the
# [appendix](#appendix-counted-not-measured) shows why). One sequence over 8 KV heads gives 8
# programs for 528 places, and the memory waits. So a sequence is cut into *splits* of neighbouring
# positions, with one program each (this is known as flash-decoding, or split-KV). Each program
# computes its output as if there were no other keys, and a second kernel merges the outputs. Write
# both parts in PyTorch first. A piece returns its output, and the logarithm of the sum of its
# weights:


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
# Why is this exact? Piece $p$ has divided by its own sum $S_p = \sum_i e^{s_i}$. The whole would
# have divided by the sum over all pieces, so it is $\sum_p S_p o_p / \sum_p S_p$: an average of the
# pieces' outputs, each weighted by its sum. The sums themselves would overflow. So we keep their
# logarithms, and subtract the largest before the exponential.

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
# The library's kernel does the same in base 2, because a GPU has an instruction for $2^x$. It makes
# as many splits as fill all places, and no more, because each writes a partial output that the
# merge reads again:
#
# @@ minipaged.attention.triton.splits.splits_to_fill
#
# On an H100 with 8 KV heads, a batch of 64 needs no split, and one sequence alone gets 66. Every
# sequence is also split at least every 4,096 positions. Otherwise the eight programs of one long
# sequence would still run when all short ones have ended. No piece but the last has fewer than 256
# positions.
#
# The model also runs on your pieces. Here every sequence is cut after each 16 positions, far more
# often than is sensible:

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
# ### Read fewer bytes
#
# With `kv_cache_dtype="int8"`, a key is stored as 8-bit
# elements and one scale: 132 bytes instead of 256. The kernels do not multiply each key by its
# scale: since $q \cdot (c\,k) = c\,(q \cdot k)$, they multiply the score, once. It costs some
# accuracy. This is the error of attention over 1,024 random keys, compared with float64:

# %%
from minipaged.evaluation.bench.formats import attention_error

error_of = {kept_as: attention_error(kept_as) for kept_as in ("float16", "bfloat16", "int8", "fp8")}
for kept_as, error in error_of.items():
    print(f"{kept_as:9} {error:.4f}")

# %% [markdown]
# ### Launch fewer kernels
#
# A decode step has hundreds of kernel launches, and each costs the host a few microseconds. If the
# GPU finishes one kernel before the next is launched, it waits. A *CUDA graph* records all launches
# of a step once, and replays them with a single launch. It needs the same grids and addresses each
# time. So the splits of each sequence are computed on the GPU, and the grid has room for the
# largest possible number.
#
# ### Measure
#
# **No GPU has run these kernels yet.** All figures for GPUs are counted or computed, and a floor is
# not a speed. On a machine with a GPU, this command measures every kernel against the bandwidth of
# a large copy, and against PyTorch's attention over contiguous keys:
#
# ```sh
# minipaged bench kernel --save kernel.json
# ```
#
# A CPU has a floor, too: the bytes of keys and values, divided by the bandwidth of a large copy.
# Here is the library's PyTorch attention, with 32 sequences of 1,024 tokens in float32:

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
print(f"attention reaches about {floor_seconds / seconds['attention']:.0%} of the copy's bandwidth")

# %% [markdown]
# Your figure changes from run to run. The gap to 100 % is all that a better kernel could gain.
# [Fast on a plain CPU](../speed.md) does this for a whole step.
#
# ## Check
#
# All kernels agree with the reference, your model run generates the library's tokens, and the
# merged pieces are the whole.

# %%
for name, answer in answers.items():
    assert torch.allclose(answer, expected, atol=1e-5), name

library = LLM(num_blocks=40, device="cpu").generate(prompts, greedy, use_tqdm=False)
assert [o.outputs[0].token_ids for o in served] == [o.outputs[0].token_ids for o in library]
assert yours.engine.scheduler.memory.num_free == 40

merged = merge(outputs, log_sums)
assert (merged - whole).abs().max() < 1e-13
print("same outputs, same tokens, and the pieces merge exactly")

# %% [markdown]
# The classic mistake is to forget that each piece was divided by its own sum:

# %%
error = ((outputs.mean(dim=0) - whole).norm() / whole.norm()).item()
print(f"a plain average of the pieces is off by {error:.0%}")
assert error > 0.1

# %% [markdown]
# ### Exercise: empty pieces
#
# In the grid, a short sequence gets as many pieces as a long one, so some have no positions. Their
# log-sum is $-\infty$. Their programs end without writing, so the memory of their outputs can hold
# anything, even NaN. Change `merge_written` so that an empty piece changes nothing (invariant 3).


# %%
def merge_written(outputs: Tensor, log_sums: Tensor) -> Tensor:
    """As `merge`, but pieces with a log-sum of -inf are empty, and their outputs mean nothing."""
    return merge(outputs, log_sums)  # your turn


# %%
def check_exercise(merge_written) -> bool:
    """Compare with attention over all positions, with empty pieces at several places."""
    solved = True
    for lengths in ([300, 232], [256, 0, 256, 20], [0, 0, 500], [7, 0, 1, 0]):
        k, v = keys[: sum(lengths)], values[: sum(lengths)]
        whole, _ = attend_to_piece(q, k, v, 0.125)
        outputs = torch.full((len(lengths), 4, 64), torch.nan, dtype=torch.float64)
        log_sums = torch.full((len(lengths), 4), -torch.inf, dtype=torch.float64)
        for number, pair in enumerate(zip(k.split(lengths), v.split(lengths), strict=True)):
            if lengths[number]:
                outputs[number], log_sums[number] = attend_to_piece(q, *pair, 0.125)
        yours = merge_written(outputs, log_sums)
        error = torch.inf if yours is None else (yours - whole).abs().max().item()
        print(f"pieces of {lengths}: error, yours: {error:.0e}, expected: below 1e-12")
        solved = solved and error < 1e-12
    return solved


print("solved" if check_exercise(merge_written) else "not solved yet")

# %% [markdown]
# <details markdown="1"><summary>Hint</summary>
#
# An empty piece already has the share 0. Why is its product with the output not 0? Replace the
# output before you multiply.
#
# </details>
#
# <details markdown="1"><summary>Solution</summary>
#
# 0 times NaN is NaN, so a share of 0 is not enough. The output of an empty piece must be replaced:
#
# ```python
# def merge_written(outputs: Tensor, log_sums: Tensor) -> Tensor:
#     """As `merge`, but pieces with a log-sum of -inf are empty, and their outputs mean nothing."""
#     written = log_sums > -torch.inf  # [pieces, heads]
#     return merge(outputs.where(written[:, :, None], 0), log_sums)
# ```
#
# In the library's kernel, `written` is the mask of the merge's loads.
#
# </details>
#
# <details markdown="1"><summary>Your predictions</summary>
#
# Decode does 4 operations per byte, where 150 to 300 would be free. The kernel of chapter 10 reads
# each key four times, once for each query head of its group. And one sequence gives 8 programs, for
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
# No bytes: a group is one head, so each key is read once anyway. Decode does one operation per
# byte, even further to the left on the roofline. Wide tiles and splits still help.
#
# </details>
#
# **The model's weights are also read once per step. When do keys and values take more bytes?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Llama 3 8B has 16 GB of weights in half precision, and 131 KB of keys and values per token. From
# 122,000 tokens on, for example 64 sequences of 2,000, attention reads more than everything else.
#
# </details>
#
# ## Results
#
# The floor on an H200 for one layer of Llama 3 8B and 64 sequences of 1,024 tokens that decode,
# computed from its published bandwidth:

# %%
one_layer = 64 * 1024 * 2 * 8 * 128 * 2
ways = {
    "naive": 4 * one_layer,
    "packed and split": one_layer,
    "packed and split, int8": one_layer * 132 // 256,
}
for name, num_bytes in ways.items():
    microseconds = 1e6 * num_bytes / GPUS["H200"][0]
    print(f"{name:25} {num_bytes / 1e6:7,.0f} MB  at least {microseconds:4.0f} us")

# %% [markdown]
# ### Appendix: counted, not measured
#
# <details markdown="1"><summary>Count reads, waves and registers</summary>
#
# **Reads.** In the interpreter, all loads go through one function, which gets the addresses. A
# counter in front of it shows how many times each element of the keys is read:

# %%
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy
from triton.runtime.interpreter import interpreter_builder


@contextmanager
def counted_reads(tensor: Tensor) -> Generator[Any, None, None]:
    """How many times the kernels that run inside load each element of the tensor."""
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


times_read = {}
for name, (_, kernel) in kernels.items():
    with counted_reads(inputs.k_cache) as times:
        kernel()
    times_read[name] = set(times.tolist())
    print(f"{name:17} reads of each element of the keys: {times_read[name]}")
assert list(times_read.values()) == [{4}, {1}, {1}]

# %% [markdown]
# **Waves.** Programs that run at the same time are a *wave*. If a second wave has only one program,
# nearly all of the GPU is idle half of the time. This is the share of places in use without splits,
# with the library's choice, and with one split more:

# %%
from minipaged.attention.triton.splits import splits_to_fill

places = 132 * 4
for num_seqs in (1, 4, 16, 64):
    print(f"batch of {num_seqs:2}", end="")
    chosen = splits_to_fill(num_seqs, kv_heads=8, places=places)
    for splits in (1, chosen, chosen + 1):
        programs = num_seqs * 8 * splits
        used = programs / (places * math.ceil(programs / places))
        print(f"{splits:5} splits: {used:4.0%} in use", end="")
    print()

# %% [markdown]
# **Registers.** A kernel can read each byte once and still be slow because it does not fit. A
# program runs as *threads*, each of which holds a part of its tiles. A multiprocessor has 65,536
# *registers* for the values of its threads, and some 160 to 230 KiB of *shared memory* for tiles. A
# value without a register is *spilled* to the far memory. The compiler decides all of that, and
# needs no GPU. `minipaged bench compile` compiles every kernel. Here are two, in a separate
# process, since this one interprets kernels:

# %%
import subprocess
import sys

COMPILE = """
import torch
from minipaged.evaluation.bench.compile import compile_launch
from minipaged.evaluation.bench.launches import Setting, catch_launches, launch_everything

llama = Setting(heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16, kv_dtype="auto")
for sm in (80, 90):
    with catch_launches() as launches:
        launch_everything(llama, sm)
    kernels = {launch.kernel.__name__: launch for launch in reversed(launches)}
    for name in ("naive_kernel", "decode_kernel"):
        row = compile_launch(kernels[name], llama, sm)
        print(f"{row.kernel:7} sm_{sm} {row.registers:4} registers, {row.stack_bytes} spilled,",
              f"{row.shared_bytes:7,} shared bytes, {row.programs} programs,",
              f"{row.copies_ahead} copies ahead, {row.instructions}")
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
# multiplication by the tensor cores: `decode` has it, the naive kernel does not. "Programs" is how
# many of them one multiprocessor has registers and shared memory for. `decode` asks the compiled
# kernel for both on the GPU where it runs, and so knows the number of places.
#
# **Load ahead.** "Copies ahead" are copies of keys and values to shared memory that are still under
# way while `decode` multiplies a tile. The addresses of a tile come from the block table, so the
# kernel loads the block numbers of the next tile before it multiplies this one:
#
# @@ minipaged.attention.triton.tile.load_blocks
#
# If each iteration loaded its own block numbers, the compiler would find no address early enough.
# It would print 0 copies ahead, and memory would idle during every multiplication. Several tiles at
# a time take shared memory. The tile is as large as four programs on Hopper have room for:
#
# @@ minipaged.attention.triton.shapes.choose_tile
#
# Such tables decided against larger tiles and other variants: [what was tried](../kernels.md) lists
# them.
#
# </details>

# %% [markdown]
# Next: [one token, from the prompt to the screen](12_one_tokens_journey.md).
