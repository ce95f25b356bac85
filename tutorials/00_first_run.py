# %% [markdown]
# # 0. First run
#
# A language model answers questions on your machine, and you look over its shoulder while it does.
#
# **Time** 25 minutes
#
# ![Each step of the engine gives every running request its next token.](openings/00.svg)
#
# ## Goals
#
# - What goes into a serving engine and what comes out.
# - What one *step* is, and why several requests share it.
# - What a *block* is, and how many blocks a run needs.
#
# ## Invariants
#
# 1. At temperature 0 the answer depends only on the prompt. It does not depend on which other
#    requests run in the same step, or on the block size.
# 2. When the last request has ended, every block is free again.
#
# These two rules hold in every chapter. Each chapter changes a part of the engine, and its checks
# test them again.
#
# ## Predict
#
# Write down a number for each question, and compare at the end.
#
# - The prompt below has about 25 tokens, and its answer has 5. How many times does the model run?
# - Six such prompts are served together. How many times does it run now?
# - The model can take 1,024 tokens. How much of that does a request really use?
#
# ## Build it
#
# The model is called *storyteller*: a small LLaMA of two million parameters that comes with the
# package. It was trained on short stories like the one below, and it can answer questions about
# them.

# %%
from minipaged import LLM, SamplingParams

llm = LLM("storyteller", num_blocks=64, block_size=16)
greedy = SamplingParams(temperature=0, max_tokens=24)

story = "Once upon a time Theo the frog put the white key in the meadow."
question = f"{story}\nQ: Where is the key of Theo?\nA:"
[output] = llm.generate(question, greedy, use_tqdm=False)
print(output.outputs[0].text)

# %% [markdown]
# A prompt goes in, and a `RequestOutput` comes out. The engine works on *tokens*, numbers that
# stand for pieces of text, and so does the rest of this library.

# %%
tokenizer = llm.get_tokenizer()
prompt_ids = output.prompt_token_ids
answer_ids = output.outputs[0].token_ids
print(len(prompt_ids), "tokens in: ", [tokenizer.decode([t]) for t in prompt_ids[:8]], "...")
print(len(answer_ids), "tokens out:", [tokenizer.decode([t]) for t in answer_ids])

# %% [markdown]
# A language model does one thing: it reads tokens and computes how likely each token is to come
# next. An answer therefore takes one run of the model per token. The first run reads the whole
# prompt (*prefill*). Each later run reads only the newest token (*decode*). Chapter 1 explains why
# the earlier tokens need not be read again. The whole library is about where the model's memory of
# them is stored.
#
# `LLM.generate` hides these runs. One level below, each `step()` of the engine runs the model once
# for all requests being served, and returns the progress of each. `progress.output()` is the
# request's output so far.

# %%
engine = llm.engine
engine.add_request("alone", question, greedy)
num_steps = 0
while engine.has_unfinished_requests():
    [progress] = engine.step()
    num_steps += 1
    print(f"step {num_steps}: {progress.output().outputs[0].text!r}")

# %% [markdown]
# Now we ask six questions at once, about six stories of different lengths. After each step we note
# how memory is used. `usage()` counts *slots*; a slot holds what the model remembers of one token.
# A *block* is 16 slots.

# %%
from minipaged.evaluation.stories import prompt, tell

stories = [tell(num_facts=num_facts, seed=num_facts) for num_facts in (1, 2, 3, 4, 6, 8)]
questions = [story.questions[number] for number, story in enumerate(stories)]
prompts = [prompt(story, question) for story, question in zip(stories, questions, strict=True)]
for number, text in enumerate(prompts):
    engine.add_request(f"story {number}", text, greedy)

usages, answers = [], {}
while engine.has_unfinished_requests():
    for progress in engine.step():
        answers[progress.request_id] = progress.output().outputs[0].text.strip()
    usages.append(engine.memory.usage())

for number, asked in enumerate(questions):
    print(f"{asked.text:45} {answers[f'story {number}']}")
print(f"\n{len(usages)} steps for {len(prompts)} requests")

# %% [markdown]
# Serving six requests took only as many steps as the longest answer has tokens, not the sum of all
# six. A step that serves six costs little more than a step that serves one, as chapter 6 will
# measure. That is why a serving engine batches requests, and memory limits how many it can batch.
# Here is the memory in use, step by step:

# %% Slots of the pool that hold a token, and slots in allocated blocks, step by step
import drawing

steps = range(1, len(usages) + 1)
used = [usage.used for usage in usages]
held = [usage.used + usage.internal for usage in usages]
figure, axes = drawing.picture()
axes.step(steps, held, where="mid", label="slots in allocated blocks")
axes.fill_between(steps, used, step="mid", alpha=0.4, label="slots with a token")
axes.axhline(usages[0].total, color=drawing.GREY, linestyle=":", label="all slots of the pool")
axes.set(xlabel="step", ylabel="slots", ylim=(0, None))
axes.legend(loc="upper left", bbox_to_anchor=(0, 0.95))

# %% [markdown]
# The two lines are close together: a request fills every block it takes, except possibly the last.
# Engines before PagedAttention were different. They reserved contiguous memory for the longest
# possible output of every request.
#
# Watch the same run again: press play, or step with the arrow keys. Each square is a block of the
# pool, and its letter names the request that owns it.

# %%
from minipaged import Event, EventLog, Parts
from minipaged.tracing.replay import Replay

events: list[Event] = []
watched = LLM("storyteller", num_blocks=64, parts=Parts().traced(EventLog(events.append)))
together = watched.generate(prompts, greedy, use_tqdm=False)
Replay(events, title="Six requests in one pool")

# %% [markdown]
# ## Check
#
# Rule 1: the answers are the same when each request is served alone, and with another block size.
# Rule 2: all blocks are free again.

# %%
alone = [llm.generate(text, greedy, use_tqdm=False)[0] for text in prompts]
small_blocks = LLM("storyteller", num_blocks=512, block_size=4)
in_small_blocks = small_blocks.generate(prompts, greedy, use_tqdm=False)

for one, two, three in zip(together, alone, in_small_blocks, strict=True):
    assert one.outputs[0].token_ids == two.outputs[0].token_ids == three.outputs[0].token_ids
for each in (llm, watched, small_blocks):
    memory = each.engine.memory
    assert memory.num_free == memory.num_blocks
print("same answers, and every block is free")

# %% [markdown]
# ### Exercise: blocks per step
#
# A request is served alone. How many blocks does it own during each step? Step 1 reads the prompt.
# Replace the body of `blocks_in_step`, and run this cell and the next one again.


# %%
def blocks_in_step(step: int, prompt_len: int, block_size: int) -> int:
    """Blocks that a request owns while step 1, 2, 3, ... runs."""
    return 1  # your turn


# %%
from itertools import product


def owned_blocks(text: str, block_size: int) -> tuple[int, list[int]]:
    """Tokens of the prompt, and the blocks in use during each of ten steps."""
    llm = LLM("storyteller", num_blocks=64, block_size=block_size)
    memory, owned = llm.engine.memory, []
    llm.engine.listeners.append(lambda *_: owned.append(memory.num_blocks - memory.num_free))
    ten_tokens = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    [output] = llm.generate(text, ten_tokens, use_tqdm=False)
    return len(output.prompt_token_ids), owned


def check_exercise(blocks_in_step) -> bool:
    """Compare with the blocks that the engine uses."""
    solved = True
    for text, block_size in product(("Once upon a time", story), (4, 16)):
        prompt_len, expected = owned_blocks(text, block_size)
        yours = [blocks_in_step(step, prompt_len, block_size) for step in range(1, 11)]
        print(f"prompt of {prompt_len} tokens, blocks of {block_size}")
        print(f"    yours:    {yours}\n    expected: {expected}")
        solved = solved and yours == expected
    return solved


print("solved" if check_exercise(blocks_in_step) else "not solved yet")

# %% [markdown]
# <details markdown="1"><summary>Hint</summary>
#
# Which tokens has the model read when the step ends? The token that the step generates is not one
# of them: the next step reads it. A block that is only partly full counts too.
#
# </details>
#
# <details markdown="1"><summary>Solution</summary>
#
# Step 1 reads the prompt, and each later step reads one more token. Each token read takes a slot.
# `-(-a // b)` rounds up to whole blocks:
#
# ```python
# def blocks_in_step(step: int, prompt_len: int, block_size: int) -> int:
#     """Blocks that a request owns while step 1, 2, 3, ... runs."""
#     num_tokens = prompt_len + step - 1
#     return -(-num_tokens // block_size)
# ```
#
# </details>
#
# <details markdown="1"><summary>Your predictions</summary>
#
# One question took 5 runs, one per token of its answer. Six questions took 12, as many as the
# longest answer has tokens. The longest of the six requests used about 130 slots, an eighth of
# 1,024.
#
# </details>
#
# ## Questions
#
# **Why are there as many steps as the longest answer has tokens, and not one more for the
# prompts?**
#
# <details markdown="1"><summary>Answer</summary>
#
# The step that reads a prompt also produces the first token of the answer. An answer of six tokens
# therefore takes six runs: one for the prompt, and one for each answer token except the last, which
# need not be read. (A long prompt may be cut into several steps; these are short.)
#
# </details>
#
# **A request holds 2.4 blocks' worth of tokens. How many blocks does it own, and how much is
# wasted?**
#
# <details markdown="1"><summary>Answer</summary>
#
# It owns three blocks, and 0.6 of the third is empty. A sequence wastes at most one block less one
# slot, however long it is. Blocks of one token would waste nothing; chapter 3 explains what they
# would cost.
#
# </details>
#
# **What would happen with `num_blocks=2`?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Some of these prompts need more than two blocks. Adding such a request raises `PromptTooLong`,
# whose message states how many blocks it needs. `LLM.generate` then serves none of its prompts. A
# program that calls `engine.add_request` itself can catch the error for one prompt, and the engine
# serves the others. Try it.
#
# </details>
#
# ## Results

# %%
fullest = max(usages, key=lambda usage: usage.used)
needed = fullest.used + fullest.internal
reserved = len(prompts) * llm.engine.config.max_model_len
print(f"slots that six requests held at most  {needed:6,}")
print(f"of them with a token                  {fullest.used:6,}  ({fullest.used / needed:.0%})")
print(f"if each reserved the longest output   {reserved:6,}  ({reserved / needed:.0f}x)")

# %% [markdown]
# Next: [what the model remembers of a token, and why](01_attention_and_the_kv_cache.md).
