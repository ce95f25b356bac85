# %% [markdown]
# # 2. The memory problem: reservation and fragmentation
#
# If every request reserves contiguous memory up front, most of that memory stays empty.
#
# **Needs** [chapter 1](01_attention_and_the_kv_cache.md) · **Time** 35 minutes
#
# ![The same memory, reserved for the longest outputs and divided into blocks.](openings/02.svg)
#
# ## Goals
#
# - Why serving systems before PagedAttention reserved memory for the longest output of every
#   request.
# - The three ways to waste memory: reserved slots, internal fragmentation, external fragmentation
#   (section 3.1 and Figure 3 of the paper).
# - How much each of them costs, and why that makes a server slow.
#
# ## Invariants
#
# 1. Allocated regions never overlap.
# 2. Every slot is of exactly one kind: it holds a token, is reserved for a later token, will never
#    be used, or is free. The kinds add up to the pool.
# 3. The memory manager changes how many requests run at a time, never their tokens.
#
# ## Predict
#
# - A request has a prompt of 7 tokens and will generate 3. The system reserves 2,048 slots. How
#   many of them will never hold a token?
# - Requests are as long as those of ChatGPT's users: 161 tokens in and 338 out on average. Each
#   reserves 2,048 slots. What part of the memory holds a token at a given moment?
# - What part would it be if each reserved exactly what it needs in the end, which no server can
#   know?
#
# ## Build it: a first-fit allocator
#
# Chapter 1 kept the keys of a sequence in one tensor. A tensor is contiguous: its rows are adjacent
# in memory. A growing sequence therefore needs free memory after its last row. How much? The model
# decides when it stops, so the length is unknown beforehand. The safe answer is the longest output
# allowed.
#
# Here is memory as one strip of slots, with an allocator that hands out regions of it. It takes the
# first gap that is large enough (*first-fit*), and joins adjacent gaps when a region is freed.

# %%
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


class FirstFit:
    """Hands out regions of one strip of slots."""

    def __init__(self, num_slots: int) -> None:
        self.gaps = [range(num_slots)]  # from left to right

    def allocate(self, size: int) -> range | None:
        for index, gap in enumerate(self.gaps):
            if len(gap) >= size:
                rest = gap[size:]
                self.gaps[index : index + 1] = [rest] if rest else []
                return gap[:size]
        return None

    def free(self, region: range) -> None:
        self.gaps = sorted([*self.gaps, region], key=lambda gap: gap.start)
        self.join()

    def join(self) -> None:
        joined: list[range] = []
        for gap in self.gaps:
            if joined and joined[-1].stop == gap.start:
                gap = range(joined.pop().start, gap.stop)
            joined.append(gap)
        self.gaps = joined


# %% [markdown]
# First the two requests of the paper's Figure 3, halfway through. A has a prompt of 7 tokens, has
# generated 1 token and will generate 2 more; 2,048 slots are reserved for it. B has a prompt of 3,
# has generated 1, will generate 1 more, and has 512 slots. The request between them has ended, and
# a waiting request needs 1,024 slots:

# %% Figure 3 of the paper: what the slots of two requests are used for
import drawing

KINDS = {
    "token": "holds a token",
    "later": "reserved: will hold a token",
    "internal": "internal fragmentation: will never be used",
    "external": "external fragmentation: a gap too small",
}


def uses(prompt: int, generated: int, to_come: int, reserved: int) -> list[str]:
    tokens = prompt + generated
    never = reserved - tokens - to_come
    return ["token"] * tokens + ["later"] * to_come + ["internal"] * never


strip = FirstFit(3072)
regions = [strip.allocate(size) for size in (2048, 512, 512)]
strip.free(range(2048, 2560))  # the second has ended
print("regions:", *regions, " gaps:", strip.gaps, " room for 1,024:", strip.allocate(1024))

a, b = uses(7, 1, 2, 2048), uses(3, 1, 1, 512)
for name, slots in (("A", a), ("B", b)):
    print(f"{name}: {slots.count('internal'):,} slots of {len(slots):,} will never be used")
figure, (whole, near) = drawing.picture(7.2, 3.4, nrows=2)
drawing.strips(whole, {"memory": [*a, *["external"] * 512, *b]}, KINDS)
whole.set(xlim=(0, 3072), title="all 3,072 slots")
whole.get_legend().remove()  # one for both is enough
drawing.strips(near, {"A": a[:16], "B": b[:16]}, KINDS)
near.set(xlim=(0, 16), xticks=range(17), title="the first 16 slots of A and of B")
near.grid(axis="x", color="white", lw=0.8)
near.legend(loc="upper center", bbox_to_anchor=(0.45, -0.25), ncols=2, fontsize=8)

# %% [markdown]
# The tokens are too few to see in the upper strip. The rest is waste, of the three kinds
# that the paper names:
#
# - *Reserved* slots will hold a token later. Until then another request could use them.
# - *Internal fragmentation* is the part of a reservation that will never be used. Its size is
#   unknown until the request ends.
# - *External fragmentation* is between reservations: gaps that are too small for any waiting
#   request.
#
# ### Simulate a server that reserves
#
# Now a server of the usual size: OPT-13B on a GPU with 40 GB leaves room for 15,728 tokens (Table
# 1). More requests wait than fit. In each step every running request generates a token. A finished
# request frees its region, and the longest-waiting request is admitted as soon as a gap is large
# enough. The lengths are drawn like those of ChatGPT's users (the paper's ShareGPT trace, section
# 6.1; only its mean lengths are published, so the spread is a guess fitted to Figure 2).
#
# We vary only how much a request reserves. The paper compares with three versions of Orca, which
# differ in what they know about the output. *Max* knows nothing and reserves the longest sequence.
# *Pow2* over-reserves the output by at most 2x. *Oracle* knows the exact length, which no real
# system does.

# %%
from minipaged.evaluation.sim.traces import WORKLOADS

NUM_SLOTS, LONGEST = 15_728, 2048
Reserve = Callable[[int, int], int]  # (prompt, output) -> slots
RESERVE: dict[str, Reserve] = {
    "Max": lambda prompt, output: LONGEST,
    "Pow2": lambda prompt, output: min(prompt + (1 << (output - 1).bit_length()), LONGEST),
    "Oracle": lambda prompt, output: prompt + output,
}


@dataclass
class Running:
    region: range
    prompt: int
    output: int
    generated: int = 0


@dataclass
class Moment:
    parts: list[tuple[str, range]]  # from left to right, with their use
    wanted: int  # slots that the first waiting request would reserve

    def count(self, use: str) -> int:
        return sum(len(part) for its_use, part in self.parts if its_use == use)


def look(gaps: list[range], running: list[Running], wanted: int) -> Moment:
    parts = [("external", gap) for gap in gaps]
    for r in running:
        now, end = r.prompt + r.generated, r.prompt + r.output
        parts += [("token", r.region[:now]), ("later", r.region[now:end])]
        parts += [("internal", r.region[end:])]
    return Moment(sorted(parts, key=lambda part: part[1].start), wanted)


def serve(reserve: Reserve) -> list[Moment]:
    """Serve for 2,500 steps, and record the memory in every 25th."""
    waiting = deque(WORKLOADS["sharegpt"].draw(num_requests=1000, seed=0))
    strip, running, moments = FirstFit(NUM_SLOTS), list[Running](), list[Moment]()
    for step in range(2500):
        while (region := strip.allocate(reserve(*waiting[0]))) is not None:
            running.append(Running(region, *waiting.popleft()))
        if step % 25 == 0:
            moments.append(look(strip.gaps, running, reserve(*waiting[0])))
        for r in running:
            r.generated += 1
            if r.generated == r.output:
                strip.free(r.region)
        running = [r for r in running if r.generated < r.output]
    return moments


seen = {name: serve(reserve) for name, reserve in RESERVE.items()}

# %% [markdown]
# Here is the strip at seven moments of each run. Each line is the whole memory:

# %% The strip of 15,728 slots over time, if each request reserves the maximum, guesses, or knows
figure, axes = drawing.picture(7.2, 6.4, nrows=3)
for axis, (name, moments) in zip(axes, seen.items(), strict=True):
    rows = {
        f"step {step}": [use for use, part in moments[step // 25].parts for _ in part]
        for step in range(1000, 2400, 200)
    }
    drawing.strips(axis, rows, KINDS)
    axis.set(title=name, xlim=(0, NUM_SLOTS), xticks=[])
    if axis is not axes[-1]:
        axis.get_legend().remove()
axes[-1].legend(loc="upper center", bbox_to_anchor=(0.45, -0.05), ncols=2, fontsize=8)

# %% [markdown]
# Under *Max* all regions are equally long, so there are no gaps between them; only the end of the
# strip is too short for another region. Most of each region is green: it will never be used.
# *Oracle* has no internal fragmentation, yet half of its memory is empty. A request that will
# generate 400 tokens keeps 400 slots from its first step to its last, and gaps remain between
# regions of different lengths. Averages over the last 2,000 steps, in percent of the pool:

# %%
print("        " + "".join(f"{kind:>10}" for kind in KINDS) + "   running requests")
for name, moments in seen.items():
    late = moments[20:]  # without the beginning, when all requests start together
    shares = [sum(m.count(kind) for m in late) / len(late) / NUM_SLOTS for kind in KINDS]
    running = sum(sum(use == "token" for use, _ in m.parts) for m in late) / len(late)
    print(f"{name:8}" + "".join(f"{v:10.1%}" for v in shares) + f"{running:10.1f}")

unlucky = [m for m in seen["Oracle"] if m.count("external") >= m.wanted]
of_all = f"{len(unlucky)} of {len(seen['Oracle'])} moments"
print(f"\nOracle: in {of_all} one more request would have fit, but not in one gap")
gaps = [len(part) for use, part in unlucky[0].parts if use == "external"]
print(f"for example: wanted {unlucky[0].wanted}, free {sum(gaps)}, in gaps of {gaps}")

# %% [markdown]
# The last line is external fragmentation in one sentence: enough memory is free, and no request can
# use it. One could compact the regions, as a garbage collector does. But a region can be a gigabyte
# or more, and all requests would have to wait (section 3.1).
#
# ### Baselines in the engine
#
# The library includes these systems. Your allocator hands out regions of any size. Theirs is a
# *buddy allocator*, as in the paper: sizes are powers of two, and a region is halved until it is
# just large enough. That is faster and makes gaps easier to join, but rounding up wastes memory:
#
# @@ minipaged.memory.baselines.buddy.BuddyAllocator.allocate
#
# They serve real models. We ask storyteller sixteen questions, with sequences of at most 256 tokens
# and a pool of 1,024 slots. `usage()` counts the same kinds; we print the moment at which most
# slots hold a token:

# %%
from minipaged import LLM, SamplingParams
from minipaged.evaluation.stories import prompt, tell

stories = [tell(num_facts=1 + number % 6, seed=number) for number in range(16)]
prompts = [prompt(story, story.questions[0]) for story in stories]
greedy = SamplingParams(temperature=0, max_tokens=24)
answers: dict[str, dict[str, list[int]]] = {}
for kind in ("contiguous-max", "contiguous-pow2", "contiguous-oracle", "paged"):
    llm = LLM(memory=kind, num_blocks=64, max_model_len=256, enable_prefix_caching=False)
    for number, text in enumerate(prompts):
        llm.engine.add_request(str(number), text, greedy)
    usages, at_a_time, answers[kind] = [], [], {}
    while llm.engine.has_unfinished_requests():
        for progress in llm.engine.step():
            answers[kind][progress.request_id] = progress.output().outputs[0].token_ids
        at_a_time.append(len(llm.engine.scheduler.running))
        usages.append(llm.engine.memory.usage())
    assert all(usage.total == 1024 for usage in usages)
    print(f"{kind}: {len(usages)} steps, up to {max(at_a_time)} running requests")
    print("   ", max(usages, key=lambda usage: usage.used))

# %% [markdown]
# *Pow2* reserves 32 output tokens where *Oracle* reserves 24, the `max_tokens` of the request; a
# real server knows no more of the future. The last line is paging. It needs about a third of the
# steps of the first, because four times as many requests run together.
#
# ### The paper's Figure 2
#
# What about a whole server? The library can simulate one without a GPU: the real scheduler and the
# real memories, with a formula in place of the model's time. The simulation covers 160 seconds of
# serving in a few seconds, with more requests than any of the systems can sustain. (The paper
# measured an hour, and `minipaged paper fig2` simulates 15 minutes.)

# %% What each system's memory is used for, simulated; diamonds: slots with a token in the paper
from minipaged.evaluation.paper.serving import Case, Outcome
from minipaged.evaluation.paper.serving import serve as simulate

PAPER = {"orca-max": 20.4, "orca-pow2": 26.8, "orca-oracle": 38.2, "vllm": 96.3}
ours: dict[str, Outcome] = {}
for name, percent in PAPER.items():
    case = Case(name, rate=4.0, seconds=160.0, only_while_they_come=True)
    ours[name] = simulate(case)
    print(f"{name:11} slots with a token: {ours[name].used:5.1%}, paper {percent} %; ", end="")
    print(f"running requests: {ours[name].mean_batch:.1f}")

figure, axis = drawing.picture()
bottom = [0.0] * len(ours)
for use, part in zip(KINDS, ("used", "reserved", "internal", "external"), strict=True):
    heights = [100 * getattr(outcome, part) for outcome in ours.values()]
    axis.bar(list(ours), heights, bottom=bottom, width=0.6, label=KINDS[use].split(":")[0])
    bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
axis.scatter(list(PAPER), list(PAPER.values()), marker="D", color="black", edgecolor="white")
axis.set(ylabel="percent of the slots")
axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)

# %% [markdown]
# With the buddy allocator the pink part is larger than with your first-fit, which wastes less on
# rounding but takes longer to search. No allocator of contiguous regions removes the orange part,
# and none that cannot see the future removes the green one. (Free slots count as external
# fragmentation here, as in the paper, since a request is always waiting.)
#
# ### The cost: Figure 1
#
# Many requests should share each step (chapter 1), and each request needs memory.
# The paper's first figure shows both sides. The weights take two thirds of a GPU's memory, and the
# keys and values nearly all the rest. The number of tokens per second grows with the number of
# requests that fit into this rest.

# %% Memory of a GPU that serves OPT-13B; and tokens per second by running requests, from a formula
from minipaged.evaluation.sim.catalogue import DEPLOYMENTS
from minipaged.evaluation.sim.cost_model import CostModel

server = DEPLOYMENTS["opt-13b"]
weights_gb = server.model.weight_bytes / 1e9
kv_gb = server.num_slots * server.model.kv_bytes_per_token / 1e9
costs, half_way = CostModel(server), 161 + 338 // 2  # tokens of a request halfway


def tokens_per_second(batch: float) -> float:
    return batch / costs.step(round(batch), round(batch) * half_way, 0, 0)


figure, (left, right) = drawing.picture(ncols=2)
parts = {"weights": weights_gb, "keys and values": kv_gb, "other": 40 - weights_gb - kv_gb}
left.bar(list(parts), list(parts.values()), color=drawing.COLOURS[:3])
left.set(title="an A100, 40 GB", ylabel="GB")
batches = [1, 2, 4, 8, 16, 24, 32, 40]
right.plot(batches, [tokens_per_second(batch) for batch in batches], color=drawing.GREY)
for name, outcome in ours.items():
    right.scatter(outcome.mean_batch, tokens_per_second(outcome.mean_batch), label=name, zorder=3)
right.set(xlabel="running requests", ylabel="tokens per second", ylim=(0, None))
right.legend(fontsize=8)

# %% [markdown]
# ### The promise of paging
#
# Cut the memory into blocks of 16 slots, and give a sequence a block when its last one is full.
# Nothing is reserved for later except the rest of that block, so a sequence wastes less than one
# block. All blocks are equally long, so no gap is too small. This requires a table that maps
# logical blocks to physical blocks, and an attention kernel that reads through that table: chapters
# 3 and 4.
#
# There is another answer: keep each sequence contiguous in *virtual* memory, and let the system map
# physical pages to it when they are needed. That is vAttention ([arXiv
# 2405.04437](https://arxiv.org/abs/2405.04437)), and `LLM(memory="virtual")` does it, on Linux and
# a CPU.
#
# ## Check
#
# Rule 3: all four memories give the same tokens. Rule 2: the kinds add up, in your strip as in the
# library's pools (checked in each step above).

# %%
assert all(tokens == answers["paged"] for tokens in answers.values())
assert all(
    sum(moment.count(kind) for kind in KINDS) == NUM_SLOTS
    for moments in seen.values()
    for moment in moments
)
print("same tokens from", ", ".join(answers))

# %% [markdown]
# Rule 1, and no memory is lost: regions come and go at random. Two allocators with a mistake get
# the same test.

# %%
from random import Random


class NeverJoins(FirstFit):
    def join(self) -> None:
        pass


class ForgetsToCut(FirstFit):
    def allocate(self, size: int) -> range | None:
        return next((gap[:size] for gap in self.gaps if len(gap) >= size), None)


def check(kind: type[FirstFit]) -> None:
    random, strip, owned = Random(0), kind(100), list[range]()
    for _ in range(500):
        if random.random() < 0.5 and owned:
            strip.free(owned.pop(random.randrange(len(owned))))
        elif (region := strip.allocate(random.randint(1, 30))) is not None:
            for other in owned:
                apart = region.stop <= other.start or other.stop <= region.start
                assert apart, f"{kind.__name__}: {region} overlaps {other}, which is in use"
            owned.append(region)
    for region in owned:
        strip.free(region)
    whole = strip.gaps == [range(100)]
    assert whole, f"{kind.__name__}: all is free, but in {len(strip.gaps)} gaps instead of one"


check(FirstFit)
for mistake in (NeverJoins, ForgetsToCut):
    try:
        check(mistake)
    except AssertionError as error:
        print(error)
    else:
        raise RuntimeError("the mistake was not noticed")

# %% [markdown]
# ### Exercise: utilisation without a simulation
#
# Add up the reserved slots over all steps. What share of them holds a token? It follows from the
# lengths of the requests and the policy. A request runs for `output` steps. In its first step it
# holds its prompt, and in each later step one token more. The body below is far too optimistic: it
# returns 100 % for *Oracle*, of whose memory 49.1 % held tokens above and 34.3 % was reserved.
# Replace it, and run this cell and the next one again.

# %%
Requests = list[tuple[int, int]]  # (prompt, output)


def share_with_token(requests: Requests, reserve: Reserve) -> float:
    """Slots with a token by reserved slots, both summed over all steps of all requests."""
    shares = [(prompt + output) / reserve(prompt, output) for prompt, output in requests]
    return sum(shares) / len(shares)  # your turn


# %%
def check_exercise(share_with_token) -> bool:
    """Compare with a count, step by step."""
    workloads = {
        "Figure 3": [(7, 3), (3, 2)],
        "1 short, 1 long": [(10, 2), (100, 1000)],
        "ShareGPT": WORKLOADS["sharegpt"].draw(num_requests=1000, seed=0),
    }
    solved = True
    for workload, requests in workloads.items():
        for policy, reserve in RESERVE.items():
            tokens = reserved = 0
            for prompt_len, output_len in requests:
                for generated in range(output_len):
                    tokens += prompt_len + generated
                    reserved += reserve(prompt_len, output_len)
            yours, expected = share_with_token(requests, reserve), tokens / reserved
            shown = "nothing" if yours is None else f"{yours:.2%}"
            print(f"{workload:16} {policy:7} yours: {shown:8} expected: {expected:.2%}")
            solved = solved and yours is not None and abs(yours - expected) < 1e-9
    return solved


print("solved" if check_exercise(share_with_token) else "not solved yet")

# %% [markdown]
# <details markdown="1"><summary>Hint</summary>
#
# Two things are wrong. The share at the end of a request is not its average share. And the mean of
# the requests' shares is not the share of all slots: a long request keeps its slots for more steps,
# so it counts more. Sum first, and divide once.
#
# </details>
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# def share_with_token(requests: Requests, reserve: Reserve) -> float:
#     """Slots with a token by reserved slots, both summed over all steps of all requests."""
#     tokens = sum(sum(range(prompt, prompt + output)) for prompt, output in requests)
#     reserved = sum(output * reserve(prompt, output) for prompt, output in requests)
#     return tokens / reserved
# ```
#
# In the simulation above, 18.7 % of the slots held tokens under *Max* and 91.1 % were reserved: a
# share of 20.5 %. External fragmentation is not included, since it depends on the order of regions.
#
# </details>
#
# <details markdown="1"><summary>Your predictions</summary>
#
# 2,038 of 2,048 slots will never hold a token. If each of these requests reserves 2,048 slots,
# about a fifth of the memory holds tokens (yours 18.7 %, the paper 20.4 %). If each reserves
# exactly what it needs, it is about a half with first-fit, and 38.2 % in the paper, whose buddy
# allocator rounds sizes up.
#
# </details>
#
# ## Questions
#
# **Oracle knows every length. Why is half of its memory empty?**
#
# <details markdown="1"><summary>Answer</summary>
#
# It knows how much a request needs in the end, and must keep all of it from the start: the region
# cannot grow, since the next one begins right after it. On average a request is halfway through its
# output.
#
# </details>
#
# **Max leaves no gaps between regions. Is a pool without external fragmentation a good one?**
#
# <details markdown="1"><summary>Answer</summary>
#
# No. Equal regions fit everywhere, but they waste memory inside instead of outside. The blocks of
# paging are equal too, but small, so little is wasted inside them.
#
# </details>
#
# **Could a request begin with a small region and move to a larger one when it grows?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Yes, but each move copies all its keys and values: for OPT-13B 800 KB per token, hundreds of
# megabytes for one sequence. During the move it needs both regions. And the new region has the same
# three kinds of waste.
#
# </details>
#
# ## Results

# %%
before, after = ours["orca-max"], ours["vllm"]
print(
    f"slots that hold a token: {before.used:.1%} with the longest reserved, {after.used:.1%} paged"
)
print(f"running requests:        {before.mean_batch:.1f} and {after.mean_batch:.1f}")
gain = tokens_per_second(after.mean_batch) / tokens_per_second(before.mean_batch)
print(f"tokens per second:       {gain:.1f} times as many")

# %% [markdown]
# Next: [blocks, and the tables that find them](03_blocks_and_block_tables.md).
