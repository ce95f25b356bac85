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
# - What a serving engine takes and returns.
# - What one *step* is, and why several requests share it.
# - What a *block* is, and how many a run needs.
#
# ## Invariants
#
# 1. At temperature 0 the answer depends only on the prompt, not on the other requests of a step or
#    on the block size.
# 2. When the last request has ended, every block is free again.
#
# Both rules hold in every chapter, and each chapter's checks test them again.
#
# ## Predict
#
# Write down a number for each question, and compare at the end.
#
# - A prompt has 24 tokens, its answer 5. How many times does the model run?
# - Six prompts of 25 to 102 tokens, with answers of 3 to 12, are served together. How many times
#   does it run now?
# - Earlier engines would reserve room for 1,024 tokens, the model's maximum, for each of the six.
#   How many times as much is that as the six need?
#
# ## Build it
#
# The model, *storyteller*, is a LLaMA of two million parameters that comes with the package. It was
# trained to answer questions about short stories like this one:

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
# stand for pieces of text. The last token, `<|endoftext|>`, ends the answer and has no text:

# %%
tokenizer = llm.get_tokenizer()
prompt_ids = output.prompt_token_ids
answer_ids = output.outputs[0].token_ids
print(len(prompt_ids), "tokens in: ", [tokenizer.decode([t]) for t in prompt_ids[:8]], "...")
print(len(answer_ids), "tokens out:", [tokenizer.decode([t]) for t in answer_ids])

# %% [markdown]
# A language model reads tokens and computes how likely each token is to come next, so an answer
# takes one run per token. The first run reads the prompt (*prefill*), and each later run only the
# newest token (*decode*). This library is about where the model's memory of the earlier tokens is
# stored.
#
# Each `step()` of the engine runs the model once for all requests, and returns the progress of
# each. `progress.output()` is the output so far:

# %%
engine = llm.engine
engine.add_request("alone", question, greedy)
num_steps = 0
while engine.has_unfinished_requests():
    [progress] = engine.step()
    num_steps += 1
    print(f"step {num_steps}: {progress.output().outputs[0].text!r}")

# %% [markdown]
# Now we ask six questions at once. A *slot* holds what the model remembers of one token, and a
# *block* is 16 slots. After each step, `usage()` counts the slots with a token (`used`) and the
# empty slots of allocated blocks (`internal`).

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
# Six requests took as many steps as the longest answer has tokens, not the sum of all. A step for
# six costs little more than a step for one (chapter 6), so an engine batches requests. Memory
# limits how many:

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
# The line is close to the area: a request fills every block it takes, except possibly the last.
# Engines before PagedAttention reserved contiguous memory for the longest possible output.
#
# Watch the same run: press play, or step with the arrow keys. Each square is a block; its letter
# names the request that owns it.

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
# A request is served alone. How many blocks does it own during each step? Replace the body of
# `blocks_in_step`, and run this cell and the next one again (in a notebook: `minipaged learn 0
# --notebooks mine`; or edit `tutorials/00_first_run.py` and run it).


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
# Which tokens has the model read when the step ends? Not the token that this step generates: the
# next step reads it. A partly full block counts too.
#
# </details>
#
# <details markdown="1"><summary>Solution</summary>
#
# Each step after the first reads one more token. `-(-a // b)` rounds up:
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
# One question took 5 runs, one per token of its answer. Six took 12, as many as the longest answer
# has tokens. Reserving 1,024 slots for each would take 15 times as many as they held.
#
# </details>
#
# ## Questions
#
# **Why do the prompts take no extra step?**
#
# <details markdown="1"><summary>Answer</summary>
#
# The step that reads the prompt also produces the answer's first token, and the last token need not
# be read.
#
# </details>
#
# **A request holds 2.4 blocks' worth of tokens. How many blocks does it own, and how much is
# wasted?**
#
# <details markdown="1"><summary>Answer</summary>
#
# It owns three, and 0.6 of the third is empty. A sequence wastes at most one block less one slot.
#
# </details>
#
# **What would happen with `num_blocks=2`?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Some of these prompts need more than two blocks. Adding such a request raises `PromptTooLong`, and
# `LLM.generate` then serves no prompt. A program that calls `engine.add_request` can catch the
# error and serve the others. Try it.
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
