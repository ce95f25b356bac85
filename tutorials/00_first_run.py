# %% [markdown]
# # 0. First run
#
# A language model answers questions on your machine, and you look over its shoulder while it does.
#
# ## Goals
#
# - What goes into a serving engine and what comes out of it.
# - What one *step* is, and why several requests share each of them.
# - What a *block* is, and how many a run really needs.
#
# ## Invariants
#
# 1. At temperature 0 the answer depends on the prompt and on nothing else: not on which other
#    requests run in the same step, and not on how memory is cut into blocks.
# 2. When the last request has ended, every block is free again.
#
# These two sentences are the contract of everything that follows. Each chapter changes a part of
# the engine, and each ends by checking them again.
#
# ## Predict
#
# Write down a number for each, and look at it again at the end.
#
# - The prompt below has about 25 tokens and its answer 5. How many times does the model run?
# - Six such prompts are asked together. How many times does it run now?
# - The model can take 1,024 tokens. How much of that does a request really use?
#
# ## Build it
#
# The model is called *storyteller*: two million parameters, a LLaMA in small, shipped with the
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
# A prompt goes in, a `RequestOutput` comes out. The engine does not see letters. It sees *tokens*,
# numbers that stand for pieces of text, and so does everything in this library from here on.

# %%
tokenizer = llm.get_tokenizer()
prompt_ids = output.prompt_token_ids
answer_ids = output.outputs[0].token_ids
print(len(prompt_ids), "tokens in: ", [tokenizer.decode([t]) for t in prompt_ids[:8]], "...")
print(len(answer_ids), "tokens out:", [tokenizer.decode([t]) for t in answer_ids])

# %% [markdown]
# A language model does one thing: it reads tokens and says how likely each token is to come next.
# So an answer takes one run of the model for each of its tokens. The first run reads the whole
# prompt (*prefill*), each later one reads only the token that came last (*decode*). Chapter 1
# explains why the others need not be read again. Where the model's memory of them is stored is the
# subject of the whole library.
#
# `LLM.generate` hides these runs. One level below, the engine shows them: each `step()` runs the
# model once, for all requests being served, and returns the progress of each. `progress.output()`
# gives the request's output so far.

# %%
engine = llm.engine
engine.add_request("alone", question, greedy)
num_steps = 0
while engine.has_unfinished_requests():
    [progress] = engine.step()
    num_steps += 1
    print(f"step {num_steps}: {progress.output().outputs[0].text!r}")

# %% [markdown]
# Now six questions together, about six stories. Some stories are longer than others. While they
# run, we note how the memory is used: `usage()` counts *slots*, each of which has room for what the
# model remembers of one token. A *block* is 16 slots.

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
# measure: that is why a serving engine batches requests. Memory limits how many it can batch. Here
# is its use, step by step:

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
# The two lines are close together. A request fills every block it takes, except possibly the last.
# That looks natural, but before PagedAttention it was not. Engines then reserved contiguous memory
# for the longest possible output of every request.
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
# <details markdown="1"><summary>Your predictions</summary>
#
# One question took 5 runs, one for each token of its answer. Six took 12, as many as the longest
# answer has tokens. And the longest of the six used some 130 slots: an eighth of 1,024.
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
# The step that reads a prompt also says which token comes first after it. So an answer of six
# tokens takes six runs: one over the prompt, and one over each answer token except the last, which
# need not be read. (A long prompt may be cut into several steps; these are short.)
#
# </details>
#
# **A request holds 2.4 blocks' worth of tokens. How many blocks does it own, and how much is
# wasted?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Three blocks, and 0.6 of the third is empty. A sequence can waste at most one block less one slot,
# however long it is. With blocks of one token nothing would be wasted; chapter 3 says what that
# would cost.
#
# </details>
#
# **What would happen with `num_blocks=2`?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Some of these prompts alone need more than two blocks. Adding such a request raises
# `PromptTooLong`, with a sentence that says how many blocks it needs. `LLM.generate` then serves
# none of its prompts. A program that calls `engine.add_request` itself can catch the error for this
# one prompt, and the engine serves the others. Try it.
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
print(f"had each reserved the longest output  {reserved:6,}  ({reserved / needed:.0f}x)")

# %% [markdown]
# Next: [what the model remembers of a token, and why](01_attention_and_the_kv_cache.md).
