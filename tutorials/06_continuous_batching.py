# %% [markdown]
# # 6. Continuous batching: the scheduler
#
# The scheduler decides before every step which requests run, so no request waits for the slowest of
# a batch.
#
# **Needs** [chapter 5](05_models_on_pages.md) · **Time** 35 minutes ·
# **Lab** [4, a scheduler](labs/04.md)
#
# ![Static batches wait for the slowest request. Continuous batching does not.](openings/06.svg)
#
# ## Goals
#
# - Why requests are batched, and what a step for many of them costs.
# - What a *scheduler* does, and why it decides for one step at a time (*iteration-level
#   scheduling*, introduced by the system Orca; section 2.3 of the paper).
# - Why prefill, chunked prefill and decode are the same operation at three lengths.
#
# ## Invariants
#
# 1. A request's tokens do not depend on the other requests in its steps, nor on how its prompt is
#    cut.
# 2. Every step computes at least one token, and none twice.
# 3. Requests are admitted in order of arrival, so no request waits forever.
#
# ## Predict
#
# 24 requests arrive together, each with a short prompt. Their outputs have these lengths, 384
# tokens in all:
#
#     10  9  5  2 19 12  4 20    45 23 24  5 14 48  3 37    21  3 13 12 35  2  7 11
#
# The engine has 8 *batch slots* (`max_num_seqs=8`): at most 8 sequences take part in a step, and
# each gets one token.
#
# - The first 8 start together, the next 8 when all of them have finished, and so on. How many steps
#   does that take?
# - A waiting request takes a batch slot as soon as one is free. How many steps does it take at
#   least?
# - How much longer does a step for 8 sequences take than a step for one?
#
# ## Build it: a scheduler
#
# ### Why serve many at once
#
# The model's weights are read from memory once per step, for all sequences in it (chapter 1). We
# measure what that gains, with 1 to 32 sequences that decode together.

# %% Tokens per second by sequences in a step, relative to one sequence
import time
from statistics import median
from typing import Any

import drawing

from minipaged import LLM, SamplingParams

crowds = (1, 2, 4, 8, 16, 32)
llm = LLM(num_blocks=128, max_num_seqs=32, enable_prefix_caching=False)


def tokens_per_second(num_seqs: int, num_steps: int = 8) -> float:
    params = SamplingParams(temperature=0, max_tokens=num_steps + 1, ignore_eos=True)
    for number in range(num_seqs):
        llm.engine.add_request(f"{number}", "Once upon a time", params)
    llm.engine.step()  # the prompts, which are not measured
    start = time.perf_counter()
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
    return num_seqs * num_steps / (time.perf_counter() - start)


rounds = [[tokens_per_second(crowd) for crowd in crowds] for _ in range(3)]
measured = [max(rates) for rates in zip(*rounds, strict=True)]
gains = [rate / measured[0] for rate in measured]
figure, axes = drawing.picture()
axes.plot(crowds, crowds, color=drawing.GREY, ls=":", label="if all steps took the same time")
axes.plot(crowds, gains, marker="o", label="storyteller here, measured")
axes.set(xscale="log", yscale="log", xlabel="sequences in a step", ylabel="tokens per second")
axes.set(xticks=crowds, xticklabels=crowds, yticks=crowds, yticklabels=crowds)
axes.minorticks_off()
axes.legend(loc="upper left")
print(f"8 sequences: {gains[3]:.0f} times the tokens of one, {8 / gains[3]:.1f} times the seconds")

# %% [markdown]
# Much of this small model's step is the overhead of function calls, which is also paid once per
# step. (Chapter 2 has the curve of a large model.) An engine therefore runs as many sequences per
# step as memory allows. How can it keep its batch slots filled?
#
# ### Static batches
#
# The old way is to fill all batch slots, and to refill them when all of their requests have
# finished. The scheduler decides this. It keeps requests in queues, and returns a `SchedulerOutput`
# for each step: how many tokens each sequence computes. Here is a complete scheduler. A *group* is
# one request with its sequences (until chapter 7, one sequence).

# %%
from minipaged.config import EngineConfig
from minipaged.memory import Memory
from minipaged.scheduler.output import ScheduledSequence, SchedulerOutput
from minipaged.sequence import Sequence, SequenceGroup


class StaticBatches:
    """Fills all batch slots, and refills them when all of their requests have ended."""

    def __init__(self, config: EngineConfig, memory: Memory, *_: object) -> None:
        self.config, self.memory = config, memory
        self.waiting: list[SequenceGroup] = []
        self.running: list[SequenceGroup] = []
        self.swapped: list[SequenceGroup] = []  # empty until chapter 9

    def may_join(self) -> bool:
        return not self.running

    def add(self, group: SequenceGroup) -> None:
        self.waiting.append(group)

    def schedule(self) -> SchedulerOutput:
        """How many tokens each sequence computes in the next step."""
        if self.may_join():
            num_free = self.config.max_num_seqs - len(self.running)  # batch slots
            joining, self.waiting = self.waiting[:num_free], self.waiting[num_free:]
        else:
            joining = []
        for group in self.running:
            self.memory.append(group.sequences[0])  # a slot for the token that came last
        for group in joining:
            self.memory.admit(group)  # blocks for the prompt
        self.running += joining
        return SchedulerOutput(sequences=tuple(self.all_tokens(group) for group in self.running))

    def all_tokens(self, group: SequenceGroup) -> ScheduledSequence:
        [seq] = group.sequences
        return ScheduledSequence(group, seq, seq.num_uncomputed_tokens, samples=True)

    def commit(self, output: SchedulerOutput) -> None:
        """The step has run."""
        for scheduled in output.sequences:
            scheduled.seq.mark_computed(scheduled.num_new_tokens)

    def finish(self, group: SequenceGroup, seq: Sequence) -> None:
        """A sequence has its last token."""
        self.memory.free(seq)
        self.running.remove(group)

    def abort(self, group: SequenceGroup) -> None:
        """A request is withdrawn before its end."""
        if group in self.waiting:
            self.waiting.remove(group)
        else:
            self.finish(group, group.sequences[0])

    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)


# %% [markdown]
# It assumes that memory never runs out, so give it a large pool. Nothing in it touches a tensor:
# the engine carries out its decisions. Continuous batching drops one condition:


# %%
class ContinuousBatches(StaticBatches):
    """Refills a free batch slot in the very next step."""

    def may_join(self) -> bool:
        return True


# %% [markdown]
# Both serve the 24 requests, and so does the library's scheduler. With `ignore_eos`, each request
# generates exactly `max_tokens` tokens.

# %%
from minipaged import Event, EventLog, Parts
from minipaged.evaluation.stories import ANIMALS, NAMES
from minipaged.scheduler.fcfs import FCFSScheduler

lengths = [10, 9, 5, 2, 19, 12, 4, 20, 45, 23, 24, 5, 14, 48, 3, 37, 21, 3, 13, 12, 35, 2, 7, 11]
pairs = zip(NAMES, ANIMALS * 2, strict=False)
prompts = [f"Once upon a time {name} the {animal}" for name, animal in pairs][: len(lengths)]
params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
max_num_seqs = 8  # batch slots


def serve(parts: Parts, **options: Any) -> tuple[list[list[int]], list[Event]]:
    """The tokens of all 24, and what happened."""
    events: list[Event] = []
    defaults = {"num_blocks": 128, "max_num_seqs": max_num_seqs, "enable_prefix_caching": False}
    llm = LLM(parts=parts.traced(EventLog(events.append)), **(defaults | options))
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs], events


def requests_of_steps(events: list[Event]) -> list[list[str]]:
    return [event.fields["running"] for event in events if event.event == "schedule"]


runs = {
    "static batches": serve(Parts(scheduler=StaticBatches)),
    "continuous": serve(Parts(scheduler=ContinuousBatches)),
    "the library's": serve(Parts(scheduler=FCFSScheduler)),
}
for name, (_, events) in runs.items():
    steps = requests_of_steps(events)
    total = max_num_seqs * len(steps)
    empty = total - sum(len(running) for running in steps)
    print(f"{name:15} {len(steps):4} steps, {empty:4} of {total} batch slots empty")

# %% Each row a request: outlined while it waits, blue while it runs
figure, axes = drawing.picture(7.2, 5.2, ncols=2, sharex=True, sharey=True)
for axis, name in zip(axes, ("static batches", "continuous"), strict=True):
    steps = requests_of_steps(runs[name][1])
    took_part = [
        [step for step, running in enumerate(steps) if f"llm-{number}" in running]
        for number in range(len(lengths))
    ]
    rows = {}
    for number, mine in enumerate(took_part):
        rows[str(number)] = ["waits"] * mine[0] + ["runs"] * len(mine)
        if name == "static batches":
            batch = took_part[number - number % max_num_seqs :][:max_num_seqs]
            rows[str(number)] += ["kept"] * (max(other[-1] for other in batch) - mine[-1])
    drawing.strips(axis, rows, {"runs": "runs", "kept": "its batch slot stays empty"})
    axis.set(title=f"{name}: {len(steps)} steps", xlabel="step")
    axis.tick_params(axis="y", labelsize=7, length=0)
    axis.get_legend().remove()
axes[1].legend(loc="upper right", fontsize=8)

# %% [markdown]
# On the left, orange is waste: 440 times a batch slot computes no token. Request 17 needs 3 tokens,
# but starts after 68 steps, when the longest requests of two batches have finished. On the right,
# batch slots stay empty only at the end, when no request is waiting.
#
# The library's scheduler takes as many steps. What does it do in addition?
#
# @@ minipaged.scheduler.fcfs.FCFSScheduler.schedule
#
# It distributes *tokens*, not only batch slots. It reserves blocks first, and *preempts* a request
# if none are free (`_reserve_for_running`): it frees all blocks of that request, which are
# recomputed later (chapter 9). Then a request with several samples forks again (`_refork`). And it
# asserts that each step makes progress.
#
# ### One range, two lengths
#
# A sequence has two lengths: its number of tokens, and the number of tokens whose keys and values
# are computed. The range between the two is still to be computed. It is long for a new prompt, and
# one token for a decode. A preempted sequence starts at 0 again. There are no separate phases, so a
# prompt may take several steps (*chunked prefill*). Each step has a budget,
# `max_num_batched_tokens`. Decodes take their tokens first, and chunks of prompts share the rest.
#
# Seven requests are decoding. After ten steps a request with a story of 48 facts arrives. We
# compute its prompt whole, as the paper's engine does, and in chunks:

# %%
from minipaged.evaluation.stories import prompt, tell

story = tell(num_facts=48, seed=1)
long_prompt = prompt(story, story.questions[1])


def serve_late(**options: Any) -> tuple[str, list[Event], list[float]]:
    """The late request's answer; the events; the seconds of each step."""
    events: list[Event] = []
    parts = Parts().traced(EventLog(events.append))
    options |= {"max_num_seqs": max_num_seqs, "enable_prefix_caching": False}
    engine = LLM(parts=parts, **options).engine
    for number in range(7):
        decoding = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
        engine.add_request(f"{number}", prompts[number], decoding)
    answer, seconds = "", []
    while engine.has_unfinished_requests():
        if len(seconds) == 10:
            engine.add_request("late", long_prompt, SamplingParams(temperature=0, max_tokens=8))
        start = time.perf_counter()
        for progress in engine.step():
            if progress.request_id == "late":
                answer = progress.output().outputs[0].text
        seconds.append(time.perf_counter() - start)
    return answer, events, seconds


late = {
    "whole prompts": serve_late(enable_chunked_prefill=False, max_num_batched_tokens=1024),
    "at most 48 tokens per step": serve_late(max_num_batched_tokens=48),
}

# %% Tokens computed in each step: the long prompt whole, and in chunks (mind the two scales)
figure, axes = drawing.picture(ncols=2)
for axis, (name, (answer, events, seconds)) in zip(axes, late.items(), strict=True):
    shares = [
        list(e.fields["num_scheduled_tokens"].values()) for e in events if e.event == "schedule"
    ]
    decoded = [share.count(1) for share in shares]
    of_prompts = [sum(share) - share.count(1) for share in shares]
    steps = range(len(shares))
    axis.bar(steps, decoded, width=1, label="decoded")
    axis.bar(steps, of_prompts, width=1, bottom=decoded, label="prefilled")
    axis.set(title=name, xlabel="step", ylabel="tokens")
    with_late = [s for s, prompt_tokens in zip(seconds, of_prompts, strict=True) if prompt_tokens]
    slower = median(with_late[1:]) / median(seconds)  # without the very first step
    print(f"{name:27}{answer!r}, steps with its prompt take {slower:.1f} times as long")
axes[0].legend()

# %% [markdown]
# On the left, seven streams wait for one large step. On the right, the prompt takes the 41 tokens
# per step that seven decodes leave, and the streams slow down much less. In return, the new request
# gets its first token 13 steps later. The answer is the same.
#
# ### The watermark
#
# Running requests take blocks as they grow. If new requests were admitted up to the last block, the
# next step might have to preempt one. Admission therefore keeps a part of the pool free, the
# *watermark* (vLLM's addition to the paper's rule).
#
# @@ minipaged.memory.block_manager.BlockManager.can_admit
#
# Here the 24 requests have a batch slot each, but share a pool of 32 blocks of 4 slots:


# %%
def num_computed(events: list[Event]) -> int:
    return sum(
        sum(e.fields["num_scheduled_tokens"].values()) for e in events if e.event == "schedule"
    )


tight = {"num_blocks": 32, "block_size": 4, "max_num_seqs": 24}
print(f"{num_computed(runs['continuous'][1])} tokens computed in an ample pool")
for watermark in (0.0, 0.1, 0.3):
    _, events = serve(Parts(), watermark=watermark, **tight)
    num_preempted = sum(event.event == "preempt" for event in events)
    print(
        f"watermark {watermark:3.0%}: {num_preempted:2} preemptions, {num_computed(events)} tokens "
        f"computed, {len(requests_of_steps(events))} steps"
    )

# %% [markdown]
# Without a watermark, 40 % more tokens are computed than necessary. A wide watermark leaves memory
# empty, and takes more steps in the end. The library's default is 1 %, for pools of thousands of
# blocks.
#
# The first request that does not fit holds up the later ones, even if one of them would fit. That
# costs a few batch slots, and guarantees that no request is overtaken forever.
#
# Watch the last run: how the queues empty, and how a preempted request returns to its queue.

# %%
from minipaged.tracing.replay import Replay

Replay(events, title="24 requests in a small pool")

# %% [markdown]
# ## Check
#
# Rule 1: the requests generate the same tokens one at a time, with all three schedulers, and with
# 12 tokens per step. Rule 3: they are admitted in order of arrival.

# %%
alone, _ = serve(Parts(), max_num_seqs=1)
chunked, events = serve(Parts(), max_num_batched_tokens=12)
for name, (tokens, _) in runs.items():
    assert tokens == alone, name
assert chunked == alone
assert len({answer for answer, _, _ in late.values()}) == 1
for happened in (*(events for _, events in runs.values()), events):
    admitted = [event.fields["request_id"] for event in happened if event.event == "admit"]
    assert admitted == [f"llm-{number}" for number in range(24)]
print("the same tokens five times, all admitted in order")

# %% [markdown]
# Rule 2, with two mistakes: one scheduler schedules a group twice, the other admits no request.


# %%
from dataclasses import replace

from minipaged.scheduler.output import Draft


class Twice(ContinuousBatches):
    def schedule(self) -> SchedulerOutput:
        output = super().schedule()
        return replace(output, sequences=output.sequences + output.sequences[:1])


class NoneJoins(FCFSScheduler):
    def _let_others_join(self, draft: Draft) -> None:
        pass


for mistaken in (Twice, NoneJoins):
    try:
        serve(Parts(scheduler=mistaken))
    except AssertionError as error:
        print(f"{mistaken.__name__}: {error}")
    else:
        raise RuntimeError(f"{mistaken.__name__} was not noticed")

# %% [markdown]
# The first mistake raises an assertion in `BatchBuilder`, where the numbers of a step are laid out.
# The second raises the assertion in the library's `schedule`. Without it, an engine that does
# nothing would look like a slow engine.
#
# ### Exercise: share a token budget
#
# One long prompt should not take the whole budget, step after step, while shorter prompts wait.
# vLLM has an option for it, `long_prefill_token_threshold`: the maximum number of tokens of one
# prompt in a step. Write that rule. `ranges` has the number of tokens that each running sequence
# has yet to compute, in order of arrival. Decodes (ranges of 1) come first. Prompts share the
# remaining tokens in order, each up to `longest_chunk`. Change the body of `share_tokens`, and run
# this cell and the next one again.


# %%
def share_tokens(ranges: list[int], budget: int, longest_chunk: int) -> list[int]:
    """How many tokens each running sequence computes in the next step."""
    return [min(num_tokens, longest_chunk, budget) for num_tokens in ranges]  # your turn


# %%
from itertools import product


def best_shares(ranges: list[int], budget: int, longest_chunk: int) -> list[int]:
    """By brute force: of all that is allowed, what gives the oldest sequences most."""
    allowed = product(*(range(n == 1, min(n, longest_chunk) + 1) for n in ranges))
    return list(max(shares for shares in allowed if sum(shares) <= budget))


def check_exercise(own) -> bool:
    """Compare with all possible ways to share a budget, in five steps."""
    steps = {
        "a late prompt": ([1, 1, 1, 9], 8, 8),
        "all in one step": ([3, 1, 5], 16, 8),
        "two long prompts": ([9, 7, 1], 8, 4),
        "the oldest recomputes": ([9, 1, 1], 6, 8),
        "nothing is left": ([6, 5, 1, 1], 4, 2),
    }
    solved = True
    for name, (ranges, budget, longest_chunk) in steps.items():
        answer, expected = own(ranges, budget, longest_chunk), best_shares(*steps[name])
        print(f"{name:22} of {ranges}, budget {budget}: yours {answer}, expected {expected}")
        solved = solved and answer == expected
    return solved


print("solved" if check_exercise(share_tokens) else "not solved yet")

# %% [markdown]
# <details markdown="1"><summary>Hint</summary>
#
# Give every decode its token before you look at any prompt. Then go through the prompts and keep
# count of what is left.
#
# </details>
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# def share_tokens(ranges: list[int], budget: int, longest_chunk: int) -> list[int]:
#     """How many tokens each running sequence computes in the next step."""
#     shares = [1 if num_tokens == 1 else 0 for num_tokens in ranges]
#     for number, num_tokens in enumerate(ranges):
#         if num_tokens > 1:
#             shares[number] = min(num_tokens, longest_chunk, budget - sum(shares))
#     return shares
# ```
#
# In one pass in order of arrival, an old prompt would take the tokens of younger decodes.
#
# </details>
#
# <details markdown="1"><summary>Your predictions</summary>
#
# Static batches: 20 + 48 + 35 = 103 steps, the longest request of each eight. Continuous batches:
# 384 tokens in 8 batch slots are at least 48 steps. It took 62, because a 35-token request joined
# late and one sequence cannot use two batch slots. On our machine a step for 8 takes about 1.3
# times as long as for one.
#
# </details>
#
# ## Questions
#
# **Does continuous batching make a single request faster?**
#
# <details markdown="1"><summary>Answer</summary>
#
# No. Each of its steps takes as long as before, or longer if more sequences share it. But it waits
# less before it starts, and the engine serves more requests in the same time.
#
# </details>
#
# **Why is the budget at least the number of batch slots?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Every decoding sequence gets a token in each step. With fewer tokens than batch slots, some
# sequence might never get one. The library rejects such options: try
# `LLM(max_num_seqs=64, max_num_batched_tokens=32)`.
#
# </details>
#
# **Shortest job first would empty the queue sooner. Why is the order that of arrival?**
#
# <details markdown="1"><summary>Answer</summary>
#
# The length of an answer is unknown until it is complete. And as long as short requests keep
# arriving, a long one would never start.
#
# </details>
#
# **The paper compares with Orca, which has iteration-level scheduling as well. What does paging
# add?**
#
# <details markdown="1"><summary>Answer</summary>
#
# More batch slots. Orca fills a free slot at once, but each slot needs a whole reservation of
# memory, so there are few. With paging 2 to 4 times as many sequences fit (Figure 13 of the paper:
# 30 instead of 7 to 14), and the first picture shows what that is worth.
#
# </details>
#
# ## Results

# %%
total = sum(lengths)
for name, (_, events) in runs.items():
    num_steps = len(requests_of_steps(events))
    print(f"{name:15} {num_steps:4} steps, {total / num_steps:.1f} tokens per step")

# %% [markdown]
# To write the library's scheduler yourself, take [lab 4](labs/04.md) after chapter 9. Next:
# [sequences that share their blocks](07_sharing.md).
