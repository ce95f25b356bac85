# %% [markdown]
# # 7. Sharing
#
# Sequences with a common prefix store it once. A block is copied only when one of its owners writes
# to it.
#
# **Needs** [chapter 6](06_continuous_batching.md) · **Time** 40 minutes ·
# **Lab** [5, fork and copy-on-write](labs/05.md)
#
# ![A1 and A2 share block 0. Before A1 writes to block 1, the block is copied.](openings/07.svg)
#
# ## Goals
#
# - What a *fork* is, and why it costs no memory at first.
# - How *copy-on-write* works: which sequence copies which block, and when (section 4.4 of the
#   paper, Figures 8 and 9).
# - How much memory *parallel sampling* and *beam search* save, and why beam search saves more.
#
# ## Invariants
#
# 1. A block that has several owners is read by all of them and written by none.
# 2. Its reference count is the number of block tables that list it.
# 3. Sharing never changes the generated tokens. Sample $i$ of a request is what a separate request
#    with its seed would generate.
#
# ## Predict
#
# A prompt has 17 tokens, a block has 4 slots. A request asks for four samples of 24 tokens.
#
# - How many blocks of the prompt do the four share while they run? How many blocks are copied?
# - How many blocks do they hold together at the end? How many without sharing?
# - Does a beam search of four beams save more than four samples, or less?
#
# ## Build it: copy-on-write
#
# A prompt often has several answers. In *parallel sampling* a user gets, say, four suggestions. Up
# to the end of the prompt the four are one sequence. Then each samples its own next token, and they
# diverge. In the engine the sequence *forks*: the fork starts with the same tokens and the same
# block table.
#
# We do it by hand first, with the example of the paper's Figure 8. As in chapter 3, tokens are
# words, and nothing is computed.

# %%
import drawing

from minipaged.memory import BlockManager
from minipaged.sequence import Sequence, SequenceGroup

words = "four score and seven years ago our".split()
memory = BlockManager(num_blocks=6, block_size=4)
first = Sequence(1, range(7))
memory.admit(SequenceGroup("A", [first]))
first.mark_computed(7)

second = first.fork(2)
memory.fork(first, second)
print("A1:", memory.tables[1], " A2:", memory.tables[2])
print(f"free: {memory.num_free}, owners: {memory.ref_count(0)} and {memory.ref_count(1)}")

# %% [markdown]
# Two sequences of 7 tokens hold two blocks, not four. The fork only copied the table, a short list
# of numbers, and each block in it has one more owner.
#
# Now both continue, A1 with "fathers" and A2 with "mothers". Both words belong in the last slot of
# block 1, which has room for one.

# %%
texts = {1: [*words], 2: [*words]}


def where_the_words_are() -> tuple[dict[int, list[str]], dict[int, str]]:
    contents: dict[int, list[str]] = {}
    owners: dict[int, str] = {}
    for seq_id, own_words in texts.items():
        table = memory.tables[seq_id]
        for logical, physical in enumerate(table.blocks):
            contents[physical] = own_words[4 * logical :][: table.filled(logical)]
            owner = f"A{seq_id}"
            owners[physical] = f"{owners[physical]}, {owner}" if physical in owners else owner
    return contents, owners


def append_word(seq: Sequence, word: str) -> None:
    texts[seq.seq_id].append(word)
    seq.append(0)
    print(f"A{seq.seq_id} appends {word!r}: blocks to copy {memory.append(seq)}")
    seq.mark_computed(1)


forked = where_the_words_are()
append_word(first, "fathers")
after_one = where_the_words_are()
append_word(second, "mothers")
append_word(first, "brought")
append_word(second, "gave")
after_both = where_the_words_are()

# %% After the fork; after A1 has written one word; after both have written two
figure, axes = drawing.picture(7.2, 3.6, ncols=3)
titles = ("forked: all blocks shared", "A1 writes to a copy", "A2 keeps the original")
for axis, (contents, owners), title in zip(
    axes, (forked, after_one, after_both), titles, strict=True
):
    drawing.blocks(axis, contents, owners, num_blocks=6, block_size=4)
    axis.set_title(title)

# %% [markdown]
# When A1 wrote, block 1 had a second owner. A1 therefore took block 2, requested a copy from block
# 1 to it, and freed block 1. When A2 wrote, it was the only owner of block 1, so there was nothing
# to copy. **If all $n$ owners write, $n - 1$ of them copy, and the last one keeps the original.**
# Block 0 is full. It is never written again, and stays shared until the end.
#
# Operating systems do the same with memory pages when a process forks, and call it *copy-on-write*,
# as the paper does. Here it is a part of `BlockManager.append`. It returns pairs of blocks, and the
# engine copies their keys and values before the step writes anything.
#
# ### A baseline without sharing
#
# To measure the saving we need a memory that shares nothing, as in older systems. We override
# `append`: before a sequence gets a slot for its next token, it gets a copy of every block that has
# another owner, whether it is about to write to it or not.

# %%
from minipaged.memory import BlockPair


class CopiesAtOnce(BlockManager):
    """Gives each fork its own blocks before its next token, in a pool that is large enough."""

    def append(self, seq: Sequence) -> list[BlockPair]:
        table = self.tables[seq.seq_id]
        pairs: list[BlockPair] = []
        for logical, block in enumerate(table.blocks):
            if self.ref_count(block) > 1:
                table.blocks[logical] = self._pool.allocate()
                self._pool.free(block)  # one owner less
                pairs.append((block, table.blocks[logical]))
        return pairs + super().append(seq)


# %% [markdown]
# ### Four samples of one prompt
#
# Both memories serve the same request: `n=4` samples, with a fixed *seed* for the random numbers.
# After each step we record how many blocks are held. (Prefix caching, the subject of the next
# chapter, is off.)

# %%
from minipaged import LLM, BeamSearchParams, Event, EventLog, Parts, RequestOutput, SamplingParams
from minipaged.evaluation.bench.sharing import SharingMeter
from minipaged.sampling import Params
from minipaged.tracing.replay import Replay

text = "Once upon a time Theo the frog put the white key in the meadow. Mia the"
four = SamplingParams(n=4, seed=7, max_tokens=24)


def build(parts: Parts) -> tuple[LLM, list[Event]]:
    events: list[Event] = []
    traced = parts.checked().traced(EventLog(events.append))
    llm = LLM("storyteller", num_blocks=64, block_size=4, parts=traced, enable_prefix_caching=False)
    return llm, events


def serve(llm: LLM, params: Params) -> tuple[RequestOutput, list[int]]:
    """The output of one request, and the blocks held after each of its steps but the last."""
    held: list[int] = []
    memory = llm.engine.scheduler.memory
    llm.engine.add_request("request", text, params)
    while llm.engine.has_unfinished_requests():
        progress = llm.engine.step()
        held.append(memory.num_blocks - memory.num_free)
    return progress[-1].output(), held[:-1]  # after the last step all is free


def copies(events: list[Event]) -> int:
    return sum(len(event.fields["pairs"]) for event in events if event.event == "copy_on_write")


shares, shared_events = build(Parts())
copying, copied_events = build(Parts(memory=CopiesAtOnce))
with SharingMeter(shares.engine) as meter:
    samples, held = serve(shares, four)
copied_samples, held_by_copies = serve(copying, four)

for sample in samples.outputs:
    print(f"...{sample.text[:72]!r}")
copied, copied_at_once = copies(shared_events), copies(copied_events)
print(f"\nblocks copied: {copied} with sharing, {copied_at_once} without")

# %% Blocks that four samples of one prompt hold, step by step
figure, axes = drawing.picture()
steps = range(1, len(held) + 1)
axes.step(steps, held_by_copies, where="mid", color=drawing.COLOURS[1], label="not shared")
axes.step(steps, held, where="mid", color=drawing.COLOURS[0], label="shared")
axes.fill_between(steps, held, held_by_copies, step="mid", color=drawing.GREY, alpha=0.2)
axes.set(xlabel="step", ylabel="blocks held", ylim=(0, None))
axes.legend(loc="upper left")

# %% [markdown]
# The gap opens at the second step, when the samples diverge, and stays the same: three times the
# four full blocks of the prompt. In general, let the prompt have $p$ tokens, and each of $n$
# samples $g$ generated tokens in the cache. Without sharing they hold $n \lceil (p + g) / B \rceil$
# blocks, and sharing saves
#
# $$(n - 1) \lfloor p / B \rfloor$$
#
# of them. Only full blocks of the prompt are shared, because samples that have diverged never share
# again. A `SharingMeter` counts blocks after each step. It must agree with the formula:

# %%
p, n, size = len(samples.prompt_token_ids), 4, 4
unshared = [-(-p // size)] + [n * -(-(p + g) // size) for g in range(1, 24)]
saved = [0] + [(n - 1) * (p // size)] * 23
by_formula = [all_blocks - less for all_blocks, less in zip(unshared, saved, strict=True)]
assert held == by_formula[:-1]
assert held_by_copies == unshared[:-1]
print(f"saved, by formula  {sum(saved) / sum(unshared):.2%}")
print(f"saved, as measured {meter.saved():.2%}")

# %% [markdown]
# ### Beam search
#
# *Beam search* looks for the likeliest answer as a whole, not for the likeliest next token. It
# keeps, say, four sequences, the *beams*. In each step every beam proposes its likeliest next
# tokens, and the best four of all proposals continue. A beam with two of them forks. A beam with
# none is pruned, and its blocks are freed:
#
# @@ minipaged.engine.beam_request.BeamRequest.advance
#
# We follow one search and record the running beams after each step, with their last tokens and
# their parents. The forks come from the trace, and the owners of each block from the memory.

# %%
from collections import Counter

told = f"{text} cat put the white key in the barn."
searching, beam_events = build(Parts())
searching.engine.add_request("search", told, BeamSearchParams(beam_width=4, max_tokens=20))
decode = searching.get_tokenizer().decode
beams_memory = searching.engine.scheduler.memory
tree: list[dict[int, str]] = []  # for each step: the running beams, and their last tokens
owners_of_blocks: list[Counter[int]] = []  # for each step: how many blocks have 1, 2, ... owners

beam_meter = SharingMeter(searching.engine)
searching.engine.listeners.append(beam_meter)
while searching.engine.has_unfinished_requests():
    finished = searching.engine.step()
    for group in searching.engine.scheduler.running:
        tree.append({seq.seq_id: decode(seq.token_ids[-1:]) for seq in group.sequences})
        blocks = {b for table in beams_memory.tables.values() for b in table.blocks}
        owners_of_blocks.append(Counter(beams_memory.ref_count(b) for b in blocks))
result = finished[-1].output()
parents = {e.fields["child"]: e.fields["parent"] for e in beam_events if e.event == "fork"}

for beam in result.outputs:
    print(f"{beam.score:7.3f} {beam.text!r}")
print(f"{len(parents)} forks in {len(tree) + 1} steps, {copies(beam_events)} blocks copied")

# %% A beam search of width 4: the descent of the beams, and the owners of the blocks
figure, (above, below) = drawing.picture(
    7.2, 5.2, nrows=2, sharex=True, gridspec_kw={"height_ratios": (3, 2)}
)

lineage = [set(tree[-1])]  # the last beams, and their ancestors step by step
for before in reversed(tree[:-1]):
    lineage.insert(0, {seq if seq in before else parents[seq] for seq in lineage[0]})

rows = {0: 1.5}  # the prompt; then each running beam has one of four rows
for step, living in enumerate(tree, start=1):
    stays = {seq: rows[seq] for seq in living if seq in rows and step > 1}
    free = [row for row in range(4) if row not in stays.values()]
    joins = [seq for seq in living if seq not in stays]
    now = stays | dict(zip(joins, free, strict=True))
    for seq, token in living.items():
        colour = drawing.COLOURS[0] if seq in lineage[step - 1] else drawing.GREY
        origin = rows[seq if seq in rows else parents[seq]]
        above.plot([step - 1, step], [-origin, -now[seq]], color=colour, lw=1.5, zorder=1)
        drawing.label(above, step, -now[seq], token.strip() or "(line)", colour)
    rows = now
drawing.label(above, 0, -1.5, "prompt", drawing.COLOURS[0])
above.set(ylim=(-3.4, 0.4), yticks=[], xlim=(-0.6, len(tree) + 0.6))
above.spines[["left", "bottom"]].set_visible(False)
above.tick_params(bottom=False)

bottom = [0] * len(tree)
for num_owners, colour in zip((4, 3, 2, 1), drawing.COLOURS, strict=False):
    heights = [counts[num_owners] for counts in owners_of_blocks]
    label = f"{num_owners} owner{'s' if num_owners > 1 else ''}"
    below.bar(range(1, len(tree) + 1), heights, bottom=bottom, label=label, color=colour)
    bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
below.set(xlabel="step", ylabel="blocks held", ylim=(0, 1.3 * max(bottom)))
below.set_xticks(range(0, len(tree) + 1, 5))
below.legend(ncols=4, loc="upper left", fontsize=8)

# %% [markdown]
# This is Figure 9 of the paper, drawn from a real run. The beams that run to the end are blue, and
# so are their ancestors. Step 1 yields the start of a question and three names. In steps 2 and 3
# forks of the question replace the names, and four questions continue. Three of them end in a full
# stop. They were not pruned: the model ended them there, and they are three of the four results.
# Then forks of the fourth question take all four places. From step 14 on, all beams share even the
# question.
#
# The lower picture shows the owners. The six full blocks of the prompt have four owners throughout,
# as with samples. But beams can share again: when forks of one beam replace the others, all tokens
# that it has generated become common. That is why beams save more than samples. Without sharing, an
# engine would copy whole sequences from beam to beam. Here a fork costs one block at most.
#
# Watch the same search, and how the reference counts change between steps 12 and 16.

# %%
Replay(beam_events, title="A beam search of width 4")

# %% [markdown]
# ### Compare with the paper
#
# Figure 15 of the paper (section 6.3) reports the fraction of blocks that sharing saves, in blocks
# of 16 slots, for requests as short as instructions to an assistant (the Alpaca trace: on average
# 19 tokens of prompt and 58 of output). `minipaged bench sharing --num-requests 128` measures it
# here in about a minute ([Benchmarks](../docs/benchmarks.md#sharing)):
#
# | blocks saved, % | 2 sequences | 4 | 6 |
# |---|---|---|---|
# | parallel sampling, OPT-13B (paper) | 6.1 | 8.5 | 9.8 |
# | parallel sampling, storyteller | 7.1 | 10.7 | 11.9 |
# | beam search, OPT-13B (paper) | 37.6 | 53.1 | 55.2 |
# | beam search, storyteller | 27.1 | 40.2 | 44.3 |
#
# The ranking is the same, the values are not. The paper publishes only the means of its lengths,
# and the saving of samples depends on how many prompts fill a block. The saving of beams depends on
# the model. If it is certain of what follows, beams stay apart for long, as the four questions did.
# If not, they replace each other in every step, and share more.
#
# ## Check
#
# Rule 3: sample $i$ uses seed $7 + i$, so it must have the tokens of a separate request with that
# seed. And `CopiesAtOnce` must generate the same samples and beams. Rule 2: at the end all blocks
# are free. (`checked()` in `build` recounts the owners after each call.)

# %%
for number, sample in enumerate(samples.outputs):
    alone, _ = serve(shares, SamplingParams(seed=7 + number, max_tokens=24))
    assert sample.token_ids == alone.outputs[0].token_ids
assert len({tuple(sample.token_ids) for sample in samples.outputs}) == 4

assert samples.outputs == copied_samples.outputs
[copied_beams] = copying.generate(
    told, BeamSearchParams(beam_width=4, max_tokens=20), use_tqdm=False
)
assert [beam.token_ids for beam in result.outputs] == [b.token_ids for b in copied_beams.outputs]
for llm in (shares, copying, searching):
    memory = llm.engine.scheduler.memory
    assert memory.num_free == memory.num_blocks
print("same samples, same beams, and every block is free")

# %% [markdown]
# Two mistakes are easily made in copy-on-write. The first is to copy, but not to free the original.
# The checker names the block:

# %%
from minipaged.errors import CheckFailed


class ForgetsToFree(BlockManager):
    def append(self, seq: Sequence) -> list[BlockPair]:
        pairs = super().append(seq)
        for original, _ in pairs:
            self._pool.share(original)
        return pairs


leaky, _ = build(Parts(memory=ForgetsToFree))
try:
    serve(leaky, four)
except CheckFailed as error:
    print(error)
else:
    raise AssertionError("the mistake was not noticed")

# %% [markdown]
# The second is to make no copy. That is worse: each block has the owners that the tables list, so
# no count can detect it. Four samples write their first three tokens to the same slots, and each
# reads what the last one wrote.

# %%


class ForgetsTheCopy(BlockManager):
    def append(self, seq: Sequence) -> list[BlockPair]:
        table = self.tables[seq.seq_id]
        while len(table.blocks) * self.block_size < seq.num_tokens:
            table.blocks.append(self._pool.allocate())
        table.num_tokens = seq.num_tokens
        return []


careless, _ = build(Parts(memory=ForgetsTheCopy))
mixed_up, _ = serve(careless, four)
for right, wrong in zip(samples.outputs, mixed_up.outputs, strict=True):
    if right.token_ids != wrong.token_ids:
        print(f"sample {right.index}: {right.text[:60]!r}")
        print(f"  it became {wrong.text[:60]!r}")
assert [s.token_ids for s in samples.outputs] != [s.token_ids for s in mixed_up.outputs]

# %% [markdown]
# Three of the four samples came out right, and the wrong one reads well. Only the comparison of
# tokens detects the mistake.
#
# ### Exercise: count the blocks of a step
#
# Before a step the scheduler must count the blocks that its sequences will take. Each sequence in
# `writing` gets one token. It takes a new block if its last block is full, and a copy if it must
# not write to its last block. But not every owner of a block has to copy it, and not every owner
# writes in this step. Change the body of `blocks_needed`, and run this cell and the next one again.


# %%
def blocks_needed(
    tables: dict[int, list[int]], num_tokens: dict[int, int], writing: list[int]
) -> int:
    """Blocks of 4 slots that a step takes; tables and tokens of all sequences, by id."""
    return sum(num_tokens[seq_id] % 4 == 0 for seq_id in writing)  # your turn


# %%
def check_exercise(own) -> bool:
    """Compare with the blocks that the library takes, in six steps."""
    steps = {  # by name: groups of (tokens, sequences with these tokens, how many of them write)
        "a sequence alone": [(5, 1, 1)],
        "full blocks, four write": [(8, 4, 4)],
        "four share, four write": [(7, 4, 4)],
        "four share, one writes": [(7, 4, 1)],
        "four share, three write": [(6, 4, 3)],
        "three groups": [(6, 2, 2), (9, 3, 2), (12, 2, 1)],
    }
    solved = True
    for name, groups in steps.items():
        memory, writers = BlockManager(num_blocks=32, block_size=4), []
        num_tokens: dict[int, int] = {}
        for start, (length, num_sequences, num_writers) in enumerate(groups):
            first = Sequence(10 * start, range(length))
            memory.admit(SequenceGroup(name, [first]))
            first.mark_computed(length)
            group = [first, *(first.fork(10 * start + i) for i in range(1, num_sequences))]
            for fork in group[1:]:
                memory.fork(first, fork)
            num_tokens |= {seq.seq_id: length for seq in group}
            writers += group[:num_writers]
        tables = {seq_id: list(table.blocks) for seq_id, table in memory.tables.items()}
        answer = own(tables, num_tokens, [seq.seq_id for seq in writers])
        num_free = memory.num_free
        for seq in writers:
            seq.append(0)
            memory.append(seq)
        expected = num_free - memory.num_free
        print(f"{name:24} yours: {answer}, expected: {expected}")
        solved = solved and answer == expected
    return solved


print("solved" if check_exercise(blocks_needed) else "not solved yet")

# %% [markdown]
# <details markdown="1"><summary>Hint</summary>
#
# Go through the writers in order, and keep count of the owners of each block. Who owns a block
# after one of its writers has taken a copy?
#
# </details>
#
# <details markdown="1"><summary>Solution</summary>
#
# A writer that takes a copy no longer owns the original. The last owner may write to it:
#
# ```python
# def blocks_needed(
#     tables: dict[int, list[int]], num_tokens: dict[int, int], writing: list[int]
# ) -> int:
#     """Blocks of 4 slots that a step takes; tables and tokens of all sequences, by id."""
#     num_owners = Counter(block for table in tables.values() for block in table)
#     needed = 0
#     for seq_id in writing:
#         last = tables[seq_id][-1]
#         if num_tokens[seq_id] % 4 == 0:
#             needed += 1
#         elif num_owners[last] > 1:
#             needed += 1
#             num_owners[last] -= 1
#     return needed
# ```
#
# </details>
#
# <details markdown="1"><summary>Your predictions</summary>
#
# Four blocks of the prompt are full, and shared by all samples. The fifth has one token, and three
# of the four writers copy it. At the end each sample has 40 tokens in the cache (the last token is
# never stored), in 10 blocks. Together they hold 28 blocks instead of 40. A beam search saves more,
# because beams also share generated tokens.
#
# </details>
#
# ## Questions
#
# **A prompt has 16 tokens, a block has 4 slots. How many blocks are copied for four samples?**
#
# <details markdown="1"><summary>Answer</summary>
#
# None. All blocks of the prompt are full. Each sample starts a new block of its own.
#
# </details>
#
# **Why does the fork not copy the last block at once? It will be written in the next step anyway.**
#
# <details markdown="1"><summary>Answer</summary>
#
# One owner can keep the original, and which one is known only when the others have written. And a
# full block is never copied: 3 of the 13 forks above led to no copy.
#
# </details>
#
# **Do smaller blocks save more?**
#
# <details markdown="1"><summary>Answer</summary>
#
# A little. All but at most $B - 1$ tokens of the prompt are in its $\lfloor p / B \rfloor$ full
# blocks. With $B = 1$ the whole prompt is shared, and nothing is ever copied. But small blocks have
# their own costs (chapter 3).
#
# </details>
#
# ## Results

# %%
beams_at_once = copies(copied_events) - copied_at_once
print("                           shared   copied at once")
print(f"samples: blocks held       {max(held):6}   {max(held_by_copies):6}")
print(f"samples: blocks copied     {copied:6}   {copied_at_once:6}")
print(f"beams: blocks copied       {copies(beam_events):6}   {beams_at_once:6}")
print(f"blocks saved by samples    {meter.saved():6.1%}")
print(f"blocks saved by beams      {beam_meter.saved():6.1%}")

# %% [markdown]
# To write `fork`, `free`, copy-on-write and parallel sampling yourself, take [lab 5](labs/05.md).
# Next: [blocks that later requests find again](08_prefix_caching.md).
