# %% [markdown]
# # 3. Blocks, block tables and the allocator
#
# Memory is cut into blocks of equal size, and a table lists the blocks of each sequence.
#
# ## Goals
#
# - How a *block table* lets a sequence be stored in pieces and still be one sequence (section 4.2
#   of the paper).
# - What an allocator must do, and why it may give out blocks in any order it likes.
# - What the size of a block costs when it is too large, and when it is too small.
#
# ## Invariants
#
# 1. Every block is free or has owners. Its *reference count* is their number, and the block is free
#    again only when the last owner frees it.
# 2. A sequence of $n$ tokens has $\lceil n / B \rceil$ blocks of $B$ slots. All but the last are
#    full.
# 3. A token is stored where the table says, and stays there as long as the sequence runs.
#
# ## Predict
#
# A pool has 8 blocks of 4 slots. This happens:
#
# - A comes with 7 tokens, B with 5.
# - A grows to 10 tokens.
# - B ends. C comes with 9 tokens.
#
# How many blocks does each have at the end? How many slots are empty but unusable for other
# sequences? Does it matter that C's blocks are not adjacent?
#
# ## Build it: an allocator of your own
#
# A physical block is just a number. The allocator tracks which numbers are free, and counts the
# owners of the others. It has four methods and two attributes, and never looks at a tensor. Write
# one that always allocates the lowest free number, which the library's does not:

# %%
import heapq

from minipaged.errors import DoubleFree, OutOfBlocks


class LowestFirst:
    """Hands out the free block with the lowest number."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free_blocks = list(range(num_blocks))  # a heap: the smallest comes first
        self.owners = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self.free_blocks)

    def allocate(self) -> int:
        if not self.free_blocks:
            raise OutOfBlocks(
                f"no free block is left in a pool of {self.num_blocks}: free one first."
            )
        block = heapq.heappop(self.free_blocks)
        self.owners[block] = 1
        return block

    def share(self, block: int) -> None:
        if self.owners[block] == 0:
            raise DoubleFree(f"block {block} has no owner, so it cannot be shared.")
        self.owners[block] += 1

    def free(self, block: int) -> None:
        if self.owners[block] == 0:
            raise DoubleFree(f"block {block} has no owner, so it cannot be freed again.")
        self.owners[block] -= 1
        if self.owners[block] == 0:
            heapq.heappush(self.free_blocks, block)

    def ref_count(self, block: int) -> int:
        return self.owners[block]


# %% [markdown]
# The *block manager* uses the allocator. It keeps one block table for each sequence: logical block
# 0, 1, 2, ... of the sequence is physical block `blocks[0]`, `blocks[1]`, `blocks[2]`, ... We give
# it your allocator and run the example from above. (A sequence is a list of tokens; here the tokens
# are words, and nothing is computed.)

# %%
from minipaged.memory import BlockManager
from minipaged.sequence import Sequence, SequenceGroup

words = {
    "A": "four score and seven years ago our fathers brought forth".split(),
    "B": "it was the best of".split(),
    "C": "once upon a time there was a small frog".split(),
}
memory = BlockManager(num_blocks=8, block_size=4, allocator=LowestFirst)
sequences = {}


def admit(name: str, num_tokens: int) -> None:
    seq = Sequence(len(sequences), range(num_tokens))  # token i of A stands for A's word i
    memory.admit(SequenceGroup(name, [seq]))
    sequences[name] = seq


def where_the_words_are() -> tuple[dict[int, list[str]], dict[int, str]]:
    contents, owners = {}, {}
    for name, seq in sequences.items():
        table = memory.tables[seq.seq_id]
        for logical, physical in enumerate(table.blocks):
            contents[physical] = words[name][4 * logical :][: table.filled(logical)]
            owners[physical] = name
    return contents, owners


admit("A", 7)
admit("B", 5)
first = where_the_words_are()

for token in (7, 8, 9):  # a step computes what is there; then one more token is sampled
    sequences["A"].mark_computed(sequences["A"].num_uncomputed_tokens)
    sequences["A"].append(token)
    memory.append(sequences["A"])
second = where_the_words_are()

memory.free(sequences.pop("B"))
admit("C", 9)
third = where_the_words_are()

for name, seq in sequences.items():
    print(name, memory.tables[seq.seq_id])

# %% The pool after A and B came; after A grew; after B ended and C came
import drawing

figure, axes = drawing.picture(7.2, 4.6, ncols=3)
titles = ("A and B have come", "A has grown", "B has ended, C has come")
for axis, (contents, owners), title in zip(axes, (first, second, third), titles, strict=True):
    drawing.blocks(axis, contents, owners, num_blocks=8, block_size=4)
    axis.set_title(title)

# %% [markdown]
# A's third block is number 4, because B owned 2 and 3 at that time. C took 2 and 3, which B had
# freed, and 5 as its third. Nothing had to be moved, and no gap was too small: **any free block
# serves any sequence**. That is the whole point. With pieces of different lengths, gaps remain that
# fit no request, and chapter 2 measured how much is lost to them.
#
# To read position $p$, look it up in the sequence's block table: logical block $\lfloor p / B
# \rfloor$, offset $p \bmod B$. The physical block times $B$ plus the offset is the *slot*.

# %%
table = memory.tables[sequences["C"].seq_id]
for position in (0, 3, 4, 8):
    print(f"C's word {position}, {words['C'][position]!r}, is in slot {table.slot(position)}")

# %% [markdown]
# This is the library's, in full:
#
# @@ minipaged.memory.block_table.BlockTable.slot
#
# and this is how a sequence gets new blocks: one when the last is full, and not before. (Chapter 7
# explains what happens with a block that has other owners.)
#
# @@ minipaged.memory.block_manager.BlockManager.append
#
# The library's own allocator keeps its free blocks on a stack instead. It allocates the block that
# was freed last, which is likely to be in the processor's cache still, and takes the same time
# however large the pool is:
#
# @@ minipaged.memory.allocator.BlockAllocator.allocate
#
# ### The model runs on it
#
# Roles are wired in one place, `Parts`. Your class takes the role `allocator`, and nothing else
# changes. `checked()` wraps every part in a checker that recounts the owners after each call.

# %%
from minipaged import LLM, Event, EventLog, Parts, SamplingParams
from minipaged.evaluation.stories import prompt, tell
from minipaged.tracing.replay import Replay

greedy = SamplingParams(temperature=0, max_tokens=24)
stories = [tell(num_facts=size, seed=size) for size in (1, 2, 3, 4, 6, 8)]
prompts = [prompt(story, story.questions[0]) for story in stories]

events: list[Event] = []
mine = Parts(allocator=LowestFirst).checked()
yours = LLM(num_blocks=40, parts=mine.traced(EventLog(events.append)), enable_prefix_caching=False)
served = yours.generate(prompts, greedy, use_tqdm=False)
for story, output in zip(stories, served, strict=True):
    print(f"{story.questions[0].text:42}{output.outputs[0].text}")

# %% [markdown]
# The pool with your allocator at work. Point at a block to see its owner, and find it in the block
# table next to it.

# %%
Replay(events, title="Your allocator serves a model")

# %% [markdown]
# ### How large should a block be?
#
# A sequence wastes the empty part of its last block: half a block on average, so small blocks waste
# less. But each block costs an entry in a table, a step of the allocator, and, most of all, one
# more place where the attention must look. The paper measures this in Figure 18 and settles on 16.
# Let us measure the part that needs no clock, with requests as long as those of ChatGPT's users
# (the paper's ShareGPT trace, of which only the mean lengths are published).

# %% What blocks of each size waste, and how many entries the block tables have
from minipaged.evaluation.sim.traces import WORKLOADS

requests = WORKLOADS["sharegpt"].draw(num_requests=1024, seed=0)
lengths = [prompt_len + output_len for prompt_len, output_len in requests]
sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256]
waste, entries = [], []
for size in sizes:
    num_blocks = [-(-length // size) for length in lengths]
    slots = sum(num_blocks) * size
    waste.append(100 * (slots - sum(lengths)) / slots)
    entries.append(sum(num_blocks) / len(lengths))

figure, (left, right) = drawing.picture(ncols=2)
left.plot(sizes, waste, marker="o")
left.set(xscale="log", xticks=sizes, xticklabels=sizes)
left.set(xlabel="block size", ylabel="slots empty, %")
right.plot(sizes, entries, marker="o", color=drawing.COLOURS[1])
right.set(xscale="log", yscale="log", xticks=sizes, xticklabels=sizes)
right.set(xlabel="block size", ylabel="table entries a sequence")

# %% [markdown]
# ## Check
#
# Your allocator gives the same answers as the library's, every block is free again, and the checker
# names the mistake of a wrong allocator. The classic mistake is to forget that a block can have
# several owners:

# %%
from minipaged.errors import CheckFailed
from minipaged.memory import CheckedAllocator

expected = LLM(num_blocks=40).generate(prompts, greedy, use_tqdm=False)
assert [o.outputs[0].token_ids for o in served] == [o.outputs[0].token_ids for o in expected]
assert yours.engine.scheduler.memory.num_free == 40


class ForgetsToCount(LowestFirst):
    def share(self, block: int) -> None:
        pass  # "it has an owner already"


allocator = CheckedAllocator(ForgetsToCount(4))
block = allocator.allocate()
try:
    allocator.share(block)
except CheckFailed as error:
    print(error)
else:
    raise AssertionError("the mistake was not noticed")

# %% [markdown]
# <details markdown="1"><summary>Your predictions</summary>
#
# A has 3 blocks for its 10 tokens, C has 3 for its 9. Of their 24 slots 5 are empty, all at the
# ends of last blocks. It does not matter that C's blocks are 2, 3 and 5: the table records it.
#
# </details>
#
# ## Questions
#
# **Does the order in which blocks are allocated change the model's output?**
#
# <details markdown="1"><summary>Answer</summary>
#
# No. The table is the only way to a token, and it names the block whatever its number. The order
# can change the speed a little: neighbours in memory are read faster, and recently used ones are in
# the cache.
#
# </details>
#
# **Can it happen that 100 slots are free and a prompt of 100 tokens does not fit?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Free *blocks* can all be used, so a prompt fits if $\lceil 100 / B \rceil$ of them are free. The
# empty slots at the end of other sequences' last blocks are not free: they are kept for the tokens
# that come next. There is no external fragmentation, and internal fragmentation below one block a
# sequence.
#
# </details>
#
# **Why does the allocator count owners, when so far each block has one?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Because soon it has several: samples of one prompt share its blocks (chapter 7), and so do
# requests that share a prefix (chapter 8). With counts, "free my blocks" is right in every case,
# and no sequence needs to know the other owners.
#
# </details>
#
# **Your `allocate` takes time that grows with the logarithm of the free blocks, the library's does
# not. When would you prefer yours?**
#
# <details markdown="1"><summary>Answer</summary>
#
# If the upper part of the pool should stay empty, say to return it to another program. A stack
# scatters the blocks in use over time.
#
# </details>
#
# ## Results

# %%
at_16 = sizes.index(16)
mean = sum(lengths) / len(lengths)
print(f"waste with blocks of 16, ShareGPT lengths: {waste[at_16]:.1f} % of the slots")
print(f"waste had each request reserved 2,048:     {100 - 100 * mean / 2048:.1f} %")
print(f"table entries a sequence:                  {entries[at_16]:.0f}")

# %% [markdown]
# Next: [attention that reads keys and values through such a table](04_paged_attention.md).
