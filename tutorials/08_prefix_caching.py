# %% [markdown]
# # 8. Prefix caching
#
# A block stays in the pool when its sequence has finished, and later requests with the same prefix
# reuse it.
#
# **Needs** [chapter 7](07_sharing.md) · **Time** 35 minutes ·
# **Lab** [6, the prefix cache](labs/06.md)
#
# ![B begins with the same story as A, so two of its blocks are found.](openings/08.svg)
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
# 1. A block is found only by a prompt that is the same from its first token to the end of that
#    block.
# 2. A block is found only after its keys and values are written, and never written while it can be
#    found.
# 3. The tokens are the same with and without the cache. A block that no sequence uses counts as
#    free.
#
# ## Predict
#
# Blocks have 16 slots.
#
# - Six prompts begin with the same story of 92 tokens, each followed by a different question of
#   about 10. How many tokens of the second prompt must be computed?
# - Two prompts of 100 tokens differ in the first token only. How many blocks can they share?
# - A prompt of exactly 32 tokens arrives twice. How many tokens are computed the second time?
#
# ## Build it: a block and its prefix
#
# Samples share the prompt's blocks, because they are forks. But separate requests often share a
# prefix as well. An assistant has a *system prompt*, the same instructions before every question. A
# *few-shot* prompt has the same examples before every task. Each turn of a chat starts with all
# turns before it. There is no fork, so the blocks must be *found*.
#
# What identifies a block? The keys and values of a token depend on all tokens before it (chapter
# 1), so the block's own tokens are not enough. Its tokens and *the block before it* are enough,
# since that block is identified in the same way, and so on back to the first. Here is such an
# index, a `dict`, with words in blocks of four. A lookup goes block by block until one is missing.

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
# "who had a key" is in both stories, but after different blocks, so it has two entries. The prompt
# that begins with "there was a frog" finds nothing, since no story begins that way. The entries
# form a *tree*.
#
# vLLM looks up a hash of all tokens up to the end of a block. It assumes that no two prefixes hash
# to the same value. If two did, one user would get the other's keys and values. This library
# compares tokens, as SGLang does, and the number of the block before represents the whole prefix.
# That is exact.
#
# ### When a block can be found
#
# A block is *cached* after the step that has written it, not when it is allocated, and only if it
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
# Of the prompt of 8 tokens only 7 count as cached. The last token must always be computed, because
# its logits are not stored. Its keys and values are written again, so if another sequence owns that
# block, it is copied first (copy-on-write, chapter 7).
#
# When the sequence has finished, all 8 blocks of the pool are free, yet two of them can be found.
# The cache is one more owner of each cached block. A block that only the cache owns is *idle*: it
# stays until another sequence needs the memory.
#
# ### Six questions about one story, and a chat
#
# Now the model answers six questions about one story, one after another. Then it has a conversation
# about it: the prompt of each turn is everything said so far. An output's `num_cached_tokens` is
# the number of its prompt tokens that were cached.

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
# The first request computes everything. The others find the full blocks of the story, 80 of its 92
# tokens. In the chat the cached part grows, because the model's own answers are cached as well.
#
# ### The tree of blocks
#
# `memory.cached` maps each cached block to its key. Here is the whole cache after four short
# prompts, with blocks of 8:

# %%
from minipaged.evaluation.stories import retell

small = LLM("storyteller", num_blocks=64, block_size=8)
facts = tell(num_facts=3, seed=5).facts
for other in facts[1:]:  # two stories with a common prefix, and two questions about each
    told = retell([facts[0], other])
    for question in told.questions[5:7]:
        ask(small, prompt(told, question))
cached_blocks = small.engine.scheduler.memory.cached
decode = small.get_tokenizer().decode


def show_children(parent: int | None, depth: int) -> None:
    for block, (before, tokens) in cached_blocks.items():
        if before == parent:
            print(f"{'    ' * depth}{block}: {decode(tokens)!r}")
            show_children(block, depth + 1)


show_children(None, 0)

# %% [markdown]
# A lookup goes down the tree as far as the text agrees. Blocks 4 and 9 have the beginning of an
# answer: generated tokens are cached like prompt tokens.
#
# ### Eviction
#
# When a block is needed and no empty one is left, an idle one is *evicted*: it is removed from the
# index and allocated. It must be a *leaf*, a block without children. If the number of a parent were
# reused for other content, its descendants would be found with a wrong prefix. The library evicts
# the least recently used block (LRU).
#
# LRU has a weakness: a few long documents that come once evict everything else. [Write an eviction
# policy](../guides/write_an_eviction_policy.md) compares it with a policy that counts uses. Here
# the pool has 12 blocks. Between questions about one story come two longer stories that are asked
# about once.

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
in_small_pool = serve(Parts().traced(EventLog(events.append)))
print("cached tokens of each prompt:", [output.num_cached_tokens for output in in_small_pool])

# %% [markdown]
# The second prompt finds 48 tokens of the story. Each later question about it comes after two
# longer stories, and finds little or nothing. Watch the run:

# %%
Replay(events, title="A small pool: blocks are cached and evicted")

# %% [markdown]
# ### Salts and pinned prefixes
#
# A user who measures the time to the first token can tell whether a prompt was cached, and so guess
# what others have asked. A prompt with a `cache_salt` therefore shares only with prompts of the
# same salt: the salt takes the place of the block before the first one.
#
# The paper's shared prefix is declared in advance by the service provider (Figure 10).
# `cache_prefix` computes such a prefix and *pins* its blocks: they have one more owner until
# `release_prefix`.

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

# %% [markdown]
# The paper measures the gain of a shared prefix on a translation task (section 6.4, Figure 16).
# With one example before each sentence, a prefix of 80 tokens, the engine sustains 1.67 times the
# request rate of Orca (Oracle). With five examples, 341 tokens, it is 3.58 times.
# `minipaged paper fig16` simulates the experiment.
#
# ## Check
#
# Rule 3: the tokens are the same with and without the cache. (`checked()` in `serve` recounts the
# owners after each call.)

# %%
uncached = serve(Parts(), enable_prefix_caching=False)
for plain, found in zip(uncached, in_small_pool, strict=True):
    assert plain.num_cached_tokens == 0
    assert plain.outputs[0].token_ids == found.outputs[0].token_ids
no_cache = LLM("storyteller", num_blocks=64, enable_prefix_caching=False)
for plain, turn in zip(chat(no_cache), turns, strict=True):
    assert plain.outputs[0].token_ids == turn.outputs[0].token_ids
print("the same tokens, cached or computed")

# %% [markdown]
# Three mistakes. The first looks like a clever saving: it identifies a block by its own tokens
# alone. Ben's story is like Ann's, so Ben gets blocks that were computed after hers:

# %%
from minipaged.memory import CacheKey, PrefixCache


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
# No count is wrong, so `checked()` raises nothing. Only the answer shows the mistake: at his second
# question Ben is told where *Ann's* map is.
#
# The second mistake evicts a block and leaves it in the index. In a pool of two blocks, 8 tokens
# come and go, then 8 others. When the first 8 come again, they "find" what the others have written.

# %%


class StaysInTheIndex(PrefixCache):
    def _evict(self) -> None:
        before = dict(self._blocks)
        super()._evict()
        self._blocks = before


def what_is_found(cache: type[PrefixCache]) -> list[int]:
    """The tokens in the blocks that a prompt of the tokens 0 to 7 finds."""
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
# The third evicts parents before their children. The cache raises an error:

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
# ### Exercise: what is left to compute
#
# How many tokens of a prompt must be computed, after some earlier prompts? The pool is large, so
# nothing is evicted. The function below finds the longest common prefix with an earlier prompt. Two
# rules of this chapter are still missing in its last line. Change it, and run this cell and the
# next one again.


# %%
def tokens_to_compute(tokens: list[int], earlier: list[list[int]], block_size: int) -> int:
    """Tokens of a prompt that are not cached when the earlier prompts have finished."""
    longest = 0  # the longest common prefix
    for other in earlier:
        differ = [a != b for a, b in zip(tokens, other, strict=False)]
        longest = max(longest, differ.index(True) if True in differ else len(differ))
    return len(tokens) - longest  # your turn


# %%
def check_exercise(own) -> bool:
    """Compare with the library's cache, for six prompts."""
    ten, twelve = list(range(10)), list(range(12))
    prompts: dict[str, tuple[list[int], list[list[int]]]] = {
        "the same text later": ([90, 91, 92, 93, 4, 5, 6, 7, 8], [twelve]),
        "a longer prompt": (list(range(15)), [ten]),
        "differs inside a block": ([0, 1, 2, 3, 4, 5, 90, 91, 92], [twelve]),
        "three earlier prompts": (list(range(13)), [[0, 1, 90], [*ten, 90], [0, 1, 2, 3, 90]]),
        "the same prompt": (ten, [ten]),
        "the same, all blocks full": (twelve, [twelve]),
    }
    solved = True
    for name, (tokens, earlier) in prompts.items():
        memory = BlockManager(num_blocks=64, block_size=4, enable_prefix_caching=True)
        for number, other in enumerate(earlier):
            seq = Sequence(number, other)
            [num_cached], _ = memory.admit(SequenceGroup(name, [seq]))
            seq.mark_cached(num_cached)
            seq.mark_computed(seq.num_uncomputed_tokens)
            memory.cache_blocks(seq)
            memory.free(seq)
        expected = len(tokens) - memory.num_cached_tokens(Sequence(-1, tokens))
        answer = own(tokens, earlier, 4)
        print(f"{name:26} yours: {answer}, expected: {expected}")
        solved = solved and answer == expected
    return solved


print("solved" if check_exercise(tokens_to_compute) else "not solved yet")

# %% [markdown]
# <details markdown="1"><summary>Hint</summary>
#
# Which part of the common prefix is in full blocks? And what if that is the whole prompt?
#
# </details>
#
# <details markdown="1"><summary>Solution</summary>
#
# Only full blocks are found, and the last token is computed in any case:
#
# ```python
# def tokens_to_compute(tokens: list[int], earlier: list[list[int]], block_size: int) -> int:
#     """Tokens of a prompt that are not cached when the earlier prompts have finished."""
#     longest = 0  # the longest common prefix
#     for other in earlier:
#         differ = [a != b for a, b in zip(tokens, other, strict=False)]
#         longest = max(longest, differ.index(True) if True in differ else len(differ))
#     num_cached = longest // block_size * block_size
#     return len(tokens) - min(num_cached, len(tokens) - 1)
# ```
#
# </details>
#
# <details markdown="1"><summary>Your predictions</summary>
#
# 22 tokens of the second prompt are computed: it has 102, and five full blocks of the story are
# cached. (The last 12 tokens of the story share a block with the question.) Two prompts that differ
# in the first token share nothing. Of the 32 tokens that arrive a second time, one is computed.
#
# </details>
#
# ## Questions
#
# **The first line of a system prompt is the date. What does that do to the cache?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Once a day every cached block becomes unreachable, because every block comes after the first. Text
# that changes belongs at the end of a prompt.
#
# </details>
#
# **Are more or fewer tokens cached with larger blocks?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Fewer, because only full blocks are cached. Of a common prefix, up to $B - 1$ tokens are computed
# again: with blocks of 16, 12 of the 92 tokens above. In return there are fewer lookups.
#
# </details>
#
# **Two equal prompts arrive in the same step. Are they computed twice?**
#
# <details markdown="1"><summary>Answer</summary>
#
# No. The scheduler admits the second a step later, when it finds the blocks of the first. And if
# two sequences do write the same block at the same time, `cache_blocks` keeps one of the two.
#
# </details>
#
# **The cache keeps everything it has room for. Can a request be rejected, or wait, because of
# that?**
#
# <details markdown="1"><summary>Answer</summary>
#
# No. Idle blocks count as free, and are evicted when they are needed. But pinned blocks have an
# owner, so no other sequence can use their memory.
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
num_evicted = sum(event.event == "evict" for event in events)
print(f"{len(mixed)} prompts in 12 blocks: {num_evicted} blocks evicted")

# %% [markdown]
# To write the index and its eviction yourself, take [lab 6](labs/06.md). Next:
# [what happens when all blocks are in use](09_when_memory_runs_out.md).
