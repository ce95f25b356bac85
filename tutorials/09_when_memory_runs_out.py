# %% [markdown]
# # 9. When memory runs out: recompute or swap
#
# A running request has to release its blocks in the middle of an answer, and its output must not
# change.
#
# **Needs** [chapter 6](06_continuous_batching.md), [chapter 7](07_sharing.md) · **Time** 40 minutes
# · **Lab** [7, swapping and recomputation](labs/07.md)
#
# ![When the pool is full, the youngest request releases its blocks.](openings/09.svg)
#
# ## Goals
#
# - Why an engine that wastes no memory can run out of it, and how it then *preempts* a request: it
#   takes all blocks of one request, so that others can continue (section 4.5 of the paper).
# - Two ways to bring a preempted request back, *recomputation* and *swapping*, and what each costs.
# - What happens to a request that is larger than the whole pool.
#
# ## Invariants
#
# 1. A preempted request generates the same tokens as without preemption.
# 2. All or nothing: a request keeps all its blocks or none. Half a sequence cannot continue.
# 3. The oldest request is never preempted. It advances in every step until it ends, and then
#    another one is the oldest.
#
# ## Predict
#
# A pool has 36 blocks of 4 slots. Eight requests arrive together, with prompts of 21, 7, 14, 7, 21,
# 7, 14 and 7 tokens. They generate 24, 60, 24, 40, 20, 30, 24 and 20 tokens.
#
# - All eight are admitted at once. How many of the 36 blocks are in use after the first step?
# - After about how many steps is the pool full?
# - With ample memory, 60 steps are enough. How many does it take here?
#
# ## Build it: a choice of victims
#
# Eight prompts fit easily. Then every sequence grows, and every four steps each needs one more
# block. At some point none is free.
#
# An engine that reserves memory for the longest possible output never has this problem, but it
# keeps most of the pool empty. Paging admits many requests, and now and then these are too many.
# The scheduler goes through the running requests, oldest first, and gives each its next block. If
# none is free, a younger request is preempted; if there is no younger one, the request itself is
# preempted.
#
# A separate part, `select_victim`, gets the groups that are younger than the one in need, and
# returns the one to preempt. The library's default is the paper's choice, the youngest.
#
# <details markdown="1"><summary>The library's code. Spoiler: it solves task 4 of lab 4</summary>
#
# @@ minipaged.scheduler.fcfs.FCFSScheduler._make_room
#
# @@ minipaged.scheduler.fcfs.youngest
#
# </details>
#
# Write two other choices: the group that is cheapest to recompute, and the largest group, in the
# hope that no further victim is needed soon.

# %%
from collections.abc import Sequence as Many

from minipaged.scheduler.fcfs import SelectVictim, youngest
from minipaged.sequence import SequenceGroup


def num_computed(group: SequenceGroup) -> int:
    """Tokens that would have to be computed again."""
    return sum(seq.num_computed_tokens for seq in group.sequences)


def cheapest(candidates: Many[SequenceGroup]) -> SequenceGroup:
    return min(candidates, key=num_computed)


def largest(candidates: Many[SequenceGroup]) -> SequenceGroup:
    return max(candidates, key=num_computed)


# %% [markdown]
# How does the victim come back? The library has both of the paper's ways:
#
# - *Recomputation*: its blocks are freed, and it returns to the waiting queue. When its turn comes,
#   its prompt and all tokens generated so far are computed again as one prompt, in one step. Then
#   the request continues where it stopped.
# - *Swapping*: its blocks are copied to a second pool, the *swap pool*, in host memory (large, but
#   slow to reach). Later they are copied back.

# %%
from typing import Any

from minipaged import LLM, Event, EventLog, Parts, SamplingParams
from minipaged.evaluation.stories import ANIMALS, NAMES

lengths = [24, 60, 24, 40, 20, 30, 24, 20]
repeats = [3, 1, 2, 1, 3, 1, 2, 1]
prompts = [
    f"Once upon a time {name} the {animal}" * number
    for name, animal, number in zip(NAMES, ANIMALS, repeats, strict=False)
]
params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]


def build(select_victim: SelectVictim = youngest, **options: Any) -> tuple[LLM, list[Event]]:
    """A tight pool, and the list of its events."""
    events: list[Event] = []
    tight = {"num_blocks": 36, "num_swap_blocks": 72, "block_size": 4}
    options = tight | {"enable_prefix_caching": False} | options
    parts = Parts(select_victim=select_victim).traced(EventLog(events.append))
    return LLM(parts=parts, **options), events


engines, traces, outputs = {}, {}, {}
for mode in ("recompute", "swap"):
    engines[mode], traces[mode] = build(preemption=mode)
    outputs[mode] = engines[mode].generate(prompts, params, use_tqdm=False)


def steps_of(events: list[Event]) -> list[Event]:
    return [event for event in events if event.event == "schedule"]


for mode, events in traces.items():
    num_preemptions = [output.metrics.num_preemptions for output in outputs[mode]]
    print(f"{mode:10} {len(steps_of(events))} steps, preemptions of each request {num_preemptions}")

# %% [markdown]
# A user sees preemption only in `RequestOutput.metrics` and in the time it takes. Step by step:

# %% Each row is a request, oldest on top; outlined while it waits
import drawing

figure, axes = drawing.picture(7.2, 3.6, ncols=2, sharex=True, sharey=True)
for axis, (mode, events) in zip(axes, traces.items(), strict=True):
    rows: dict[str, list[str]] = {number: [] for number in "01234567"}
    for event in steps_of(events):
        scheduled = event.fields["num_scheduled_tokens"]
        for number, row in rows.items():
            request, num_tokens = f"llm-{number}", scheduled.get(int(number), 0)
            if request in event.fields["running"]:
                row.append("reads" if num_tokens > 1 else "runs")
            elif request in event.fields["swapped"]:
                row.append("swapped")
            elif request in event.fields["waiting"]:
                row.append("waits")
    labels = {"runs": "decodes", "swapped": "swapped out", "reads": "computes all its tokens"}
    drawing.strips(axis, rows, labels)
    axis.set(title=mode, xlabel="step")
    axis.get_legend().remove()
figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)

# %% [markdown]
# Rows 0, 1 and 2, the oldest, have no gap. The youngest leave and return in order of age. On the
# left, each return begins with a step that computes everything (green). On the right, the request
# continues where it stopped.
#
# Now the blocks. A request preempted for recomputation holds none. A swapped request holds as many
# as before, in the swap pool.

# %% Blocks in use in the pool (of 36), and in the swap pool on top of them, step by step
figure, axes = drawing.picture(ncols=2, sharex=True, sharey=True)
for axis, (mode, events) in zip(axes, traces.items(), strict=True):
    owned = {"pool": 0, "swap": 0}
    history: list[list[int]] = []
    for event in events:
        if event.event == "allocate":
            owned[event.fields["pool"]] += 1
        elif event.event == "release" and event.fields["ref_count"] == 0:
            owned[event.fields["pool"]] -= 1
        elif event.event == "schedule":
            history.append(list(owned.values()))
    pools = ["pool", "swap pool"]
    axis.stackplot(range(len(history)), *zip(*history, strict=True), labels=pools, alpha=0.8)
    axis.axhline(36, color=drawing.GREY, linestyle=":")
    axis.set(title=mode, xlabel="step", ylabel="blocks")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)

# %% [markdown]
# In both cases the pool stays nearly full as long as there are requests to fill it. That is the
# aim. Watch the run that swaps:

# %%
from minipaged.tracing.replay import Replay

Replay(traces["swap"], title="A pool too small: swapping")

# %% [markdown]
# ### All or nothing
#
# A sequence needs all its keys and values in every step. Without one block it cannot continue, so
# the scheduler never takes single blocks. (An operating system must guess which page is used next;
# here all of them are: section 4.5.) For the same reason a request with several samples is
# preempted with all its sequences, which sample in the same steps. By default (`preemption="auto"`)
# the library swaps such a request and recomputes single sequences, as the first vLLM did. Each
# block is copied once, however many sequences share it:

# %%
llm, events = build(num_blocks=24)
three = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=24, ignore_eos=True)
llm.generate([prompts[1], prompts[2] * 3], [params[1], three], use_tqdm=False)
out = next(event for event in events if event.event == "swap_out")
for seq_id, blocks in out.fields["block_tables"].items():
    print(f"sequence {seq_id} is now in swap blocks {blocks}")
print(f"{len(out.fields['pairs'])} blocks were copied")

# %% [markdown]
# ### Compare victims
#
# Now your functions, with preemptions, steps and lost work: tokens computed again, or blocks copied
# out and in.

# %%
for name, victim, caching in (
    ("recompute, cheapest", cheapest, False),
    ("recompute, largest", largest, False),
    ("recompute, prefix cache", youngest, True),
):
    engines[name], traces[name] = build(
        victim, preemption="recompute", enable_prefix_caching=caching
    )
    outputs[name] = engines[name].generate(prompts, params, use_tqdm=False)

needed = sum(len(output.prompt_token_ids) for output in outputs["swap"]) + sum(lengths) - 8
lost = {}
for name, events in traces.items():
    steps = steps_of(events)
    lost[name] = sum(sum(step.fields["num_scheduled_tokens"].values()) for step in steps) - needed
    copied = sum(len(e.fields["pairs"]) for e in events if e.event.startswith("swap_"))
    preempted = [output.metrics.num_preemptions for output in outputs[name]]
    print(
        f"{name:24}{sum(preempted)} preemptions {preempted}, {len(steps)} steps, "
        f"{lost[name]:3} tokens recomputed, {copied:2} blocks copied"
    )

# %% [markdown]
# The first two rows use the youngest, and preempt the same requests at the same steps. The youngest
# is not always the best choice: `cheapest` loses fewer tokens, and `largest` needs the fewest
# preemptions. But look at which requests pay. With the youngest, early requests are left alone. The
# others can hit any request younger than the one in need. Yet no request starves: the oldest is
# never offered, so it ends, and every request becomes the oldest some day. The last row benefits
# from the prefix cache (chapter 8): the blocks of a preempted request may still be cached, and need
# not be recomputed.
#
# ### Cost of each way
#
# On a CPU, swapping is a copy from memory to memory, and far cheaper than computing. On a GPU,
# blocks cross the bus to the host. Each block is a separate copy for the keys and for the values of
# every layer, so small blocks mean many small copies. The library has a formula for OPT-13B on an
# A100. The bus moves 16 GB per second, and each copy takes 3 microseconds to start. Recomputing
# takes one step, which either reads all weights or multiplies them with all tokens, whichever takes
# longer. The formula gives:

# %% By formula: a sequence of OPT-13B out and back. Left: 256 tokens. Right: by length
from minipaged.evaluation.sim.catalogue import DEPLOYMENTS
from minipaged.evaluation.sim.cost_model import CostModel

costs = CostModel(DEPLOYMENTS["opt-13b"])


def swap_ms(num_tokens: int, block_size: int) -> float:
    """Out and in again."""
    return 2e3 * costs.swap(-(-num_tokens // block_size), block_size)


def recompute_ms(num_tokens: int) -> float:
    """A step that does nothing else."""
    return 1e3 * costs.step(0, 0, num_tokens, num_pairs=num_tokens**2 / 2)


sizes = [2**power for power in range(9)]
tokens = range(16, 1025, 16)
figure, (left, right) = drawing.picture(ncols=2)
left.plot(sizes, [swap_ms(256, size) for size in sizes], marker="o", label="swap")
left.axhline(recompute_ms(256), color="C1", linestyle="--", label="recompute")
left.set(xlabel="block size", ylabel="milliseconds", ylim=(0, None))
left.set_xscale("log", base=2)
left.xaxis.set_major_formatter("{x:.0f}")
left.legend()
for size, style in ((1, ":"), (8, "-."), (64, "-")):
    swaps = [swap_ms(number, size) for number in tokens]
    right.plot(tokens, swaps, f"C0{style}", label=f"swap, blocks of {size}")
right.plot(tokens, list(map(recompute_ms, tokens)), "C1--", label="recompute")
right.set(xlabel="tokens of the sequence", ylim=(0, 260))
right.legend(fontsize=8)

print(f"recompute 256 tokens: {recompute_ms(256):.0f} ms")
for size in (1, 8, 16, 256):
    print(f"swap them in blocks of {size:3}: {swap_ms(256, size):3.0f} ms")

# %% [markdown]
# This is the message of the paper's Figure 19: the time to recompute does not depend on the block
# size, and swapping small blocks is slow. By the formula, swapping wins from blocks of 16; in the
# paper's end-to-end runs, the two are comparable from 16 to 64. The paper also states that
# recomputing is never more than 20 % slower. The formula gives 52 % for blocks of 256, because it
# assumes an idle bus. (`docs/paper.md` lists this as a miss.) Where the dashed line is flat, a step
# takes the time to read all weights. If other sequences decode in the same step, the weights are
# read anyway, and recomputing so few tokens costs almost nothing.
#
# ### Larger than the pool
#
# What if the oldest request needs a block, all others are preempted, and there is still none?

# %%
from minipaged.errors import PromptTooLong

llm, _ = build()
endless = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
greedy, *others = [
    o.outputs[0] for o in llm.generate(prompts, [endless, *params[1:]], use_tqdm=False)
]
print(f"{len(greedy.token_ids)} of 500 tokens: {greedy.finish_reason}")
print(f"the others: {[len(other.token_ids) for other in others]}")
try:
    llm.generate(prompts[0] * 9, params[0], use_tqdm=False)
except PromptTooLong as error:
    print(f"rejected: {error}")

# %% [markdown]
# The request ends with the tokens it has so far and the finish reason `"length"`. A prompt that is
# larger than the pool is rejected at once.
#
# ## Check
#
# Invariant 1: the tokens are those of an ample pool, both ways and with all victims. Invariant 2:
# all blocks of both pools are free again. Invariant 3: request 0 was never preempted.

# %%
ample = LLM(enable_prefix_caching=False).generate(prompts, params, use_tqdm=False)
expected = [output.outputs[0].token_ids for output in ample]
for name, served in outputs.items():
    assert [output.outputs[0].token_ids for output in served] == expected, name
    assert served[0].metrics.num_preemptions == 0
    assert sum(output.metrics.num_preemptions for output in served) > 0
    memory = engines[name].engine.scheduler.memory
    assert memory.num_free == 36
    assert memory.num_free_swap_blocks == 72
assert [other.token_ids for other in others] == expected[1:]
print(f"{len(outputs)} tight runs, the same tokens, and all blocks are free again")

# %% [markdown]
# ### Exercise: what a victim frees
#
# `largest` takes the tokens of a group for the memory it would free. But a block returns to the
# pool only when its last owner frees it. Write `blocks_freed`: if all sequences of a group are
# preempted, how many blocks become free? `tables` has the block numbers of each of its sequences,
# and `ref_count(block)` is the number of sequences that own the block, in this group or in another.
# (The prefix cache does not count as an owner here.)


# %%
def blocks_freed(tables: list[list[int]], ref_count) -> int:
    """Blocks that are free after all sequences with these block tables have been preempted."""
    return sum(len(table) for table in tables)  # your turn


# %%
from copy import deepcopy


def check_exercise(blocks_freed) -> bool:
    """Compare with the library: free each group in a copy of its block manager, and count."""
    solved = True
    engine = LLM(num_blocks=64, block_size=4).engine
    for name, text, num_samples in (("A", prompts[0], 3), ("B", prompts[0], 1), ("C", "Why?", 3)):
        samples = SamplingParams(n=num_samples, seed=1, max_tokens=20, ignore_eos=True)
        engine.add_request(name, text, samples)
    for _ in range(8):
        engine.step()
    memory = engine.scheduler.memory
    for group in engine.scheduler.running:
        tables = [memory.tables[seq.seq_id].blocks for seq in group.sequences]
        yours, twin = blocks_freed(tables, memory.ref_count), deepcopy(memory)
        for seq in group.sequences:
            twin.free(seq)
        expected = twin.num_free - memory.num_free
        print(f"{group.request_id}  tables {tables}, yours: {yours}, expected: {expected}")
        solved = solved and yours == expected
    return solved


print("solved" if check_exercise(blocks_freed) else "not solved yet")

# %% [markdown]
# <details markdown="1"><summary>Hint</summary>
#
# A block becomes free if the group's sequences are all of its owners. How many of the group's
# tables list it?
#
# </details>
#
# <details markdown="1"><summary>Solution</summary>
#
# Count how many tables of the group list each block, and compare with its reference count. A block
# that several samples share counts once. A block that another request shares (A and B have the same
# prompt) does not count.
#
# ```python
# def blocks_freed(tables: list[list[int]], ref_count) -> int:
#     """Blocks that are free after all sequences with these block tables have been preempted."""
#     listed = [block for table in tables for block in table]
#     return sum(listed.count(block) == ref_count(block) for block in set(listed))
# ```
#
# </details>
#
# <details markdown="1"><summary>Your predictions</summary>
#
# After the first step, 28 blocks are in use: 6 for a prompt of 21 tokens, 4 for one of 14, 2 for
# one of 7. Eight requests need two blocks per step on average, so the pool is full after about four
# more steps. It takes 60 steps here as well: the longest request is the second oldest and is never
# preempted, and the others fit next to it.
#
# </details>
#
# ## Questions
#
# **Why are a prompt and 50 generated tokens recomputed in one step, when generating them took 50?**
#
# <details markdown="1"><summary>Answer</summary>
#
# The model can read a token only after it has been sampled. The first time, each token was sampled
# in the step before. Now all of them exist, and a step can read as many as its budget allows. That
# is why recomputing is much faster than the original computation (section 4.5).
#
# </details>
#
# **How large must the swap pool be?**
#
# <details markdown="1"><summary>Answer</summary>
#
# According to the paper, no larger than the pool, since every swapped block was there once. But the
# remaining requests grow into the free blocks, and may be swapped in turn. If eight equal requests
# are swapped one by one, each with its share of the 36 blocks at that moment, the swap pool holds
# up to 36 (1/8 + 1/7 + ... + 1/2), or about 62 blocks; hence the 72. If it is full, the library
# recomputes instead. Try `num_swap_blocks=4`.
#
# </details>
#
# ## Results

# %%
pairs = zip(ample, lengths, strict=True)
at_the_end = sum(-(-(len(o.prompt_token_ids) + n - 1) // 4) for o, n in pairs)
print(f"blocks that all eight need in the end     {at_the_end}")
print("blocks in the pool                        36")
for name in ("recompute", "recompute, cheapest", "swap"):
    print(f"tokens recomputed, {name:23} {lost[name] / needed:3.0%}")

# %% [markdown]
# Write the preemption itself in [lab 7](labs/07.md). To try out policies for latency, take
# [lab 9](labs/09.md).
#
# Next: [a kernel of your own, on a GPU or without one](10_a_first_kernel.md).
