# %% [markdown]
# # 8. Prefix caching
#
# A block is kept when its sequence has ended, and reused by a later request with the same prefix.
#
# ## Goals
#
# - What identifies a block, and why its own tokens are not enough.
# - When a block can be found, how long it stays, and which one is evicted.
# - How much computation is saved when many prompts share a prefix (section 4.4 of the paper,
#   Figures 10 and 16).
#
# ## Invariants
#
# 1. A block is found only by a prompt that is the same from the first token up to the end of that
#    block.
# 2. It is found only after its keys and values are written, and it is not written while it can be
#    found.
# 3. With the cache and without it the tokens are the same. A block that no sequence uses counts as
#    free.
#
# ## Predict
#
# Blocks have 16 slots.
#
# - Six prompts begin with the same story of 92 tokens; then come different questions of about 10.
#   How many tokens of the second prompt must be computed?
# - Two prompts of 100 tokens differ in the first token and are equal after it. How many blocks can
#   they share?
# - The same prompt of exactly 32 tokens comes twice. How many tokens are computed the second time?
#
# ## Build it: a block is identified by what comes before it
#
# Samples of one request share the prompt's blocks, because they come from a fork. But requests of
# different people often share a prefix as well. An assistant has a *system prompt*, the same
# instructions before every question. A *few-shot* prompt has the same examples before every task.
# Each turn of a chat begins with all turns before it. There is no fork. The blocks must be *found*.
#
# By what? The keys and values of a token depend on all tokens before it (chapter 1), so the tokens
# in a block do not suffice. "in the meadow" after one story is not "in the meadow" after another.
# But the tokens of this block and *the block before it* are enough: that block is identified by its
# own tokens and the block before it, and so on to the first. Here is such an index, on words in
# blocks of four. It is a `dict`, and a lookup goes block by block until one is missing.

# %%
Key = tuple[int | None, tuple[str, ...]]  # the block before it (None for the first), its words


def full_blocks(text: str) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + 4]) for i in range(0, len(words) - 3, 4)]


class Index:
    def __init__(self) -> None:
        self.blocks: dict[Key, int] = {}

    def find(self, text: str) -> list[int]:
        found: list[int] = []
        for words in full_blocks(text):
            before = found[-1] if found else None
            if (before, words) not in self.blocks:
                break
            found.append(self.blocks[before, words])
        return found

    def remember(self, text: str) -> None:
        found = self.find(text)
        for words in full_blocks(text)[len(found) :]:
            before = found[-1] if found else None
            found.append(len(self.blocks))  # the next free block
            self.blocks[before, words] = found[-1]


index = Index()
index.remember("once upon a time there was a frog who had a key")
index.remember("once upon a time there was a cow who had a key")
for key, block in index.blocks.items():
    print(f"block {block}: {key}")
print(index.find("once upon a time there was a cow who lost it"))
print(index.find("there was a frog who had a key"))

# %% [markdown]
# "who had a key" is in both stories, but after different blocks, so there are two entries for it.
# The prompt that begins with "there was a frog" finds nothing at all, since no story begins that
# way. Two prompts share their common prefix, never more. So the entries form a *tree*.
#
# vLLM makes one number, a hash, of all tokens up to the end of a block, and looks for that. It
# assumes that no two prefixes hash to the same value: if two did, one user would be served with the
# other's keys and values. SGLang compares tokens with tokens, in a radix tree. Here tokens are
# compared as well, block by block, and a block's number represents everything before it. That is
# exact:
#
# @@ minipaged.memory.prefix_cache.PrefixCache.find
#
# ### When a block can be found
#
# A block is *cached* after the step that has written it, not when it is allocated. And only if it
# is full: the last block of a sequence is still growing. By hand:

# %%
from minipaged.memory import BlockManager
from minipaged.sequence import Sequence, SequenceGroup

memory = BlockManager(num_blocks=8, block_size=4, enable_prefix_caching=True)
prompt_of_10 = range(10)


def arrive(seq_id: int, tokens: range) -> Sequence:
    seq = Sequence(seq_id, tokens)
    [num_cached], _ = memory.admit(SequenceGroup(str(seq_id), [seq]))
    seq.mark_cached(num_cached)  # these need not be computed
    return seq


def num_cached_tokens(tokens: range) -> int:
    return memory.num_cached_tokens(Sequence(-1, tokens))


first = arrive(0, prompt_of_10)
print("blocks allocated:       cached tokens", num_cached_tokens(prompt_of_10))
first.mark_computed(10)
memory.cache_blocks(first)
print("step done:              cached tokens", num_cached_tokens(prompt_of_10))
print("a prompt of exactly 8:  cached tokens", num_cached_tokens(range(8)))
memory.free(first)
print("the sequence has ended: cached tokens", num_cached_tokens(prompt_of_10), end="; ")
print("blocks free", memory.num_free)

# %% [markdown]
# Two things to note. Of the prompt of 8 tokens only 7 count as cached, although both blocks are:
# the last token must be computed in any case, because the logits *after* it are not stored. Its
# keys and values are written again as well, so if another sequence owns that block too, it is
# copied first (copy-on-write, chapter 7). And when the sequence has ended, all 8 blocks of the pool
# are free, and yet two of them can be found. The cache is one more owner of each cached block. A
# block that only the cache owns is *idle*: it is kept until another sequence needs the memory.
#
# ### Six questions about one story, and a chat
#
# Now with the model. Six questions are asked about one story, one after another. Then one
# conversation about it: the prompt of each turn is everything said so far, answers included.
# `num_cached_tokens` of an output is the number of prompt tokens that were cached.

# %%
from minipaged import LLM, Event, EventLog, Parts, RequestOutput, SamplingParams
from minipaged.evaluation.stories import prompt, tell
from minipaged.tokenizer.prompts import Prompt
from minipaged.tracing.replay import Replay

greedy = SamplingParams(temperature=0, max_tokens=24)
story = tell(num_facts=8, seed=3)
asked = story.questions[::7]


def ask(llm: LLM, text: Prompt) -> RequestOutput:
    return llm.generate(text, greedy, use_tqdm=False)[0]


def chat(llm: LLM) -> list[RequestOutput]:
    """Five turns; each prompt is the one before, its answer, and a new question."""
    encode = llm.get_tokenizer().encode
    said = encode(story.text)
    turns: list[RequestOutput] = []
    for question in story.questions[1::8]:
        said = said + encode(f"\nQ: {question.text}\nA:")
        turns.append(ask(llm, {"prompt_token_ids": said}))
        said = said + turns[-1].outputs[0].token_ids
    return turns


cached = LLM("storyteller", num_blocks=64)
six = [ask(cached, prompt(story, question)) for question in asked]
turns = chat(LLM("storyteller", num_blocks=64))
for question, output in zip(asked, six, strict=True):
    print(f"{question.text:42}{output.outputs[0].text}")

# %% Tokens of each prompt that were cached, and tokens that had to be computed
import drawing

figure, axes = drawing.picture(ncols=2, sharey=True)
titles = ("six questions about one story", "five turns of a chat")
for axis, outputs, title in zip(axes, (six, turns), titles, strict=True):
    places = range(1, len(outputs) + 1)
    reused = [output.num_cached_tokens for output in outputs]
    computed = [len(output.prompt_token_ids) - n for output, n in zip(outputs, reused, strict=True)]
    axis.bar(places, reused, color=drawing.GREY, alpha=0.5, label="cached")
    bars = axis.bar(places, computed, bottom=reused, color=drawing.COLOURS[0], label="computed")
    axis.bar_label(bars, computed, fontsize=8, color=drawing.GREY, padding=2)
    axis.set(title=title, xlabel="request", ylim=(0, 210))
axes[0].set(ylabel="tokens of the prompt")
axes[0].legend(loc="upper left", ncols=2)

# %% [markdown]
# The first request of each kind computes everything. The others find the full blocks of the story,
# 80 of its 92 tokens, and compute the rest. In the chat the cached part grows with the
# conversation: the model's own answers are cached as well, and each turn finds them.
#
# They need not come one after another. If all six arrive at once, the scheduler starts the first
# one a step earlier, and the five others find the blocks that it has written.
#
# ### The tree of blocks
#
# `memory.cached` maps each cached block to its key. Here is the whole cache after four short
# prompts, with blocks of 8:

# %% The cached blocks after four prompts: each box is a block, and its parent is on its left
from textwrap import fill

from minipaged.evaluation.stories import retell

small = LLM("storyteller", num_blocks=64, block_size=8)
facts = tell(num_facts=3, seed=5).facts
for other in facts[1:]:  # two stories with a common prefix, and two questions about each
    told = retell([facts[0], other])
    for question in told.questions[5:7]:
        ask(small, prompt(told, question))
cached_blocks = small.engine.scheduler.memory.cached
decode = small.get_tokenizer().decode

figure, axes = drawing.picture(7.2, 3.4)
num_leaves = 0


def draw(block: int, depth: int) -> float:
    """Draw a block and its descendants; returns its height."""
    global num_leaves
    children = [child for child, (before, _) in cached_blocks.items() if before == block]
    if children:
        heights = [draw(child, depth + 1) for child in children]
        height = sum(heights) / len(heights)
        for child_height in heights:
            axes.plot([depth, depth + 1], [height, child_height], color=drawing.GREY, zorder=0)
    else:
        height, num_leaves = -num_leaves, num_leaves + 1
    colour = drawing.COLOURS[0] if len(children) > 1 else drawing.GREY
    text = fill(decode(cached_blocks[block][1]).strip().replace("\n", " "), 14)
    drawing.label(axes, depth, height, f"{block}\n{text}", colour, fontsize=5.5)
    return height


for root in [block for block, (before, _) in cached_blocks.items() if before is None]:
    draw(root, 0)
axes.set(ylim=(0.6 - num_leaves, 0.6))
axes.margins(x=0.08)
axes.axis("off")

# %% [markdown]
# The number in a box is the block, the text is what it holds. Prompts diverge after a blue block. A
# lookup walks from left to right as far as the words agree. Blocks 4 and 9 hold the beginning of an
# answer: generated tokens are cached just as prompt tokens are.
#
# ### Eviction
#
# When a block is needed and no empty one is left, an idle one is *evicted*: it is removed from the
# index and allocated. It must be a *leaf*, a block without children. If a block's number were
# reused for other content, all its descendants would be found with a wrong prefix. The library
# evicts the least recently used leaf (LRU). Sequences free their last block first, so in the order
# of idleness children always come before their parents, and the policy is one line:
#
# @@ minipaged.memory.prefix_cache.PrefixCache.evict_candidate
#
# Override this method to write your own policy. Let us evict the block that was used *least often*,
# and of several the least recently used. An allocation starts the count, and each hit shares the
# block:

# %%
from collections import Counter
from typing import Any

from minipaged.memory import PrefixCache


class LeastOftenUsed(PrefixCache):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.uses = Counter[int]()

    def allocate(self) -> int:
        block = super().allocate()
        self.uses[block] = 1  # its content is new, whatever it was before
        return block

    def share(self, block: int) -> None:
        super().share(block)
        self.uses[block] += 1

    def evict_candidate(self) -> int:
        leaves = (block for block in self.idle if self.is_leaf(block))
        return min(leaves, key=self.uses.__getitem__)


# %% [markdown]
# Which is better? That depends on the workload. We need no model to see it, only tokens: a prompt
# is admitted, "computed", and freed, and we count the cached tokens. Two workloads, on 64 blocks of
# 4 slots:
#
# - *Assistants and documents*: four system prompts of 8 blocks, asked again and again. After every
#   second question comes a document of 20 blocks, which is never used again.
# - *Topics come and go*: three topics of 8 blocks are asked about in turn, 12 times each, and then
#   never again; three others follow.

# %% Cache hit rate by policy; the best is a pool from which nothing is evicted
from collections.abc import Iterator
from random import Random

rng = Random(0)


def tokens(num: int) -> list[int]:
    return [rng.randrange(10**9) for _ in range(num)]


def assistants_and_documents() -> Iterator[list[int]]:
    system_prompts = [tokens(32) for _ in range(4)]
    for number in range(300):
        yield rng.choice(system_prompts) + tokens(9)
        if number % 2:
            yield tokens(80)


def topics_come_and_go() -> Iterator[list[int]]:
    for _ in range(15):
        topics = [tokens(32) for _ in range(3)]
        for _ in range(12):
            yield from (topic + tokens(9) for topic in topics)


def hit_rate(cache: type[PrefixCache], prompts: list[list[int]], num_blocks: int = 64) -> float:
    memory = BlockManager(num_blocks, block_size=4, enable_prefix_caching=True, prefix_cache=cache)
    num_cached = 0
    for number, prompt_tokens in enumerate(prompts):
        seq = Sequence(number, prompt_tokens)
        [from_cache], _ = memory.admit(SequenceGroup(str(number), [seq]))
        seq.mark_cached(from_cache)
        num_cached += from_cache
        seq.mark_computed(seq.num_uncomputed_tokens)
        memory.cache_blocks(seq)
        memory.free(seq)
    return 100 * num_cached / sum(map(len, prompts))


workloads = {
    "assistants and documents": list(assistants_and_documents()),
    "topics come and go": list(topics_come_and_go()),
}
policies = {"least recently used": PrefixCache, "least often used": LeastOftenUsed}
rates = {
    name: [hit_rate(cache, prompts) for prompts in workloads.values()]
    for name, cache in policies.items()
}
rates["nothing is evicted"] = [hit_rate(PrefixCache, w, 10_000) for w in workloads.values()]

figure, axes = drawing.picture(7.2, 2.6)
colours = (drawing.COLOURS[0], drawing.COLOURS[1], drawing.GREY)
for number, (name, percent) in enumerate(rates.items()):
    bars = axes.barh(
        [-(place + 0.26 * number) for place in range(2)], percent, 0.24,
        color=colours[number], label=name,
    )  # fmt: skip
    axes.bar_label(bars, fmt="%.0f", fontsize=8, color=drawing.GREY, padding=2)
axes.set_yticks([-0.26, -1.26], list(workloads))
axes.set(xlabel="tokens of all prompts that were cached, %", xlim=(0, 80))
axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.25), ncols=3, fontsize=8)

# %% [markdown]
# The documents flush everything out of a cache that looks only at the last use. Yours keeps the
# system prompts, which have been used often, and comes close to the best possible hit rate. But it
# cannot forget. When the topics change, the old ones have high counts and are no longer used, while
# the new ones are evicted before they can gain any. There LRU reaches the best possible hit rate,
# and yours a seventh of it. Neither is *the* policy. (LRU is also quicker: `evict_candidate` above
# looks at every idle block.)
#
# ### Your policy serves a model
#
# A pool of 12 blocks, a story that is asked about again and again, and between the questions two
# longer ones that are asked about only once.

# %%
favourite = tell(num_facts=4, seed=1)
one_offs = [tell(num_facts=7, seed=seed) for seed in range(20, 26)]
mixed = [prompt(favourite, favourite.questions[0])]
for number in range(3):
    mixed.append(prompt(favourite, favourite.questions[number + 1]))
    for told in one_offs[2 * number :][:2]:
        mixed.append(prompt(told, told.questions[number]))
mixed.append(prompt(favourite, favourite.questions[5]))


def serve(parts: Parts, **options: bool) -> list[RequestOutput]:
    llm = LLM("storyteller", num_blocks=12, parts=parts.checked(), **options)
    outputs = [ask(llm, text) for text in mixed]
    memory = llm.engine.scheduler.memory
    assert memory.num_free == memory.num_blocks
    return outputs


events: list[Event] = []
log = EventLog(events.append)
by_recency = serve(Parts())
by_count = serve(Parts(prefix_cache=LeastOftenUsed).traced(log))
print("cached, by recency:", [output.num_cached_tokens for output in by_recency])
print("cached, by count:  ", [output.num_cached_tokens for output in by_count])
print("blocks evicted:    ", sum(event.event == "evict" for event in events))

# %% [markdown]
# Watch the same run. Idle blocks stay in the pool until another sequence needs the memory.

# %%
Replay(events, title="A small pool: blocks are cached and evicted")

# %% [markdown]
# ### Salts and pinned prefixes
#
# There are two more controls. The first is *which requests may share*. A user who sees how quickly
# an answer begins can tell whether its prompt was cached, and so guess what others have asked. A
# prompt with a `cache_salt` shares only with prompts of the same salt: the salt is the root of the
# tree, in place of "no block before".
#
# Second, pinning a prefix. The paper's shared prefix is of that kind: the provider of a service
# declares it beforehand (Figure 10). `cache_prefix` computes it and *pins* its blocks: it remains
# one more owner, until `release_prefix`.

# %%
salted = {"prompt": prompt(story, asked[0]), "cache_salt": "ann"}
print("with a salt of its own:", ask(cached, salted).num_cached_tokens, "cached tokens")
print("again with that salt:  ", ask(cached, salted).num_cached_tokens, "cached tokens")

tight = LLM("storyteller", num_blocks=14)
tight_memory = tight.engine.scheduler.memory
pinned = tight.cache_prefix(favourite.text)
print(f"\npinned: {pinned.num_blocks} blocks, so {tight_memory.num_free} of 14 are free")
for told in one_offs[:3]:
    ask(tight, prompt(told, told.questions[0]))
print("after three long stories:", ask(tight, mixed[0]).num_cached_tokens, "cached tokens")
tight.release_prefix(pinned)
for told in one_offs[:3]:
    ask(tight, prompt(told, told.questions[0]))
print("released, three more:    ", ask(tight, mixed[0]).num_cached_tokens, "cached tokens")

# %% [markdown]
# The paper measures what a shared prefix brings on a translation task (section 6.4, Figure 16):
# with one example before each sentence, a prefix of 80 tokens, the engine sustains 1.67 times the
# request rate of Orca (Oracle), with five examples, 341 tokens, 3.58 times. Those are its numbers,
# from a GPU. `minipaged paper fig16` simulates the experiment.
#
# ## Check
#
# Rule 3: without the cache, with it, and with your policy the tokens are the same. (In `serve`
# above all blocks were free at the end, and `checked()` has recounted after every call.)

# %%
uncached = serve(Parts(), enable_prefix_caching=False)
for plain, recent, often in zip(uncached, by_recency, by_count, strict=True):
    assert plain.num_cached_tokens == 0
    assert plain.outputs[0].token_ids == recent.outputs[0].token_ids == often.outputs[0].token_ids
no_cache = LLM("storyteller", num_blocks=64, enable_prefix_caching=False)
for plain, turn in zip(chat(no_cache), turns, strict=True):
    assert plain.outputs[0].token_ids == turn.outputs[0].token_ids
print("the same tokens, cached or computed")

# %% [markdown]
# Three mistakes. The first looks like a clever saving: to identify a block by its tokens alone.
# Then Ben, whose story is like Ann's, gets blocks that were computed after hers:

# %%
from minipaged.memory import CacheKey


class ForgetsWhatCameBefore(PrefixCache):
    def _key(self, seq: Sequence, blocks: list[int], logical: int) -> CacheKey:
        _, own_tokens = super()._key(seq, blocks, logical)
        return seq.cache_salt, own_tokens


tale = (
    "Once upon a time Theo the frog put the white key {}. Mia the cat put the red map {}. "
    "Otto the wolf put the tan egg {}.\nQ: Where is the map of Mia?\nA:"
)
of_ann = tale.format("in the meadow", "behind the church", "near the lake")
of_ben = tale.format("under the oak", "on the roof", "near the road")
right = LLM("storyteller", num_blocks=64, block_size=4)
wrong = LLM(num_blocks=64, block_size=4, parts=Parts(prefix_cache=ForgetsWhatCameBefore).checked())
for name, text in (("Ann", of_ann), ("Ben", of_ben), ("Ben", of_ben)):
    good, bad = ask(right, text), ask(wrong, text)
    print(f"{name}'s map: {good.outputs[0].text:20} with the mistake: {bad.outputs[0].text}")
assert good.outputs[0].token_ids != bad.outputs[0].token_ids

# %% [markdown]
# No count is wrong there, so `checked()` raises nothing; only the answer shows it. At his second
# question Ben is told where *Ann's* map is.
#
# The second mistake is to evict a block and leave it in the index. In a pool of two blocks, 8
# tokens come and go, then 8 others. When the first come again, they "find" what the others have
# written.

# %%


class StaysInTheIndex(PrefixCache):
    def _evict(self) -> None:
        before = dict(self._blocks)
        super()._evict()
        self._blocks = before


def what_is_found(cache: type[PrefixCache]) -> list[int]:
    """What the blocks hold that a prompt of the tokens 0 to 7 finds in the end."""
    memory = BlockManager(2, block_size=4, enable_prefix_caching=True, prefix_cache=cache)
    for number, start in enumerate((0, 100)):
        seq = Sequence(number, range(start, start + 8))
        memory.admit(SequenceGroup(str(number), [seq]))
        seq.mark_computed(8)
        memory.cache_blocks(seq)
        memory.free(seq)
    again = Sequence(9, range(8))
    memory.pin(again)
    return [token for block in memory.tables[9].blocks for token in memory.cached[block][1]]


print("the library's cache finds", what_is_found(PrefixCache))
print("with the mistake it finds", what_is_found(StaysInTheIndex))
assert what_is_found(PrefixCache) == []
assert sorted(what_is_found(StaysInTheIndex)) == list(range(100, 108))

# %% [markdown]
# The third is a policy that evicts parents before their children. The cache does not accept it:

# %%


class ParentsFirst(PrefixCache):
    def evict_candidate(self) -> int:
        return next(block for block in self.idle if not self.is_leaf(block))


try:
    serve(Parts(prefix_cache=ParentsFirst))
except AssertionError as error:
    print(error)
else:
    raise RuntimeError("the mistake was not noticed")

# %% [markdown]
# <details markdown="1"><summary>Your predictions</summary>
#
# 22 tokens of the second prompt are computed: it has 102, and five full blocks of the story are
# cached. (The last 12 tokens of the story share a block with the question.) Two prompts that differ
# in the first token share nothing. Of the 32 tokens that come a second time one is computed.
#
# </details>
#
# ## Questions
#
# **Put the date into the first line of a system prompt. What does it do to the cache?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Once a day every cached block becomes unreachable, because every block comes after the first. Text
# that changes belongs at the end of a prompt, after everything constant.
#
# </details>
#
# **Do larger blocks raise or lower the hit rate?**
#
# <details markdown="1"><summary>Answer</summary>
#
# They lower it, for only full blocks are cached: of the prefix that two prompts have in common, up
# to $B - 1$ tokens are computed again. With blocks of 16, that was 12 of the 92 tokens above. In
# return there are fewer lookups.
#
# </details>
#
# **Two equal prompts arrive in the same step. Are they computed twice?**
#
# <details markdown="1"><summary>Answer</summary>
#
# No. The scheduler sees that the second would look for a block that is just being computed, and
# admits it a step later. And if two sequences do write the same block at the same time,
# `cache_blocks` keeps one of the two.
#
# </details>
#
# **The cache keeps everything it has room for. Can a request be refused, or wait, because of
# that?**
#
# <details markdown="1"><summary>Answer</summary>
#
# No. Idle blocks count as free, and are evicted one by one as they are needed. Pinned blocks are
# different: they have an owner, so no other sequence can use their memory.
#
# </details>
#
# ## Results

# %%
for name, outputs in (("six questions", six), ("five turns of a chat", turns)):
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    num_computed = num_tokens - sum(output.num_cached_tokens for output in outputs)
    part = f"({num_computed / num_tokens:.0%})"
    print(f"{name:20} {num_tokens} tokens in prompts, {num_computed} of them computed {part}")
for name, percent in rates.items():
    print(f"{name:20} {percent[0]:.0f} % and {percent[1]:.0f} % cached")

# %% [markdown]
# Next: [what happens when all blocks are in use](09_when_memory_runs_out.md).
