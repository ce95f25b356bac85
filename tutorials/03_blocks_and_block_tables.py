# %% [markdown]
# # 3. Blocks, block tables and the allocator
#
# Memory is cut into blocks of equal size, and a table lists the blocks of each sequence.
#
# **Needs** [chapter 2](02_the_memory_problem.md) · **Time** 30 minutes ·
# **Lab** [1, an allocator](labs/01.md) and [2, block tables](labs/02.md)
#
# ![The block table maps A's logical blocks to blocks anywhere in the pool.](openings/03.svg)
#
# ## Goals
#
# - How a *block table* lets a sequence be stored in scattered blocks (section 4.2 of the paper).
# - What an allocator must do, and why it may hand out blocks in any order.
# - What too large and too small blocks cost.
#
# ## Invariants
#
# 1. Every block is free or has owners, and is free again only when the last owner frees it. Its
#    *reference count* is the number of its owners.
# 2. A sequence of $n$ tokens has $\lceil n / B \rceil$ blocks of $B$ slots. All but the last are
#    full.
# 3. A token stays in the slot that the table gives for as long as the sequence runs.
#
# ## Predict
#
# A pool has 8 blocks of 4 slots. This happens:
#
# - A arrives with 7 tokens, B with 5.
# - A grows to 10 tokens.
# - B ends. C arrives with 9 tokens.
#
# How many blocks does each have at the end? How many slots are empty but unusable for other
# sequences? Does it matter that C's blocks are not adjacent?
#
# ## Build it: an allocator
#
# A physical block is just a number, and the allocator records which numbers are free. Here each
# block has one owner, so one bit per block is enough, and the search for a free block may be slow.
# (The library's allocator, which you write in [lab 1](labs/01.md), counts several owners and takes
# the same time for any pool.)

# %%
from minipaged.errors import DoubleFree, OutOfBlocks


class OneOwner:
    """Hands out the free block with the lowest number. A block has at most one owner."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.is_taken = [False] * num_blocks

    @property
    def num_free(self) -> int:
        return self.is_taken.count(False)

    def allocate(self) -> int:
        if all(self.is_taken):
            raise OutOfBlocks(f"all {self.num_blocks} blocks of the pool are taken: free one.")
        block = self.is_taken.index(False)
        self.is_taken[block] = True
        return block

    def free(self, block: int) -> None:
        if not self.is_taken[block]:
            raise DoubleFree(f"block {block} is free already.")
        self.is_taken[block] = False

    def ref_count(self, block: int) -> int:
        return int(self.is_taken[block])

    def share(self, block: int) -> None:
        raise NotImplementedError(f"block {block} cannot have a second owner: see lab 1.")


# %% [markdown]
# The *block manager* uses the allocator and keeps one block table per sequence: logical block `i`
# of the sequence is physical block `blocks[i]`. We give it your allocator and run the example that
# you predicted. (Tokens stand for words, and nothing is computed. A `SequenceGroup` holds all
# samples of a prompt, here one.)

# %%
from minipaged.memory import BlockManager
from minipaged.sequence import Sequence, SequenceGroup

words = {
    "A": "four score and seven years ago our fathers brought forth".split(),
    "B": "it was the best of".split(),
    "C": "once upon a time there was a small frog".split(),
}
memory = BlockManager(num_blocks=8, block_size=4, allocator=OneOwner)
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

for token in (7, 8, 9):  # a step computes the tokens so far, then samples one more
    sequences["A"].mark_computed(sequences["A"].num_uncomputed_tokens)
    sequences["A"].append(token)
    memory.append(sequences["A"])
second = where_the_words_are()

memory.free(sequences.pop("B"))
admit("C", 9)
third = where_the_words_are()

for name, seq in sequences.items():
    print(name, memory.tables[seq.seq_id])

# %% The pool after A and B arrived; after A grew; after B ended and C arrived
import drawing

figure, axes = drawing.picture(7.2, 4.6, ncols=3)
titles = ("A and B have arrived", "A has grown", "B has ended, C has arrived")
for axis, (contents, owners), title in zip(axes, (first, second, third), titles, strict=True):
    drawing.blocks(axis, contents, owners, num_blocks=8, block_size=4)
    axis.set_title(title)

# %% [markdown]
# A's third block is number 4, because B owned 2 and 3 at that time. C took 2 and 3, which B had
# freed, and 5 as its third. Nothing had to be moved, and no gap was too small: **any free block
# serves any sequence**.
#
# Position $p$ of a sequence is in logical block $\lfloor p / B \rfloor$ at offset $p \bmod B$. Its
# *slot* is the physical block times $B$ plus the offset.

# %%
table = memory.tables[sequences["C"].seq_id]
for position in (0, 3, 4, 8):
    print(f"C's word {position}, {words['C'][position]!r}, is in slot {table.slot(position)}")

# %% [markdown]
# A sequence gets a new block only when its last one is full. Do the labs before you open the
# library's code:
#
# <details markdown="1"><summary>Spoiler for labs 1 and 2: the library's versions</summary>
#
# The slot of a token:
#
# @@ minipaged.memory.block_table.BlockTable.slot
#
# How a sequence gets its blocks:
#
# @@ minipaged.memory.block_manager.BlockManager.append
#
# The library's allocator keeps its free blocks on a stack:
#
# @@ minipaged.memory.allocator.BlockAllocator.allocate
#
# </details>
#
# ### Run the model on it
#
# `Parts` gives your class the role `allocator`, and nothing else changes. `checked()` wraps every
# part in a checker that recounts the owners after each call.

# %%
from minipaged import LLM, Event, EventLog, Parts, SamplingParams
from minipaged.evaluation.stories import prompt, tell
from minipaged.tracing.replay import Replay

greedy = SamplingParams(temperature=0, max_tokens=24)
stories = [tell(num_facts=size, seed=size) for size in (1, 2, 3, 4, 6, 8)]
prompts = [prompt(story, story.questions[0]) for story in stories]

events: list[Event] = []
mine = Parts(allocator=OneOwner).checked()
yours = LLM(num_blocks=40, parts=mine.traced(EventLog(events.append)), enable_prefix_caching=False)
served = yours.generate(prompts, greedy, use_tqdm=False)
for story, output in zip(stories, served, strict=True):
    print(f"{story.questions[0].text:42}{output.outputs[0].text}")

# %% [markdown]
# Here is the pool at work. Point at a block to see its owner and its place in the block table.

# %%
Replay(events, title="Your allocator serves a model")

# %% [markdown]
# ### Choose a block size
#
# A sequence wastes the empty part of its last block, half a block on average, so small blocks waste
# less. But each block costs a table entry, a call of the allocator and, most of all, one more
# lookup in attention. The paper measures this in Figure 18 and settles on 16. We count what needs
# no clock, with chapter 2's ShareGPT lengths:

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
right.set(xlabel="block size", ylabel="table entries per sequence")

# %% [markdown]
# ## Check
#
# Your allocator gives the same answers as the library's, and every block is free again. The checker
# also finds the classic mistake, to forget that a block can have several owners:

# %%
from minipaged.errors import CheckFailed
from minipaged.memory import CheckedAllocator

expected = LLM(num_blocks=40).generate(prompts, greedy, use_tqdm=False)
assert [o.outputs[0].token_ids for o in served] == [o.outputs[0].token_ids for o in expected]
assert yours.engine.scheduler.memory.num_free == 40


class ForgetsToCount(OneOwner):
    def share(self, block: int) -> None:
        pass  # "it is taken already"


allocator = CheckedAllocator(ForgetsToCount(4))
block = allocator.allocate()
try:
    allocator.share(block)
except CheckFailed as error:
    print(error)
else:
    raise AssertionError("the mistake was not noticed")

# %% [markdown]
# ### Exercise: from a slot back to the token
#
# A debugger shows a wrong value in slot 17 of the pool. Whose token is it? The body below would be
# right if every sequence were contiguous, as in chapter 2. Rewrite it for block tables, and run
# this cell and the next one again.

# %%
from minipaged.memory import BlockTable


def token_in(slot: int, tables: dict[str, BlockTable]) -> tuple[str, int] | None:
    """Name of the sequence and position of the token in this slot; None if the slot is empty."""
    for name, table in tables.items():
        position = slot - table.blocks[0] * table.block_size  # your turn
        if 0 <= position < table.num_tokens:
            return name, position
    return None


# %%
from random import Random


def random_tables(block_size: int, lengths: tuple[int, ...]) -> dict[str, BlockTable]:
    blocks = list(range(16))
    Random(block_size).shuffle(blocks)
    owned = [[blocks.pop() for _ in range(0, length, block_size)] for length in lengths]
    parts = zip("ABCD", owned, lengths, strict=False)
    return {name: BlockTable(block_size, mine, length) for name, mine, length in parts}


def check_exercise(token_in) -> bool:
    """Compare all slots with the library's way from positions to slots."""
    pools = {
        "A and C above": {name: memory.tables[seq.seq_id] for name, seq in sequences.items()},
        "blocks of 4": random_tables(4, (16, 7, 1, 9)),
        "blocks of 16": random_tables(16, (40, 32, 5)),
        "blocks of 1": random_tables(1, (3, 5)),
    }
    solved = True
    for pool, tables in pools.items():
        size = tables["A"].block_size
        places = [(name, p) for name, table in tables.items() for p in range(table.num_tokens)]
        expected = {tables[name].slot(p): (name, p) for name, p in places}
        wrong = [slot for slot in range(16 * size) if token_in(slot, tables) != expected.get(slot)]
        print(f"{pool:14} wrong slots: {len(wrong)}")
        for slot in wrong[:2]:
            yours = token_in(slot, tables)
            print(f"    slot {slot}, yours: {yours}, expected: {expected.get(slot)}")
        solved = solved and not wrong
    return solved


print("solved" if check_exercise(token_in) else "not solved yet")

# %% [markdown]
# <details markdown="1"><summary>Hint</summary>
#
# A slot number has two parts: a physical block and an offset in it. The index of a physical block
# in a table is its logical block. And the last block may have empty slots.
#
# </details>
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# def token_in(slot: int, tables: dict[str, BlockTable]) -> tuple[str, int] | None:
#     """Name of the sequence and position of the token in this slot; None if the slot is empty."""
#     for name, table in tables.items():
#         physical, offset = divmod(slot, table.block_size)
#         if physical in table.blocks:
#             position = table.blocks.index(physical) * table.block_size + offset
#             return (name, position) if position < table.num_tokens else None
#     return None
# ```
#
# An engine needs no such search: it goes only from positions to slots.
#
# </details>
#
# <details markdown="1"><summary>Your predictions</summary>
#
# A has 3 blocks for its 10 tokens, C has 3 for its 9, and B has none. Of the 24 slots 5 are empty,
# all at the ends of last blocks. It does not matter that C's blocks are 2, 3 and 5: the table
# records them.
#
# </details>
#
# ## Questions
#
# **Does the order in which blocks are allocated change the model's output?**
#
# <details markdown="1"><summary>Answer</summary>
#
# No. Every token is found through the table. The order can change the speed a little: adjacent
# memory is read faster, and recently used memory is still in the processor's cache.
#
# </details>
#
# **Can a prompt of 100 tokens be too long for a pool with 100 empty slots?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Yes. A prompt fits if $\lceil 100 / B \rceil$ *blocks* are free. The empty slots in other
# sequences' last blocks are kept for their next tokens. Such internal fragmentation is less than
# one block per sequence, and there is no external fragmentation.
#
# </details>
#
# **Your allocator allows one owner per block. Why does the library's count owners?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Samples of one prompt share its blocks (chapter 7), and so do requests that share a prefix
# (chapter 8). With counts, a sequence can free its blocks without knowing the other owners.
#
# </details>
#
# ## Results

# %%
at_16 = sizes.index(16)
mean = sum(lengths) / len(lengths)
print(f"waste with blocks of 16, ShareGPT lengths: {waste[at_16]:.1f} % of the slots")
print(f"waste if each request reserved 2,048:      {100 - 100 * mean / 2048:.1f} %")
print(f"table entries per sequence:                {entries[at_16]:.0f}")

# %% [markdown]
# Now do [lab 1](labs/01.md) and [lab 2](labs/02.md). Next: [attention that reads keys and values
# through such a table](04_paged_attention.md).
