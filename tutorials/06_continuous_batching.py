# %% [markdown]
# # 6. Continuous batching: the scheduler
#
# Who takes part is decided anew before every step, so nobody waits for the slowest.
#
# ## What you will know at the end
#
# - Why requests are served together at all, and what a step costs that serves many.
# - What a *scheduler* does, and why it decides for one step at a time (*iteration-level
#   scheduling*, from the system Orca; section 2.3 of the paper).
# - That reading a prompt, reading a piece of it and generating a token are the same thing in three
#   lengths.
#
# ## What must hold
#
# 1. A request's tokens do not depend on who shares its steps, nor on how its prompt is cut.
# 2. Every step computes at least one token, and no token twice.
# 3. Requests are admitted in the order in which they arrive. So nobody waits for ever.
#
# ## Predict before you run
#
# 24 requests are there at once, each with a short prompt. They will generate so many tokens, 384 in
# all:
#
#     10  9  5  2 19 12  4 20    45 23 24  5 14 48  3 37    21  3 13 12 35  2  7 11
#
# The engine has 8 *seats*: at most 8 sequences take part in a step, and each gets one token.
#
# - The first 8 start together, the next 8 when all of them have ended. How many steps in all?
# - Whoever waits takes a seat as soon as it is free. How many steps now, at the least?
# - A step for 8 sequences instead of one: how much longer does it take?
#
# ## The step: a scheduler of your own
#
# ### Why serve many at once
#
# To compute one token, the model multiplies with all its *weights*, the numbers that it has
# learned. They must be read from memory for that. Whoever takes part in the step uses them while
# they are there: they are read once a step, for everybody. Let us measure it, with 1 to 32
# sequences that decode together.

# %%
import time
from statistics import median
from typing import Any

from minipaged import LLM, SamplingParams

crowds = (1, 2, 4, 8, 16, 32)
llm = LLM(num_blocks=128, max_num_seqs=32, enable_prefix_caching=False)


def tokens_per_second(num_seqs: int, num_steps: int = 8) -> float:
    params = SamplingParams(temperature=0, max_tokens=num_steps + 1, ignore_eos=True)
    for number in range(num_seqs):
        llm.engine.add_request(f"{number}", "Once upon a time", params)
    llm.engine.step()  # the prompts, which are not what we measure
    start = time.perf_counter()
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
    return num_seqs * num_steps / (time.perf_counter() - start)


rounds = [[tokens_per_second(crowd) for crowd in crowds] for _ in range(3)]
measured = [max(rates) for rates in zip(*rounds, strict=True)]
gains = [rate / measured[0] for rate in measured]

# %% [markdown]
# This model is small, and a good part of its step is the price of calling functions, which is paid
# once for everybody, too. On a GPU with a model of 13 billion parameters it is the weights: 26 GB
# of them. The library has a formula for that machine, from its published speeds, which it uses to
# simulate the paper's evaluation. We draw both.

# %% Tokens per second by sequences in a step, over those of one sequence
import drawing

from minipaged.evaluation.sim.catalogue import DEPLOYMENTS
from minipaged.evaluation.sim.cost_model import CostModel

opt_13b = CostModel(DEPLOYMENTS["opt-13b"])
rates = [n / opt_13b.step(n, num_keys=500 * n, num_prompt_tokens=0, num_pairs=0) for n in crowds]

figure, axes = drawing.picture()
axes.plot(crowds, crowds, color=drawing.GREY, linestyle=":", label="if others cost nothing")
axes.plot(crowds, [r / rates[0] for r in rates], marker="s", label="OPT-13B on an A100, by formula")
axes.plot(crowds, gains, marker="o", label="storyteller here, measured")
axes.set(xscale="log", yscale="log", xticks=crowds, xticklabels=crowds)
axes.set(yticks=crowds, yticklabels=crowds, xlabel="sequences in a step", ylabel="times the tokens")
axes.minorticks_off()
axes.legend(loc="upper left")
print(f"8 sequences: {gains[3]:.0f} times the tokens of one, {8 / gains[3]:.1f} times the seconds")

# %% [markdown]
# So an engine wants as many sequences in each step as memory allows. The question is how to keep
# the seats taken.
#
# ### Static batches
#
# The old way: take as many requests as there are seats, and take the next when all have ended. The
# part of the engine that decides this is the scheduler. It keeps requests in queues, and for each
# step it makes a *plan*: which sequence computes how many tokens. Here is a whole one. A *group* is
# one request with its sequences (one each, until chapter 7).

# %%
from minipaged.config import EngineConfig
from minipaged.memory import Memory
from minipaged.scheduler.output import SchedulerOutput
from minipaged.sequence import Sequence, SequenceGroup


class StaticBatches:
    """Takes as many as there are seats, and the next when all of them have ended."""

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
        """Who computes what in the next step."""
        plan = SchedulerOutput(tokens_left=self.config.max_num_batched_tokens)
        if self.may_join():
            num_batch_slots = self.config.max_num_seqs - len(self.running)
            newcomers, self.waiting = self.waiting[:num_batch_slots], self.waiting[num_batch_slots:]
        else:
            newcomers = []
        for group in self.running:
            self.memory.append(group.sequences[0])  # a slot for the token that came last
        for group in newcomers:
            self.memory.admit(group)  # blocks for the prompt
        self.running += newcomers
        for group in self.running:
            plan.add(group)  # all tokens that are not computed yet
        return plan

    def commit(self, plan: SchedulerOutput) -> None:
        """The step has run."""
        for scheduled in plan.sequences:
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
# It believes that memory never runs out, so give it a large pool. Nothing in it touches a tensor:
# the engine carries out the plan. And continuous batching is the same without the one condition:


# %%
class ContinuousBatches(StaticBatches):
    """A seat that is free is free for anybody, in the very next step."""

    def may_join(self) -> bool:
        return True


# %% [markdown]
# Both serve the 24 requests, and the library's scheduler as well. `ignore_eos` lets each generate
# exactly as many tokens as we say.

# %%
from minipaged import Event, EventLog, Parts
from minipaged.evaluation.stories import ANIMALS, NAMES
from minipaged.scheduler.fcfs import FCFSScheduler

lengths = [10, 9, 5, 2, 19, 12, 4, 20, 45, 23, 24, 5, 14, 48, 3, 37, 21, 3, 13, 12, 35, 2, 7, 11]
pairs = zip(NAMES, ANIMALS * 2, strict=False)
prompts = [f"Once upon a time {name} the {animal}" for name, animal in pairs][: len(lengths)]
params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
seats = 8


def serve(parts: Parts, **options: Any) -> tuple[list[list[int]], list[Event]]:
    """The tokens of all 24, and everything that happened."""
    events: list[Event] = []
    options = {"num_blocks": 128, "max_num_seqs": seats, "enable_prefix_caching": False} | options
    llm = LLM(parts=parts.traced(EventLog(events.append)), **options)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs], events


def who_ran(events: list[Event]) -> list[list[str]]:
    """The requests of each step."""
    return [event.fields["running"] for event in events if event.event == "schedule"]


runs = {
    "static batches": serve(Parts(scheduler=StaticBatches)),
    "continuous": serve(Parts(scheduler=ContinuousBatches)),
    "the library's": serve(Parts(scheduler=FCFSScheduler)),
}
for name, (_, events) in runs.items():
    steps = who_ran(events)
    empty = sum(seats - len(running) for running in steps)
    print(f"{name:15} {len(steps):4} steps, {empty:4} of {seats * len(steps)} seats empty")

# %% Each row a request: outlined while it waits, blue while it runs
figure, axes = drawing.picture(7.2, 5.2, ncols=2, sharex=True, sharey=True)
for axis, name in zip(axes, ("static batches", "continuous"), strict=True):
    steps = who_ran(runs[name][1])
    took_part = [
        [step for step, running in enumerate(steps) if f"llm-{number}" in running]
        for number in range(len(lengths))
    ]
    rows = {}
    for number, mine in enumerate(took_part):
        rows[str(number)] = ["waits"] * mine[0] + ["runs"] * len(mine)
        if name == "static batches":
            batch = took_part[number - number % seats :][:seats]
            rows[str(number)] += ["kept"] * (max(other[-1] for other in batch) - mine[-1])
    drawing.strips(axis, rows, {"runs": "runs", "kept": "its seat stays empty"})
    axis.set(title=f"{name}: {len(steps)} steps", xlabel="step")
    axis.tick_params(axis="y", labelsize=7, length=0)
    axis.get_legend().remove()
axes[1].legend(loc="upper right", fontsize=8)

# %% [markdown]
# On the left, all that is orange is lost: 440 times a seat could compute a token and does not. The
# longest request of a batch decides when the next batch may begin. Request 17 wants 3 tokens, and
# waits for the 48 of a stranger. On the right a seat stays empty only at the end, when nobody waits
# any more.
#
# Your scheduler takes as many steps as the library's. What does that one have besides?
#
# @@ minipaged.scheduler.fcfs.FCFSScheduler.schedule
#
# It asks for blocks before it promises them, and takes them away from somebody if there are none
# (`_reserve_for_running`, chapter 9). It brings back samples of one prompt (`_refork`, for
# chapter 7). It ends with an assertion, to which we come back below. And it shares out *tokens*,
# not only seats.
#
# ### One range, two lengths
#
# Of each sequence the scheduler knows two numbers: how many tokens it has, and of how many the keys
# and values are computed. What lies between is still to be computed. A new prompt is a long range,
# a decoding sequence has a range of one, and somebody who lost all blocks starts at 0 again. There
# are no separate phases. So nothing forces a prompt to be computed in one step. A step has a
# budget, `max_num_batched_tokens`, and a prompt can take what the others leave of it, step after
# step. That is called *chunked prefill*.
#
# @@ minipaged.scheduler.fcfs.FCFSScheduler._share_out_tokens
#
# Why would one want that? Seven requests are decoding. After ten steps somebody comes with a story
# of 48 facts. We let it be computed whole, as the paper's engine does, and in chunks:

# %%
from minipaged.evaluation.stories import prompt, tell

story = tell(num_facts=48, seed=1)
long_prompt = prompt(story, story.questions[1])


def serve_late(**options: Any) -> tuple[str, list[Event], list[float]]:
    """The answer of the one who comes late; what happened; the seconds of each step."""
    events: list[Event] = []
    parts = Parts().traced(EventLog(events.append))
    engine = LLM(parts=parts, max_num_seqs=seats, enable_prefix_caching=False, **options).engine
    for number in range(7):
        decoding = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
        engine.add_request(f"{number}", prompts[number], decoding)
    answer, seconds = "", []
    while engine.has_unfinished_requests():
        if len(seconds) == 10:
            engine.add_request("late", long_prompt, SamplingParams(temperature=0, max_tokens=8))
        start = time.perf_counter()
        for output in engine.step():
            answer = output.outputs[0].text if output.request_id == "late" else answer
        seconds.append(time.perf_counter() - start)
    return answer, events, seconds


late = {
    "whole prompts": serve_late(enable_chunked_prefill=False, max_num_batched_tokens=1024),
    "at most 48 tokens a step": serve_late(max_num_batched_tokens=48),
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
    axis.bar(steps, of_prompts, width=1, bottom=decoded, label="of prompts")
    axis.set(title=name, xlabel="step", ylabel="tokens")
    with_late = [s for s, prompt_tokens in zip(seconds, of_prompts, strict=True) if prompt_tokens]
    slower = median(with_late[1:]) / median(seconds)  # but for the first step of all
    print(f"{name:25} {answer!r}, its steps take about {slower:.0f} times the usual")
axes[0].legend()

# %% [markdown]
# On the left, seven readers see their text stop for the time of one large step. On the right the
# prompt takes the 41 tokens a step that seven decodes leave it, and nobody notices much. The price
# is paid by the newcomer, who sees a first token 13 steps later. The answer is the same.
#
# ### First come, first served, and a margin
#
# Newcomers take blocks, and so do those who run when they grow. If the scheduler admitted up to the
# last block, the very next step could find none for somebody who runs. It would have to *preempt*
# somebody: take all blocks away, and compute them again later (chapter 9). So admission leaves a
# part of the pool free, the *watermark*. vLLM added it to the paper's rule.
#
# @@ minipaged.memory.block_manager.BlockManager.can_admit
#
# Here the 24 requests are in a pool of 32 blocks of 4 slots. They could all use a seat, but not all
# a place in memory.


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
        f"computed, {len(who_ran(events))} steps"
    )

# %% [markdown]
# Without a margin a good part of the work is done twice. Too wide a margin keeps memory empty, and
# takes more steps in the end. The library's default is 1 %, for pools of thousands of blocks.
#
# The order is that of arrival, and the first who does not fit holds up those behind, even if one of
# them would fit. It costs a few seats, and buys that nobody is overtaken for ever.
#
# Here is a mixed trace to watch: the 24 requests come one by one, one in each step, to 8 seats and
# a pool that is a little small. See how the queues fill and empty.

# %%
from minipaged.tracing.replay import Replay

mixed: list[Event] = []
parts = Parts().traced(EventLog(mixed.append))
options = {"num_blocks": 40, "block_size": 4, "max_num_seqs": seats}
llm = LLM(parts=parts, enable_prefix_caching=False, **options)
to_come = list(zip(prompts, params, strict=True))
while to_come or llm.engine.has_unfinished_requests():
    if to_come:
        llm.engine.add_request(f"request {25 - len(to_come)}", *to_come.pop(0))
    llm.engine.step()
Replay(mixed, title="24 requests come one by one")

# %% [markdown]
# ## Check
#
# Rule 1: each alone, in your static batches, in your continuous ones, in the library's and with 12
# tokens a step, all generate the same. Rule 3: the order of admission is the order of arrival.

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
print("the same tokens five times, and everybody in turn")

# %% [markdown]
# Rule 2, with two mistakes. A scheduler that plans the same group twice, and one that never lets
# anybody in:


# %%
class Twice(ContinuousBatches):
    def schedule(self) -> SchedulerOutput:
        plan = super().schedule()
        plan.add(self.running[0])
        return plan


class NobodyJoins(FCFSScheduler):
    def _let_others_join(self, plan: SchedulerOutput) -> None:
        pass


for mistaken in (Twice, NobodyJoins):
    try:
        serve(Parts(scheduler=mistaken))
    except AssertionError as error:
        print(f"{mistaken.__name__}: {error}")
    else:
        raise RuntimeError(f"{mistaken.__name__} was not noticed")

# %% [markdown]
# The first was found by the sequence, which knows how many tokens it has; the second is the
# assertion at the end of the library's `schedule`. An engine that does nothing, step after step,
# would look like one that is slow.
#
# <details markdown="1"><summary>Your predictions</summary>
#
# Static: 20 + 48 + 35 = 103 steps, the longest of each eight. Continuous: 384 tokens in 8 seats are
# 48 steps at the least, if no seat were ever empty. It took 62: a request of 35 tokens joined late,
# and two seats would not make it faster. A step for 8 takes about 1.3 times as long as one for 1,
# on our machine. By the formula it is 1.2 times for the large model on its GPU.
#
# </details>
#
# ## Questions
#
# **Does continuous batching make a single request faster?**
#
# <details markdown="1"><summary>Answer</summary>
#
# No. Its steps are the same and each takes as long as before, or longer if more share it. It waits
# less before it begins, and the engine serves more in the same time.
#
# </details>
#
# **Why is the budget at least the number of seats?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Everybody who decodes gets a token in each step, before any prompt does. With fewer tokens than
# seats somebody might never get one. The library refuses such options with a sentence; try
# `LLM(max_num_seqs=64, max_num_batched_tokens=32)`.
#
# </details>
#
# **Shortest job first would empty the queue sooner. Why is the order that of arrival?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Nobody knows how long an answer becomes before it is there. And with a steady stream of short ones
# a long one would never begin. First come, first served needs no guess and starves nobody.
#
# </details>
#
# **The paper compares with Orca, which has iteration-level scheduling as well. What does paging
# add?**
#
# <details markdown="1"><summary>Answer</summary>
#
# The seats. Orca can fill a free seat at once, but each takes a whole reservation of memory, so
# there are few. With paging some 2 to 4 times more sequences fit (Figure 13 of the paper: 30
# against 7 to 14), and the first picture says what that is worth.
#
# </details>
#
# ## What changed in the numbers

# %%
total = sum(lengths)
for name, (_, events) in runs.items():
    num_steps = len(who_ran(events))
    taken = sum(len(running) for running in who_ran(events))
    print(
        f"{name:15} {num_steps:4} steps, {taken / (seats * num_steps):4.0%} of the seats taken, "
        f"{total / num_steps:.1f} tokens a step"
    )

# %% [markdown]
# Next: [sequences that share their blocks](07_sharing.md).
