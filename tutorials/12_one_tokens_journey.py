# %% [markdown]
# # 12. The whole engine: one token's journey, profiled
#
# You write the engine that drives all the parts, follow one token through it, and see where the
# time goes.
#
# **Needs** [chapter 6](06_continuous_batching.md), [chapter 5](05_models_on_pages.md) · **Time** 30
# minutes · **Lab** [9, the open challenge](labs/09.md)
#
# ![The five calls of a step. The chosen token is an input of the next step.](openings/12.svg)
#
# ## Goals
#
# - The five calls of a step, and what each passes to the next.
# - What a single token is at each moment: text, number, slot, key, logit and text again.
# - Where the time of a step goes, and how that changes with the number of sequences.
#
# ## Invariants
#
# 1. A step computes every scheduled token once, and each sequence that has nothing left to compute
#    gets exactly one new token.
# 2. Blocks are copied and swapped before the model runs. They enter the prefix cache after it has
#    run. Otherwise another request could read keys that are not yet written.
# 3. The tokens do not depend on the engine that drives the parts.
#
# ## Predict
#
# - One sequence decodes. What share of a step goes to the model, and what share to scheduling,
#   bookkeeping and choosing a token?
# - Now 32 sequences decode together. Does a step take 32 times as long?
# - A token is sampled in step 7. In which step are its keys and values written?
#
# ## Build it: an engine of your own
#
# You know all the parts: allocator and tables (chapter 3), attention (4), models (5) and the
# scheduler (6). What is left is the loop that drives them. Here it is for greedy decoding. It takes
# its parts from an `LLM`, and measures each call for later.

# %%
import time
from collections import Counter

from minipaged import LLM
from minipaged.scheduler.output import SchedulerOutput, SequenceInput, StepInput
from minipaged.sequence import Sequence, SequenceGroup


class TinyEngine:
    """One sequence per request, always the likeliest token."""

    def __init__(self, llm: LLM, max_tokens: int) -> None:
        self.scheduler = llm.engine.scheduler
        self.runner = llm.engine.executor.runner
        self.end_ids = self.runner.model.config.eos_token_ids
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
# The library's own step makes the same five calls. The first four launch a step, so that a GPU can
# compute it while the host reads the one before. Its requests also sample, fork and stream:
#
# @@ minipaged.engine.llm_engine.LLMEngine._launch
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
# Now step by step, with a single question. After each step we print where its newest token belongs.
# Watch the column *computed*: a token is chosen in one step, and its keys and values are written in
# the next, when the model reads it.

# %%
llm = LLM("storyteller", num_blocks=64, block_size=16)
engine = TinyEngine(llm, max_tokens=24)
engine.add(prompts[0])
seq = engine.sequences[0]
print(f"{seq.prompt_len} prompt tokens")
print("step  new token    position  logical block, offset  computed")
step = 0
while engine.scheduler.has_unfinished():
    engine.step()
    step += 1
    position = seq.num_tokens - 1
    logical, offset = divmod(position, 16)
    print(
        f"{step:4}  {tokenizer.decode([seq.token_ids[-1]])!r:12} {position:7}"
        f"  {logical:17}, {offset:2}   {seq.num_computed_tokens:5} of {seq.num_tokens}"
    )

# %% [markdown]
# Now look at one token from the inside. The first step chose it. The next step finds a slot for it,
# computes its key and value in every layer, writes them there, and attends from it to all tokens
# before it.

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
# The whole journey:
#
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
# The same engine with 1, 4, 16 and 64 sequences:

# %% Milliseconds per step by call, and tokens per second, by number of sequences
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
        engine.step()  # prompts first: we want to measure steps that only decode
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
left.set(xlabel="sequences", ylabel="ms per step")
left.legend(fontsize=8)
speeds = [1000 * crowd / sum(profile[crowd].values()) for crowd in crowds]
right.plot(crowds, speeds, marker="o", color=drawing.COLOURS[2])
right.set(xlabel="sequences", ylabel="tokens per second", ylim=(0, None))
right.set(xscale="log", xticks=crowds, xticklabels=crowds)

# %% [markdown]
# A step of 64 sequences takes far less than 64 times as long as a step of one: the weights are read
# once for all of them, and much of the bookkeeping is shared. The rest of the bookkeeping grows
# with the number of sequences, in plain Python. With a model of two million parameters it is
# visible; with 135 million it is less than one percent
# ([how the CPU path was made fast](../speed.md)).

# %% [markdown]
# ## Check
#
# Invariant 3: your engine's tokens are the library's, even in a pool so small that a request is
# preempted. (`Parts().checked()` recounts all owners of blocks after each call.) The classic
# mistake, assigning the first row's token to every sequence, is caught immediately.

# %%
from minipaged import Parts, SamplingParams

greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
as_prompts = [{"prompt_token_ids": token_ids} for token_ids in prompts]
expected = LLM("storyteller").generate(as_prompts, greedy, use_tqdm=False)
wanted = [output.outputs[0].token_ids for output in expected]


def run(engine: TinyEngine) -> list[list[int]]:
    engine.end_ids = ()
    for token_ids in prompts:
        engine.add(token_ids)
    while engine.scheduler.has_unfinished():
        engine.step()
    memory = engine.scheduler.memory
    assert memory.num_free == memory.num_blocks, "a block was lost"
    return [seq.output_token_ids for seq in engine.sequences]


for num_blocks in (64, 28):  # with 28, the youngest request is preempted
    tight = LLM("storyteller", num_blocks=num_blocks, parts=Parts().checked())
    assert run(TinyEngine(tight, max_tokens=24)) == wanted
print("the same tokens as the library's engine, even in a small pool")


class FirstRowForAll(TinyEngine):
    def timed(self, name, call, *arguments):
        result = super().timed(name, call, *arguments)
        return result[:1] * len(result) if name == "choose tokens" else result


mistaken = run(FirstRowForAll(LLM("storyteller", num_blocks=64), max_tokens=24))
assert mistaken != wanted
print("the first row's token for all:", [tokenizer.decode(tokens[:6]) for tokens in mistaken])

# %% [markdown]
# ### Exercise: the slot mapping of a step
#
# The message of a step has numbers only. From it, the runner computes the *slot mapping*: for each
# token of the step, the slot into which its keys and values are written, counted through the whole
# pool. A `SequenceInput` has the `token_ids` to compute, the `context_len`, which counts the tokens
# before them, and the `block_table`. Write the mapping for all sequences, one after another.


# %%
def slot_mapping(sequences: tuple[SequenceInput, ...], block_size: int) -> list[int]:
    """The slot of each token that the step computes."""
    slots: list[int] = []
    for part in sequences:
        slots += range(len(part.token_ids))  # your turn
    return slots


# %%
from minipaged.attention.batch import BatchBuilder

messages: list[StepInput] = []


class NotingEngine(TinyEngine):
    """Keeps the message of each step."""

    def message(self, decision: SchedulerOutput) -> StepInput:
        messages.append(super().message(decision))
        return messages[-1]


def check_exercise(slot_mapping) -> bool:
    """Compare with the library in all steps of an engine whose prompts come in chunks."""
    messages.clear()
    chunks = {"max_num_seqs": 8, "max_num_batched_tokens": 24}
    run(NotingEngine(LLM("storyteller", num_blocks=96, block_size=4, **chunks), max_tokens=24))
    builder = BatchBuilder(8, 96, 4)
    num_wrong = 0
    for number, message in enumerate(messages, start=1):
        yours = slot_mapping(message.sequences, 4)
        expected = builder.build(message.sequences).slot_mapping.tolist()
        if yours != expected and not num_wrong:
            print(f"step {number}, blocks of 4:", *message.sequences, sep="\n  ")
            print(f"yours:    {yours}\nexpected: {expected}")
        num_wrong += yours != expected
    print(f"wrong in {num_wrong} of {len(messages)} steps, expected: 0")
    return num_wrong == 0


print("solved" if check_exercise(slot_mapping) else "not solved yet")

# %% [markdown]
# <details markdown="1"><summary>Hint</summary>
#
# The first token of a part has the position `context_len`, not 0. The block table is indexed by
# logical block, and the physical blocks need not be neighbours.
#
# </details>
#
# <details markdown="1"><summary>Solution</summary>
#
# Compute the position of each token, find its physical block in the table, and add the offset in
# the block:
#
# ```python
# def slot_mapping(sequences: tuple[SequenceInput, ...], block_size: int) -> list[int]:
#     """The slot of each token that the step computes."""
#     slots: list[int] = []
#     for part in sequences:
#         for position in range(part.context_len, part.context_len + len(part.token_ids)):
#             logical, offset = divmod(position, block_size)
#             slots.append(part.block_table[logical] * block_size + offset)
#     return slots
# ```
#
# A mapping that starts at position 0 is right in the first step of a prompt. In every other step it
# overwrites the keys of the first tokens.
#
# </details>
#
# <details markdown="1"><summary>Your predictions</summary>
#
# The model takes most of a step even with one sequence, though it is tiny. A step of 32 sequences
# takes a few times as long as a step of one, not 32 times. A token sampled in step 7 is read in
# step 8, and only then are its keys and values written. The very last token of an answer is never
# read.
#
# </details>
#
# ## Questions
#
# **Suppose the engine forgot to call `commit`. What would happen?**
#
# <details markdown="1"><summary>Answer</summary>
#
# No token would be marked as computed. Every step would compute all tokens again and produce the
# right tokens, slower and slower. That is why the library's tests also count steps and tokens.
#
# </details>
#
# **Which of the five calls could run on the CPU while a GPU is busy with the model?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Scheduling the next step, if it may guess that no sequence ends in this one. vLLM does that. Here
# each step waits for the previous one, so that the code stays readable.
#
# </details>
#
# **You have written an allocator, an attention, a scheduler and an engine. How would you run them
# all together?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Put the code of chapters 3, 4 and 6 into one file, pass it to
# `LLM(parts=Parts(allocator=OneOwner, paged_attention=by_gathering, scheduler=ContinuousBatches))`,
# and let `TinyEngine` drive it. Your scheduler never preempts, so the pool must be large enough. To
# run your choice of victims, take the library's scheduler and turn off prefix caching, since
# `OneOwner` cannot share a block.
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
# ### What next
#
# That is the whole engine.
#
# - **Write it yourself.** Each of the [labs](labs/index.md) takes one part of the library out, and
#   tests yours in its place. Begin with [lab 1](labs/01.md), or lower the latency of a server in
#   [lab 9](labs/09.md).
# - **Read vLLM.** [From here to vLLM](../from_here_to_vllm.md) names the counterpart of each class.
# - **Read on.** [Sarathi-Serve](https://arxiv.org/abs/2403.02310) mixes chunks of prompts with
#   decodes in one step, [SGLang](https://arxiv.org/abs/2312.07104) keeps shared prefixes in a radix
#   tree, and [DistServe](https://arxiv.org/abs/2401.09670) computes prompts and decodes on
#   different GPUs.
# - **Use it.** [Run your own model](../guides/run_your_model.md), or
#   [write a backend](../guides/write_a_backend.md).
#
# Next: [one request through the server](13_one_request_through_the_server.md). After it,
# [chapter 14](14_cut_a_model_in_two.md) divides a model among several ranks.
