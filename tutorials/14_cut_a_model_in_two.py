# %% [markdown]
# # 14. Cut a model in two
#
# If no single device can hold a model, each of its layers is divided among several devices. You cut
# a layer and add up its parts. Then the whole model runs in two processes, with one scheduler and
# one block table.
#
# **Needs** [chapter 5](05_models_on_pages.md), [chapter 12](12_one_tokens_journey.md) · **Time** 45
# minutes · **Lab** [11, cut a model in two](labs/11.md)
#
# ![Each rank has half of both matrices. One all-reduce adds up the results.](openings/14.svg)
#
# ## Goals
#
# - What a rank keeps of a layer, and why the pool grows faster than the number of ranks.
# - Which cut needs no exchange, which one needs a sum, and why the two come as a pair.
# - Why the scheduler, the block manager and the block tables stay as they are.
# - What the ranks send each other in a step, and what is lost with a rank.
#
# ## Invariants
#
# 1. The ranks together compute what one rank computes, and generate the same tokens.
# 2. A rank stores only its part of the weights, and the keys and values of its own heads.
# 3. All ranks take part in the same exchanges, in the same order.
# 4. A block has the same number on every rank, and one scheduler decides for all of them.
#
# ## Predict
#
# The embedded model has 4 layers, a hidden size of 256, and 4 query heads over 2 KV heads of 64
# elements. Elements have 4 bytes, and blocks have 16 slots. It runs on two *ranks*, processes that
# each have a part of the model.
#
# - How many times do the ranks add up tensors in one step? How many bytes does each rank contribute
#   to these sums in a step that decodes one token?
# - How many numbers must the scheduler send to the other rank for such a step?
# - Each rank has 1 MiB for keys and values. How many blocks does the pool have with one rank, with
#   two, and with four?
#
# ## Build it: cuts and ranks
#
# ### Why cut
#
# In half precision, a model of 70 billion parameters takes 141 GB, and an H100 has 80. There are
# two ways to divide it. *Pipeline parallelism* gives each device some of the layers, and a token
# passes through one device after another. *Tensor parallelism* gives each rank a part of every
# matrix, and all ranks work on the same token at the same time. The paper serves OPT-66B on four
# GPUs and OPT-175B on eight in this way (section 4.6), with the cuts of
# [Megatron-LM](https://arxiv.org/abs/1909.08053).
#
# A rank also keeps a part of the KV cache: the keys and values of its own heads. So a token takes
# less memory on each rank, and the weights leave more room. Here are both effects, computed from
# the sizes of Llama 3 70B:

# %% Left: what each of N GPUs of 80 GB holds of Llama 3 70B; right: tokens in the pool
import drawing

from minipaged.evaluation.sim.catalogue import GB, GPUS, MODELS

large, gpu = MODELS["llama-3-70b"], GPUS["h100-80g"]
usable = 0.9 * gpu.memory_bytes / GB  # as with gpu_memory_utilization=0.9
sizes = (1, 2, 4, 8, 16)
weights = [large.weight_bytes / size / GB for size in sizes]
pools = [max(0.0, usable - each) for each in weights]
kv_bytes = [large.kv_bytes_per_token / min(size, large.num_kv_heads) for size in sizes]
tokens = [pool * GB / each for pool, each in zip(pools, kv_bytes, strict=True)]

names = [str(size) for size in sizes]
figure, (left, right) = drawing.picture(7.2, 2.8, ncols=2)
left.bar(names, weights, label="weights")
left.bar(names, pools, bottom=weights, label="pool", color=drawing.COLOURS[2])
left.axhline(usable, color=drawing.GREY, lw=0.8, linestyle=":")
left.set(xlabel="ranks", ylabel="GB per rank")
left.legend(fontsize=8)
right.bar(names, [each / 1000 for each in tokens], color=drawing.COLOURS[2])
right.set(xlabel="ranks", ylabel="thousand tokens in the pool")
for size, each, room in zip(sizes, kv_bytes, tokens, strict=True):
    print(f"ranks: {size:2}  {each / 1000:5.1f} kB per token on each, room for {room:9,.0f} tokens")

# %% [markdown]
# One GPU cannot hold the weights, and two hold little else. With 4 ranks the pool has room for 52
# times as many tokens as with 2. From 8 to 16 ranks it grows by only 16 %: Llama 3 70B has 8 KV
# heads, so with 16 ranks each is *replicated*, that is, stored on two of them. A token then takes
# as much memory on each rank as with 8. (Memory for activations is left out.)
#
# ### A layer to cut
#
# We record the inputs and outputs of the two halves of a layer while the model computes a prompt.
# The sums of your parts must equal these outputs.

# %%
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minipaged import LLM, SamplingParams

one = LLM("storyteller", num_blocks=256, device="cpu")
layer = one.engine.executor.runner.model.layers[0]
seen: dict[str, tuple] = {}


def note(name: str, module: object, inputs: tuple, output: Tensor) -> None:
    seen.setdefault(name, (*inputs, output))  # the prompt's step is the first one


for name in ("attention", "mlp"):
    getattr(layer, name).register_forward_hook(partial(note, name))
greedy = SamplingParams(temperature=0, max_tokens=24)
one.generate("Once upon a time Theo the frog put the white key in the", greedy, use_tqdm=False)
x, cos, sin, _, _, whole = seen["attention"]
print("attention gets", list(x.shape), "and returns", list(whole.shape))

# %% [markdown]
# ### Two cuts
#
# A linear layer computes $y = xA$. There are two ways to cut $A$ between two ranks.
#
# *By columns*: a rank has some of the outputs, and needs all of $x$. The ranks' outputs, one after
# the other, are $y$. Nothing is exchanged.
#
# *By rows*: a rank has some of the inputs, and needs only those elements of $x$. It computes a part
# of every output, and the sum over all ranks is $y$. This sum is an *all-reduce*: each rank
# contributes a tensor, and each rank gets the sum.
#
# $$
# x \begin{pmatrix} A_0 & A_1 \end{pmatrix} = \begin{pmatrix} x A_0 & x A_1 \end{pmatrix}, \qquad
# \begin{pmatrix} x_0 & x_1 \end{pmatrix} \begin{pmatrix} A_0 \\ A_1 \end{pmatrix} = x_0 A_0 + x_1
# A_1
# $$
#
# PyTorch stores $A^T$, one row per output, so a cut by columns is a cut of dimension 0 of `weight`.
# For now, all ranks are in one process: a list has one item per rank.


# %%
def cut_columns(weight: Tensor, num_ranks: int) -> list[Tensor]:
    """[outputs, inputs] -> for each rank [outputs / ranks, inputs]."""
    return list(weight.chunk(num_ranks, dim=0))


def cut_rows(weight: Tensor, num_ranks: int) -> list[Tensor]:
    """[outputs, inputs] -> for each rank [outputs, inputs / ranks]."""
    return list(weight.chunk(num_ranks, dim=1))


def all_reduce(summands: list[Tensor]) -> Tensor:
    """What every rank gets: the sum of the tensors of all ranks."""
    return torch.stack(summands).sum(dim=0)


torch.manual_seed(0)
up = torch.randn(1024, 256) / 16
down = torch.randn(256, 1024) / 32

halves = [F.linear(x, part) for part in cut_columns(up, 2)]  # [tokens, 512] each
print("by columns:", [list(half.shape) for half in halves], "one after the other")
assert torch.allclose(torch.cat(halves, dim=1), F.linear(x, up), atol=1e-5)

pairs = zip(x.chunk(2, dim=1), cut_rows(up, 2), strict=True)
summands = [F.linear(share, part) for share, part in pairs]  # [tokens, 1024] each
print("by rows:   ", [list(summand.shape) for summand in summands], "added up")
assert torch.allclose(all_reduce(summands), F.linear(x, up), atol=1e-5)

# %% [markdown]
# ### A pair of cuts: the feed-forward
#
# The feed-forward of OPT is `down(relu(up(x)))`. Cut `up` by columns: each rank has some of its
# outputs. The activation works on each element alone, so each rank applies it to its own elements.
# These are exactly the inputs that `down`, cut by rows, needs on that rank. Nothing is exchanged in
# the middle, where the model is widest. At the end there is one all-reduce.
#
# ```mermaid
# flowchart LR
#     x["x, whole on both"] --> up0["rank 0: up, half of the outputs"]
#     x --> up1["rank 1: up, half of the outputs"]
#     up0 --> relu0[relu] --> down0["down, half of the inputs"]
#     up1 --> relu1[relu] --> down1["down, half of the inputs"]
#     down0 --> sum(("+"))
#     down1 --> sum
#     sum -->|all-reduce| y["y, whole on both"]
# ```


# %%
def feed_forward(x: Tensor, num_ranks: int) -> Tensor:
    """The feed-forward of all ranks. Until the sum, each uses its own parts only."""
    summands = []
    for own_up, own_down in zip(cut_columns(up, num_ranks), cut_rows(down, num_ranks), strict=True):
        inner = F.relu(F.linear(x, own_up))  # [tokens, 1024 / ranks]
        summands.append(F.linear(inner, own_down))
    return all_reduce(summands)  # [tokens, 256]


for num_ranks in (1, 2, 4):
    at_once = F.linear(F.relu(F.linear(x, up)), down)
    difference = (feed_forward(x, num_ranks) - at_once).abs().max()
    assert difference < 1e-4
    print(f"ranks: {num_ranks}  difference to the whole {difference:.0e}")

# %% [markdown]
# The difference is rounding: floating-point numbers are added up in another order.
#
# ### The same pair in attention
#
# Heads are groups of outputs, and each head attends alone. So a cut by columns gives each rank some
# heads, with their queries, keys, values and part of the KV cache. The output matrix is cut by
# rows, and its all-reduce is the second of the layer. With grouped-query attention, a rank needs
# the KV heads that its query heads read, which may be on other ranks as well. `HEADS` has them for
# our model. With four ranks, ranks 0 and 1 both have KV head 0.

# %%
from minipaged.attention.reference import causal_attention
from minipaged.models.rope import rotate

DIM = 64
HEADS = {  # by number of ranks: the query heads of each rank, and the KV heads that they read
    1: [([0, 1, 2, 3], [0, 1])],
    2: [([0, 1], [0]), ([2, 3], [1])],
    4: [([0], [0]), ([1], [0]), ([2], [1]), ([3], [1])],
}
q_weight, k_weight, v_weight = layer.attention.qkv_proj.weight.detach().split(
    layer.attention.qkv_proj.sizes
)
o_weight = layer.attention.o_proj.weight.detach()


def attention_on(rank: int, num_ranks: int) -> Tensor:
    """A rank's summand of this layer's attention: [tokens, hidden]."""
    heads, kv_heads = HEADS[num_ranks][rank]

    def project(weight: Tensor, which: list[int]) -> Tensor:
        mine = weight.view(-1, DIM, 256)[which].flatten(0, 1)  # [heads * dim, hidden]
        return F.linear(x, mine).view(len(x), -1, DIM)  # [tokens, heads, dim]

    q, k = (rotate(project(*each), cos, sin) for each in ((q_weight, heads), (k_weight, kv_heads)))
    out = causal_attention(q, k, project(v_weight, kv_heads), 0, DIM**-0.5)
    return F.linear(out.flatten(1), cut_rows(o_weight, num_ranks)[rank])


for num_ranks in (1, 2, 4):
    parts = [attention_on(rank, num_ranks) for rank in range(num_ranks)]
    difference = (all_reduce(parts) - whole).abs().max()
    assert difference < 1e-4
    print(f"ranks: {num_ranks}  difference to the whole {difference:.0e}")

# %% [markdown]
# `whole` is the output of the library's own layer, which reads from its paged cache.
#
# The two ends of the model remain. Of the embedding, each rank has the rows of some tokens. It
# looks up the tokens that it has and puts zeros for all others. In the all-reduce, each row comes
# from the one rank that has it.
#
# <details markdown="1"><summary>The library's code. Spoiler: a part of lab 11, task 3</summary>
#
# @@ minipaged.models.parallel.VocabularyEmbedding.forward
#
# </details>
#
# The output matrix is cut in the same way, so each rank computes the logits of its own tokens. Only
# rank 0 samples, so only rank 0 *gathers* them all. The norms and the hidden state `x` between the
# layers are whole on every rank. One table of the library has all cuts, by the last part of a
# module's name:
#
# @@ minipaged.models.parallel.CUTS
#
# ### One scheduler, one message per step
#
# Now for the whole model: with one argument, the library starts a second process.

# %%
from minipaged.evaluation.stories import prompt, tell

two = LLM("storyteller", num_blocks=256, device="cpu", tensor_parallel_size=2)
runner, ranks = two.engine.executor.runner, two.engine.executor.ranks
print(runner.model.layers[0])

stories = [tell(num_facts=size, seed=size) for size in (2, 8, 16, 32)]
questions = [prompt(story, story.questions[1]) for story in stories]
answers = {
    name: llm.generate(questions, greedy, use_tqdm=False)
    for name, llm in (("one", one), ("two", two))
}
for in_one, in_two in zip(answers["one"], answers["two"], strict=True):
    same = in_one.outputs[0].token_ids == in_two.outputs[0].token_ids
    print(f"{in_two.outputs[0].text.strip():24} {'the same' if same else 'NOT the same'}")

# %% [markdown]
# This process is rank 0. It has the scheduler, the block manager, and half of each matrix. The
# other process has the other half of each matrix, but no scheduler and no tokenizer. Each allocates
# a pool of 256 blocks with one KV head. **Block 17 means block 17 on both**, with the keys and
# values of the same tokens, but of different heads. (The same holds for the swap pools.) Nothing in
# `memory/` and `scheduler/` had to change, because they work with block numbers. Each step begins
# with one broadcast of plain numbers, the paper's *control message*:
#
# @@ minipaged.worker.executor.MultiExecutor.run
#
# A worker waits for it, and then runs the same step as rank 0:
#
# @@ minipaged.worker.process.work
#
# Let us read the messages of one request.

# %%
messages: list[list[int]] = []


def noting(numbers: list[int], send=ranks.send) -> None:
    messages.append(numbers)
    send(numbers)


ranks.send = noting
two.generate("Once upon a time Theo the frog", greedy, use_tqdm=False)
for number in (0, 1, 2, 10):
    print(f"step {number + 1:2}: {messages[number]}")

# %% [markdown]
# The first number is 0, for "a step". The next four count the blocks to swap out, swap in and copy,
# and the sequences. Then come, for each sequence: its id, how many tokens are in the cache, and how
# many rows of logits are wanted; the number of new tokens, of blocks that the receiver has already,
# and of new blocks; the tokens; the blocks. Step 11 adds a block, because 16 tokens have filled the
# first one.
#
# So a block table is sent as a difference. Here is what whole tables would take for four new
# stories:

# %%
from minipaged.worker.message import StepDecoder, StepEncoder

messages.clear()
longer = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
new_stories = [tell(num_facts=size, seed=100 + size).text for size in (2, 8, 16, 32)]
two.generate(new_stories, longer, use_tqdm=False)
decoder = StepDecoder()
steps = [decoder.decode(message[1:]) for message in messages]
whole_sizes = [1 + len(StepEncoder().encode(step)) for step in steps]  # one that remembers nothing
differences = [len(message) for message in messages]
print("decode steps:", differences[2:7], "numbers instead of", whole_sizes[2:7])

# %% [markdown]
# The first two messages have the prompts. After them, each sequence has seven numbers in a message,
# and one more when it gets a block. A whole table has one number per 16 tokens, 6,250 for a
# sequence of 100,000 tokens.
#
# ### What crosses between the ranks
#
# After the message, the ranks wait for each other only in the sums, and rank 0 for the logits. We
# count these exchanges, and their bytes, in a step that decodes four tokens:

# %%
reduced: list[int] = []
for module in runner.model.modules():
    if hasattr(module, "all_reduce"):  # the embedding, and every matrix that is cut by rows
        module.register_forward_hook(lambda _, __, output: reduced.append(output.nbytes))

request = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
for number, text in enumerate(questions):
    two.engine.add_request(str(number), text, request)
two.engine.step()  # the prompts
messages.clear()
reduced.clear()
before = dict(ranks.counts)
two.engine.step()
counts = {name: ranks.counts[name] - before[name] for name in ("message", "all-reduce", "gather")}
rows = -(-765 // 2)  # of the vocabulary, on each rank
crossing = {
    "message": 4 * len(messages[0]),
    "all-reduce": sum(reduced),
    "gather": 4 * rows * 4,
}
for name, num_bytes in crossing.items():
    print(f"{counts[name]} x {name:10} {num_bytes:7,} bytes from each rank that sends")
while two.engine.has_unfinished_requests():
    two.engine.step()

# %% [markdown]
# There are two all-reduces per layer and one for the embedding, $2 \cdot 4 + 1 = 9$. Each has one
# row of 256 elements per token. No key, value or weight ever crosses. That is what makes the cut
# affordable: the sums grow with the tokens of the *step*, and not with the length of the sequences.
#
# ### Where the time of a step goes
#
# Each rank measures its own steps, and `report()` collects the times:

# %% Milliseconds of a decode step of 16 sequences, on one rank and on each of two
stats = []
for llm in (one, two):
    llm.engine.listeners.append(lambda _, of_step: stats.append(of_step))
short = [tell(num_facts=1, seed=seed).text for seed in range(16)]


def decode_steps(llm: LLM, num_steps: int = 24) -> float:
    """Milliseconds per step in which the model runs, while 16 sequences decode."""
    request = SamplingParams(temperature=0, max_tokens=num_steps + 1, ignore_eos=True)
    for number, text in enumerate(short):
        llm.engine.add_request(str(number), text, request)
    llm.engine.step()  # all prompts
    if llm is two:
        two.engine.executor.report()  # discard the times of earlier steps
    stats.clear()
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
    assert [each.num_tokens for each in stats] == [16] * num_steps
    return 1000 * sum(each.run_seconds for each in stats) / num_steps


spent = {"one rank": {"compute": decode_steps(one)}}
decode_steps(two)
for rank, seconds in enumerate(two.engine.executor.report()):
    told = {name: 1000 * each / 24 for name, each in seconds.items()}
    compute = told["step"] - told["all-reduce"] - told["gather"]
    del told["step"]
    if rank == 1:
        told["waiting"] = told.pop("message")
    spent[f"rank {rank} of 2"] = {"compute": compute, **told}

figure, axes = drawing.picture(7.2, 2.2)
starts = [0.0] * 3
for part in ("compute", "all-reduce", "gather", "message", "waiting"):
    widths = [each.get(part, 0.0) for each in spent.values()]
    axes.barh(list(spent), widths, left=starts, label=part)
    starts = [start + width for start, width in zip(starts, widths, strict=True)]
axes.invert_yaxis()
axes.set(xlabel="ms per step")
axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.3), ncols=5, fontsize=8)
for name, each in spent.items():
    print(f"{name:11}", ", ".join(f"{part} {value:.2f} ms" for part, value in each.items()))

# %% [markdown]
# On most machines, two ranks are slower than one here. This model is far too small to cut:
# multiplying with half of a matrix takes little less time than with all of it, and each sum, which
# includes the wait for the slower rank, takes longer than that. *Waiting* is the time in which rank
# 1 has nothing to do, because rank 0 samples and schedules.
#
# With a large model it is the other way around. A decode step of Llama 3 70B reads 141 GB of
# weights. At an H100's bandwidth that takes 42 ms; with four ranks that read 35 GB each, it takes
# 11 ms. The 161 all-reduces of a step cost about 20 microseconds each over NVLink, 3 ms together.
# These figures are computed from published ones ([several GPUs](../paper.md#several-gpus)). **The
# library has not run on several GPUs.** It has the code for NCCL, but its speed is unmeasured.
#
# ### What is lost with a rank
#
# Now we kill rank 1 in the middle of a request.

# %%
import os
import signal

from minipaged.errors import WorkerLost

two.engine.add_request("the last one", questions[0], greedy)
two.engine.step()
[worker] = two.engine.executor.worker_pids
os.kill(worker, signal.SIGKILL)
lost = ""
try:
    two.engine.step()
except WorkerLost as error:
    lost = f"WorkerLost: {error}"
print(lost)

# %% [markdown]
# Half of the heads in every block are lost, and nothing can be repaired. You build a new engine,
# and the prompts are computed again. A server answers every open request with an error and ends. In
# the other direction, a worker ends whenever rank 0 ends.
#
# ## Check
#
# Invariant 1: in a small pool, where requests are preempted and swapped, two ranks and four
# generate the tokens of one. Invariant 2: each of two has half of the pool and of the matrices.
# Invariant 4: the worker decodes exactly the step of rank 0, including block tables.


# %%
def serve(size: int) -> tuple[list[list[int]], int, int]:
    """Tokens in a small pool, and bytes of weights and of the pool on rank 0."""
    small = {"num_blocks": 46, "preemption": "swap", "device": "cpu"}
    llm = LLM("storyteller", tensor_parallel_size=size, **small)
    preempted = []
    llm.engine.listeners.append(lambda decision, _: preempted.extend(decision.preempted))
    outputs = llm.generate(new_stories, longer, use_tqdm=False)
    assert preempted, "the pool is not small enough"
    own = llm.engine.executor.runner
    weights = sum(each.nbytes for each in own.model.parameters())
    pool = own.kv_cache.layers[0][0].untyped_storage().nbytes()
    llm.engine.executor.close()
    return [output.outputs[0].token_ids for output in outputs], weights, pool


served = {size: serve(size) for size in (1, 2, 4)}
for size, (token_ids, weight_bytes, pool_bytes) in served.items():
    assert token_ids == served[1][0], f"other tokens with tensor_parallel_size={size}"
    print(f"ranks: {size}  {weight_bytes:9,} bytes of weights, {pool_bytes:9,} of pool on rank 0")
assert served[2][2] == served[4][2] == served[1][2] // 2

decoder, encoder = StepDecoder(), StepEncoder()
assert all(decoder.decode(encoder.encode(step)) == step for step in steps)
assert "SIGKILL" in lost
print("the same tokens, half of the pool, and the same steps on both ranks")

# %% [markdown]
# Each of these mistakes runs without an error, so only the numbers show it:


# %%
def error_of(answer: Tensor, right: Tensor) -> float:
    return ((answer - right).norm() / right.norm()).item()


right = feed_forward(x, 1)
inner = [F.linear(x, part).relu() for part in cut_columns(up, 2)]
downs = cut_rows(down, 2)
swapped = [F.linear(part, own) for part, own in zip(inner, downs[::-1], strict=True)]
mistakes = {
    "no all-reduce": error_of(F.linear(inner[0], downs[0]), right),
    "parts of two ranks swapped": error_of(all_reduce(swapped), right),
}
for name, error in mistakes.items():
    print(f"{name:28} off by {error:.0%}")
    assert error > 0.1, f"not noticed: {name}"

# %% [markdown]
# ### Exercise: a merged matrix
#
# LLaMA and Qwen have a *gated* feed-forward: `down(silu(gate(x)) * up(x))`. The library merges
# `gate` and `up` into one matrix, `gate_up_proj`, with `gate` above `up`, so that one product
# computes both. Here it is cut like `up` before, and the result is wrong. Which rows does each rank
# need? Change the body of `cut_gate_up`, and run this cell and the next one again.


# %%
def cut_gate_up(weight: Tensor, num_ranks: int) -> list[Tensor]:
    """[2 * inner, hidden], gate above up -> for each rank its own gate above its own up."""
    return list(weight.chunk(num_ranks))  # your turn


# %%
def check_exercise(cut) -> bool:
    """Compare the cut with the library's own layer, on two ranks."""
    x, right = seen["mlp"]
    inner = layer.mlp.down_proj.in_features
    rows = cut(torch.arange(2 * inner)[:, None], 2)
    for rank, part in enumerate(rows):
        of_gate = int((part < inner).sum())
        print(f"rank {rank}, yours:    {of_gate} rows of gate, {len(part) - of_gate} of up")
        print(f"        expected: {inner // 2} rows of gate, the same {inner // 2} of up")
    summands = []
    own_downs = cut_rows(layer.mlp.down_proj.weight.detach(), 2)
    for merged, down in zip(cut(layer.mlp.gate_up_proj.weight.detach(), 2), own_downs, strict=True):
        gate, up = F.linear(x, merged).chunk(2, dim=1)  # [tokens, inner / ranks] each
        summands.append(F.linear(F.silu(gate) * up, down))
    error = error_of(all_reduce(summands), right)
    print(f"error, yours: {error:.0e}; expected: below 1e-05")
    return error < 1e-5


print("solved" if check_exercise(cut_gate_up) else "not solved yet")

# %% [markdown]
# <details markdown="1"><summary>Hint</summary>
#
# Element $i$ of `silu(gate(x))` is multiplied by element $i$ of `up(x)`. Both must be on the same
# rank. What does rank 0 have if you simply take the upper half?
#
# </details>
#
# <details markdown="1"><summary>Solution</summary>
#
# Simply cut in two, rank 0 would have all of `gate` and rank 1 all of `up`. Each rank needs its
# share of both, the same rows of each:
#
# ```python
# def cut_gate_up(weight: Tensor, num_ranks: int) -> list[Tensor]:
#     """[2 * inner, hidden], gate above up -> for each rank its own gate above its own up."""
#     gate, up = weight.chunk(2)
#     pairs = zip(gate.chunk(num_ranks), up.chunk(num_ranks), strict=True)
#     return [torch.cat(pair) for pair in pairs]
# ```
#
# The same is true of `qkv_proj`, whose three sections have different sizes: see `_cut_columns` in
# [`models/parallel.py`](../minipaged/models/parallel.py).
#
# </details>
#
# <details markdown="1"><summary>Your predictions</summary>
#
# The ranks add up nine times in a step: twice in each of 4 layers, and once for the embedding. For
# one token that is 9 x 256 x 4 = 9,216 bytes. The message has 12 numbers, or 13 when a block is
# added. A block takes 64 KiB on one rank (16 tokens x 4 layers x 2 x 2 heads x 64 elements x 4
# bytes), so 1 MiB holds 16 blocks. On two ranks a block takes 32 KiB of each: 32 blocks. On four
# ranks it is 32 KiB as well, because there are two KV heads: 32 blocks again.
#
# </details>
#
# ## Questions
#
# **Two ranks have room for 1,000 and for 900 blocks. How large is the pool?**
#
# <details markdown="1"><summary>Answer</summary>
#
# 900 blocks, because each block number must exist on every rank. Before the first step, the ranks
# agree on the minimum.
#
# </details>
#
# **Why does only rank 0 sample? If the logits were gathered on all ranks, the next message would
# need no tokens.**
#
# <details markdown="1"><summary>Answer</summary>
#
# All ranks would need the same random numbers, the same stop conditions and the same logits to the
# last bit. If one of them sampled another token once, its keys and values would belong to another
# text, and nothing would report it. And rank 0 must have the tokens anyway, to decide which
# sequences end.
#
# </details>
#
# **A step computes a prompt of 512 tokens. Which exchanges are larger than in a decode step?**
#
# <details markdown="1"><summary>Answer</summary>
#
# The all-reduces are 512 times as large, since each has a row for every token. The message has 511
# more tokens, and the prompt's blocks. The gather is the same, for one row of logits. So the
# bandwidth between the ranks matters for prompts, and the latency for decode steps.
#
# </details>
#
# **A worker sends nothing back to the scheduler, not even "done". When can rank 0 safely give a
# block to another sequence?**
#
# <details markdown="1"><summary>Answer</summary>
#
# At once, because all ranks compute the steps in the same order. On each rank, the next step writes
# into the block only after that rank has finished the previous step.
#
# </details>
#
# ## Results

# %%
print(f"a decode step of 4 sequences: {counts['all-reduce']} all-reduces and 1 gather")
print(f"bytes in them: {crossing['all-reduce']:,} and {crossing['gather']:,} from each rank")
print(f"control message: {crossing['message']} bytes, with whole tables {4 * whole_sizes[3]}")
print(f"pool on each of two ranks: {served[2][2] / served[1][2]:.0%} of the bytes of one")
part = spent["rank 0 of 2"]["all-reduce"] / sum(spent["rank 0 of 2"].values())
print(f"time in all-reduces, two processes on this machine: {part:.0%} of a step")

# %% [markdown]
# To write the cuts and the loop of a worker yourself, take [lab 11](labs/11.md). To use several
# ranks, see [Run one model on several GPUs or machines](../guides/several_ranks.md). From here,
# [run your own model](../guides/run_your_model.md), or go on
# [to vLLM itself](../from_here_to_vllm.md).
