# %% [markdown]
# # 12. The whole engine: one token's journey, profiled
#
# All parts together: you write the engine that drives them, follow one token through it, and see
# where the time goes.
#
# ## Goals
#
# - The five calls that make a step, and what each passes to the next.
# - Where a single token is at each moment: as text, number, slot, key, logit and text again.
# - What a step's time is spent on, and how that changes with the number of sequences.
#
# ## Invariants
#
# 1. A step computes every scheduled token once, and each sequence that has nothing left to compute
#    gets exactly one new token.
# 2. Blocks move before the model runs, and are cached after it has run. Never the other way.
# 3. The tokens do not depend on the engine that drives the parts.
#
# ## Predict
#
# - One sequence decodes. Which part of a step's time goes to the model, and which to scheduling,
#   bookkeeping and choosing a token?
# - Now 32 sequences decode together. Is a step 32 times as long?
# - A token is sampled in step 7. In which step are its keys and values written?
#
# ## Build it: an engine of your own
#
# You have met all the parts: the allocator and its tables (chapter 3), attention over them (4), the
# models (5), the scheduler (6), and what happens when blocks are shared or run out (7 to 9). What
# is left is the loop that drives them. Here it is for greedy decoding. It borrows its parts from an
# `LLM`, and it notes the time of each call, for later.

# %%
import time
from collections import Counter

from minipaged import LLM
from minipaged.scheduler.output import SchedulerOutput, SequenceInput, StepInput
from minipaged.sequence import Sequence, SequenceGroup


class TinyEngine:
    """One sequence a request, always the likeliest token."""

    def __init__(self, llm: LLM, max_tokens: int) -> None:
        self.scheduler = llm.engine.scheduler
        self.runner = llm.engine.executor.runner
        self.end_ids = llm.engine.executor.runner.model.config.eos_token_ids
        self.max_tokens = max_tokens
        self.sequences: list[Sequence] = []
        self.seconds: Counter[str] = Counter()

    def add(self, token_ids: list[int]) -> None:
        seq = Sequence(len(self.sequences), token_ids)
        self.sequences.append(seq)
        self.scheduler.add(SequenceGroup(str(seq.seq_id), [seq]))

    def step(self) -> None:
        decision = self.timed("schedule", self.scheduler.schedule)
        message = self.timed("write the message", self.message, decision)
        logits = self.timed("run the model", self.runner.run, message)
        tokens = iter(self.timed("choose tokens", lambda: logits.argmax(dim=-1).tolist()))
        self.timed("commit", self.scheduler.commit, decision)
        for group, seq, _, samples in decision.sequences:
            if samples:
                seq.append(next(tokens))
                if seq.token_ids[-1] in self.end_ids or seq.num_output_tokens == self.max_tokens:
                    self.scheduler.finish(group, seq)

    def message(self, decision: SchedulerOutput) -> StepInput:
        parts = (self.part(seq, length, samples) for _, seq, length, samples in decision.sequences)
        return StepInput(tuple(parts), decision.swap_out, decision.swap_in, decision.copies)

    def part(self, seq: Sequence, length: int, samples: bool) -> SequenceInput:
        start = seq.num_computed_tokens
        table = self.scheduler.memory.tables[seq.seq_id]
        new = seq.token_ids[start : start + length]
        return SequenceInput(seq.seq_id, new, start, table.blocks.copy(), num_logits=int(samples))

    def timed(self, name, call, *arguments):
        start = time.perf_counter()
        result = call(*arguments)
        self.seconds[name] += time.perf_counter() - start
        return result


# %% [markdown]
# The library's own step makes the same five calls; in addition it has requests that sample, fork
# and stream:
#
# @@ minipaged.engine.llm_engine.LLMEngine.step
#
# Give yours four questions:

# %%
from minipaged.evaluation.stories import prompt, tell

llm = LLM("storyteller", num_blocks=64, block_size=16)
tokenizer = llm.get_tokenizer()
stories = [tell(num_facts=size, seed=size) for size in (2, 4, 8, 16)]
prompts = [tokenizer.encode(prompt(story, story.questions[1])) for story in stories]

engine = TinyEngine(llm, max_tokens=24)
for token_ids in prompts:
    engine.add(token_ids)
while engine.scheduler.has_unfinished():
    engine.step()

answers = [tokenizer.decode(seq.output_token_ids) for seq in engine.sequences]
for story, answer in zip(stories, answers, strict=True):
    print(f"{story.questions[1].text:28}{answer}")

# %% [markdown]
# ### One token's journey
#
# Now step by step, with a single question. After each step we print the place of its newest token.
# Watch the column *computed*: a token is chosen in one step, and its keys and values are written in
# the next, when it is read.

# %%
llm = LLM("storyteller", num_blocks=64, block_size=16)
engine = TinyEngine(llm, max_tokens=24)
engine.add(prompts[0])
seq = engine.sequences[0]
print(f"{seq.prompt_len} prompt tokens")
print("step  new token    position  block, offset  computed")
step = 0
while engine.scheduler.has_unfinished():
    engine.step()
    step += 1
    position = seq.num_tokens - 1
    logical, offset = divmod(position, 16)
    print(
        f"{step:4}  {tokenizer.decode([seq.token_ids[-1]])!r:12} {position:7}"
        f"  {logical:9}, {offset:2}   {seq.num_computed_tokens:5} of {seq.num_tokens}"
    )

# %% [markdown]
# Let us stop the engine in the middle and look at one token from the inside. It was chosen by the
# step before. The next step finds a slot for it, computes a key and a value for it in every layer,
# writes them there, and lets it look at everything that came before it.

# %%
llm = LLM("storyteller", num_blocks=64, block_size=16)
engine = TinyEngine(llm, max_tokens=24)
engine.add(prompts[2])  # another request, which has the first blocks
engine.add(prompts[0])
engine.step()
seq = engine.sequences[1]
token, position = seq.token_ids[-1], seq.num_tokens - 1
memory, cache = engine.scheduler.memory, llm.engine.executor.runner.kv_cache


def key_in(layer: int, slot: int) -> list[float]:
    """The first elements of the key in this slot, of the first head."""
    block, offset = divmod(slot, 16)
    return [round(x, 2) for x in cache.layers[layer][0][block, 0, offset, :4].tolist()]


print(f"text       {tokenizer.decode([token])!r}")
print(f"token id   {token}")
print(f"position   {position}, so logical block {position // 16}, offset {position % 16}")
engine.step()
table = memory.tables[seq.seq_id]
slot = table.slot(position)
print(f"table      {table.blocks}, so slot {slot}")
for layer in range(llm.engine.executor.runner.model.config.num_layers):
    print(f"key        layer {layer}: {key_in(layer, slot)} ...")
chosen = seq.token_ids[-1]
print(f"it led to  {chosen}, {tokenizer.decode([chosen])!r}")

# %% [markdown]
# ```mermaid
# flowchart LR
#     text[text] -->|tokenizer| ids[token ids]
#     ids --> waiting[waiting queue]
#     waiting -->|scheduler: how many tokens| decision[scheduler output]
#     decision -->|block manager: which blocks| tables[block tables]
#     tables -->|runner: slots, lengths| tensors[tensors]
#     tensors -->|model: store_kv, paged attention| logits[logits]
#     logits -->|sampler| token[next token]
#     token -->|append| decision
#     token -->|detokenizer| out[text]
# ```
#
# ### Where the time goes
#
# The same engine with 1, 4, 16 and 64 sequences, each going on for 24 tokens. Its stopwatch tells
# the five calls apart.

# %% Milliseconds of a step by part, and tokens per second, for more and more sequences
import drawing

crowds = (1, 4, 16, 64)
phases = ("schedule", "write the message", "run the model", "choose tokens", "commit")
profile = {}
for crowd in (1, *crowds):  # the first one warms up, and is overwritten
    engine = TinyEngine(LLM("storyteller", num_blocks=1024), max_tokens=24)
    engine.end_ids = ()  # all go on to the limit
    for number in range(crowd):
        engine.add(tokenizer.encode(tell(num_facts=2, seed=number).text))
    while any(seq.num_output_tokens == 0 for seq in engine.sequences):
        engine.step()  # prompts first: we want to see steps that only decode
    engine.seconds.clear()
    num_steps = 0
    while engine.scheduler.has_unfinished():
        engine.step()
        num_steps += 1
    profile[crowd] = {phase: 1000 * engine.seconds[phase] / num_steps for phase in phases}

figure, (left, right) = drawing.picture(7.2, 3.2, ncols=2)
bottoms = [0.0] * len(crowds)
for phase in phases:
    heights = [profile[crowd][phase] for crowd in crowds]
    left.bar([str(crowd) for crowd in crowds], heights, bottom=bottoms, label=phase)
    bottoms = [low + high for low, high in zip(bottoms, heights, strict=True)]
left.set(xlabel="sequences", ylabel="ms a step")
left.legend(fontsize=8)
speeds = [1000 * crowd / sum(profile[crowd].values()) for crowd in crowds]
right.plot(crowds, speeds, marker="o", color=drawing.COLOURS[2])
right.set(xlabel="sequences", ylabel="tokens per second", ylim=(0, None))
right.set(xscale="log", xticks=crowds, xticklabels=crowds)

# %% [markdown]
# A step of 64 sequences is nowhere near 64 times as long as one of a single sequence: the weights
# are read once for all of them, and so is much of the bookkeeping. What is left of the bookkeeping
# grows with the sequences, in plain Python. It is small compared with any larger model; with this
# one of two million parameters it is visible. With a model of 135 million it is a few percent
# ([how the CPU path was made fast](../speed.md)).
#
# Inside "run the model" there are many small operations. PyTorch's profiler names them:

# %% What a decode step of 16 sequences spends its time on inside the model
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

engine = TinyEngine(LLM("storyteller", num_blocks=1024), max_tokens=24)
engine.end_ids = ()
for number in range(16):
    engine.add(tokenizer.encode(tell(num_facts=8, seed=number).text))
while any(seq.num_output_tokens < 4 for seq in engine.sequences):
    engine.step()
with record(activities=[ProfilerActivity.CPU]) as recorded:
    for _ in range(5):
        engine.step()

by_name = {row.key: row.self_cpu_time_total for row in recorded.key_averages()}
total = sum(by_name.values())
largest = sorted(by_name, key=by_name.get, reverse=True)[:8]
figure, axes = drawing.picture(7.2, 2.8)
axes.barh(largest[::-1], [100 * by_name[name] / total for name in largest[::-1]])
axes.set(xlabel="% of the time")

# %% [markdown]
# ## Check
#
# Rule 3: your engine's tokens are those of the library's, also in a pool so small that sequences
# are preempted. Rule 1: every token was computed once, so as many keys were written as there were
# tokens but the last of each. And the classic mistake, assigning the first row's token to every
# sequence, is caught immediately.

# %%
from minipaged import Parts, SamplingParams

greedy = SamplingParams(temperature=0, max_tokens=24)
as_prompts = [{"prompt_token_ids": token_ids} for token_ids in prompts]
expected = LLM("storyteller").generate(as_prompts, greedy, use_tqdm=False)
wanted = [output.outputs[0].token_ids for output in expected]


def run(engine: TinyEngine) -> list[list[int]]:
    for token_ids in prompts:
        engine.add(token_ids)
    while engine.scheduler.has_unfinished():
        engine.step()
    memory = engine.scheduler.memory
    assert memory.num_free == memory.num_blocks, "a block was lost"
    return [seq.output_token_ids for seq in engine.sequences]


for num_blocks in (64, 24):
    tight = LLM("storyteller", num_blocks=num_blocks, parts=Parts().checked())
    assert run(TinyEngine(tight, max_tokens=24)) == wanted
print("the same tokens as the library's engine, even in a small pool")


class FirstRowForAll(TinyEngine):
    def timed(self, name, call, *arguments):
        result = super().timed(name, call, *arguments)
        return [result[0]] * len(result) if name == "choose tokens" and result else result


mistaken = run(FirstRowForAll(LLM("storyteller", num_blocks=64), max_tokens=24))
assert mistaken != wanted
print("with the first row for all:", [tokenizer.decode(tokens[:6]) for tokens in mistaken])

# %% [markdown]
# <details markdown="1"><summary>Your predictions</summary>
#
# The model takes most of a step even with one sequence, though it is tiny; the rest is the
# bookkeeping. A step of 32 sequences is a few times as long as a step of one, not 32 times. And a
# token that is sampled in step 7 is read in step 8: only then are its keys and values written. The
# very last token of an answer is never read, and never has any.
#
# </details>
#
# ## Questions
#
# **Suppose the engine forgot to call `commit`. What would happen?**
#
# <details markdown="1"><summary>Answer</summary>
#
# No token would be marked as computed. Every step would compute all tokens of all sequences again,
# and give the right tokens, slower and slower. Some mistakes cost only time; that is why the
# library counts steps and tokens in its tests, and not only compares answers.
#
# </details>
#
# **Why does `commit` come after the model's run, when the prefix cache could cache a block as soon
# as it is scheduled?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Another request in the same step might find the block and read keys that are not yet written. Rule
# 2: cached only when written.
#
# </details>
#
# **Which of the five calls could run on the CPU while a GPU is busy with the model?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Scheduling the next step, if one is willing to guess that no sequence ends in this one. Serving
# engines do that. Here each step waits for the tokens of the one before, so that the code can be
# read.
#
# </details>
#
# **You have now written an allocator, an attention, a scheduler, a choice of victims, a kernel and
# an engine. How would you run them all together?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Put the classes of chapters 3, 4, 6 and 9 into one file and hand them to
# `LLM(parts=Parts(allocator=..., paged_attention=..., scheduler=..., select_victim=...))`; then let
# `TinyEngine` drive it. What is left of the library in that run is the model, the tables and the
# tests.
#
# </details>
#
# ## Results

# %%
one, many = profile[1], profile[64]
longer = sum(many.values()) / sum(one.values())
print(f"a step of 64 sequences takes {longer:.1f} times as long as a step of one")
print(f"tokens per second: {speeds[-1] / speeds[0]:.0f} times as many")
for crowd in (1, 64):
    share = profile[crowd]["run the model"] / sum(profile[crowd].values())
    print(f"the model's part of a step, {crowd:2} sequences: {share:.0%}")

# %% [markdown]
# That is the whole engine. From here: [run your own model](../guides/run_your_model.md),
# [write a backend](../guides/write_a_backend.md), or read
# [the paper beside the code](../companion.md). Next:
# [one request through the server](13_one_request_through_the_server.md).
