# %% [markdown]
# # 1. Attention and why a KV cache
#
# Each new token looks back at all tokens before it, and what it looks at never changes: so it is
# kept.
#
# ## Goals
#
# - What attention computes, in eight lines that you write yourself and that the engine then runs
#   on.
# - Why keeping keys and values turns the work for one more token, which grows with the square of
#   the text so far, into work that grows with its length.
# - How many bytes a token costs, and why these bytes decide how many requests a GPU can serve.
#
# ## Invariants
#
# 1. A token attends to itself and to earlier tokens, never to later ones.
# 2. So its keys and values depend on nothing that comes later. Once computed, they stay right.
# 3. Generating with a cache gives the tokens of generating without one, every one of them.
#
# ## Predict
#
# - A prompt has 344 tokens, and 32 are generated. How many tokens run through the model if
#   everything is read again for each of them? How many with a cache?
# - *storyteller* has 4 layers with 2 KV heads of 64 elements of 4 bytes each. How much memory does
#   one token take? The whole model takes 8.7 MB: how many tokens are as large as the model?
# - A GPU has 40 GB, and a model of 13 billion parameters takes 26 of them. How many requests of
#   2,048 tokens fit into the rest?
#
# ## Build it: attention in eight lines
#
# Inside a model a token is a row of numbers, a *vector*. From it the model makes three more
# vectors, each by a multiplication with a matrix that it has learned: a *query* (what the token
# looks for), a *key* (by what it can be found) and a *value* (what it has to give). Attention
# compares the query with the key of every token that may be seen, makes the results into weights
# that add up to one, and mixes the values by these weights (section 2.1 of the paper):
#
# $$a_{ij} = \frac{\exp(q_i \cdot k_j / \sqrt{d})}{\sum_{t \le i} \exp(q_i \cdot k_t / \sqrt{d})},
# \qquad o_i = \sum_{j \le i} a_{ij} v_j$$
#
# The fraction is called *softmax*. Type it:

# %%
import math

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One head. The queries are those of the last tokens, the keys and values those of all."""
    positions = torch.arange(len(k))
    of_queries = positions[len(k) - len(q) :]
    scores = q @ k.T / math.sqrt(k.shape[1])  # [queries, keys]
    behind = positions > of_queries[:, None]
    scores = scores.masked_fill(behind, -torch.inf)
    weights = scores.softmax(dim=1)  # exp(-inf) is 0: later tokens have no weight
    return weights @ v, weights


torch.manual_seed(0)
q, k, v = torch.randn(3, 6, 64, dtype=torch.float64)  # six tokens, d = 64
out, weights = attention(q, k, v)
print("from", tuple(q.shape), "to", tuple(out.shape), "with weights", tuple(weights.shape))

# %% [markdown]
# The line with `behind` is the *causal mask*. Every row below is a query, every column a key; what
# the mask hides is empty.
#
# And why the division by $\sqrt{d}$? A product of two vectors is a sum of $d$ terms. If their
# elements have variance 1, the sum has variance $d$, so scores grow with the length of the vectors.
# Softmax of large scores gives nearly all weight to one key, and a model cannot learn from that.
# Division by $\sqrt{d}$ takes the growth away:

# %% The weights of six tokens; and of the same tokens if the scores are not divided
import drawing
from matplotlib.colors import LinearSegmentedColormap

_, sharp = attention(q * math.sqrt(64), k, v)
shades = LinearSegmentedColormap.from_list("shades", ["#D55E0000", "#D55E00"])
figure, axes = drawing.picture(5.6, 2.8, ncols=2)
for axis, matrix, title in zip(axes, (weights, sharp), ("divided", "not divided"), strict=True):
    axis.imshow(matrix.tolist(), cmap=shades, vmin=0, vmax=1)
    axis.set(title=title, xlabel="key", ylabel="query")

# %% [markdown]
# A model has several heads, each with queries, keys and values of its own, and puts their results
# side by side. With *grouped-query attention* several query heads share one head of keys and
# values, a *KV head*, so less must be kept. storyteller has 4 query heads and 2 KV heads. Query
# head `h` then reads KV head `h // group`, with `group = heads // kv_heads`, and that is the whole
# difference.
#
# ### Token by token, twice
#
# A model generates one token, appends it to the text, and looks at the text again. Here is the
# smallest model that does so: a table of vectors, three matrices, one head. It has learned nothing,
# so it talks nonsense, but it must always talk the same nonsense.

# %%
vocabulary, d = 300, 32
table, to_q, to_k, to_v = (
    torch.randn(rows, d, dtype=torch.float64) / math.sqrt(d) for rows in (vocabulary, d, d, d)
)


def likeliest(out: Tensor) -> int:
    """The token whose vector is most like the last one that attention gave."""
    return int((table @ out[-1]).argmax())


def everything_again(tokens: list[int]) -> tuple[int, Tensor]:
    x = table[tokens]  # [tokens, d]
    out, _ = attention(x @ to_q, x @ to_k, x @ to_v)
    return likeliest(out), out[-1]


class WithCache:
    def __init__(self) -> None:
        self.k = self.v = torch.empty(0, d, dtype=torch.float64)

    def __call__(self, token: int) -> tuple[int, Tensor]:
        x = table[[token]]  # [1, d]: only the token that is new
        self.k = torch.cat([self.k, x @ to_k])
        self.v = torch.cat([self.v, x @ to_v])
        out, _ = attention(x @ to_q, self.k, self.v)
        return likeliest(out), out[-1]


# %% [markdown]
# That is a *KV cache*: one key and one value a token, appended and never changed. We run both
# beside each other for 128 tokens. PyTorch counts the multiplications meanwhile, so no clock is
# needed.

# %% Multiplications for one more token, by the length of the text so far
from torch.utils.flop_counter import FlopCounterMode

cached, tokens = WithCache(), [0]
work: dict[str, list[int]] = {"everything again": [], "with a cache": []}
for _ in range(128):
    with FlopCounterMode(display=False) as slow_count:
        slow_token, slow_out = everything_again(tokens)
    with FlopCounterMode(display=False) as count:
        token, out = cached(tokens[-1])
    for name, counted in zip(work, (slow_count, count), strict=True):
        work[name].append(counted.get_total_flops() // 2)  # it counts additions too
    assert token == slow_token
    torch.testing.assert_close(out, slow_out, rtol=1e-12, atol=1e-12)
    tokens.append(token)
print("said:", *tokens[:12], "...")

figure, axes = drawing.picture()
for name, multiplications in work.items():
    axes.plot(range(1, 129), multiplications, label=name)
axes.set(xscale="log", yscale="log", xlabel="tokens so far", ylabel="multiplications")
axes.legend()

# %% [markdown]
# The numbers agree to the twelfth digit and the tokens are the same. The slopes differ: without a
# cache, one more token behind $n$ others takes $3nd^2 + 2n^2d$ multiplications, the second part of
# which grows with the *square* of $n$. With a cache it takes $3d^2 + 2nd$. (The comparison of the
# result with 300 vectors is not counted. It costs the same both ways.)
#
# Could the expensive way not compute the last row only? In a model of one layer, yes. But in a
# model of several layers, the keys of the second layer are computed from the results of the first,
# for every token. So all rows are needed, unless they were kept.
#
# ### The same in a real model
#
# The engine's cache is switched off by asking for one token at a time: each call is a new request
# that reads the whole text. (`enable_prefix_caching=False`, or the engine would find the text of
# the call before. That is chapter 8.)

# %%
import time

from minipaged import LLM, SamplingParams
from minipaged.evaluation.stories import prompt, tell

llm = LLM("storyteller", num_blocks=64, enable_prefix_caching=False)
long_story = tell(num_facts=30, seed=0)
text = prompt(long_story, long_story.questions[5])


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


llm.generate(text, greedy(1), use_tqdm=False)  # whatever comes first is slow: do not time it
start = time.perf_counter()
[kept] = llm.generate(text, greedy(32), use_tqdm=False)
seconds_with = time.perf_counter() - start

read, again = 0, list(kept.prompt_token_ids)
start = time.perf_counter()
for _ in range(32):
    [one] = llm.generate({"prompt_token_ids": again}, greedy(1), use_tqdm=False)
    read += len(again)
    again += one.outputs[0].token_ids
seconds_without = time.perf_counter() - start

prompt_len = len(kept.prompt_token_ids)
assert again[prompt_len:] == list(kept.outputs[0].token_ids)
print(f"the prompt has {prompt_len} tokens; 32 more are generated")
print(f"tokens that the model reads, without a cache: {read:,}; with one: {prompt_len + 31}")
print(f"measured: {seconds_without / seconds_with:.0f} times as long without a cache")

# %% [markdown]
# The same tokens, for a small part of the work. From here on, the library never recomputes a token
# whose keys and values are still cached.
#
# ### Your attention in the engine
#
# Now your eight lines replace the engine's attention, for a whole model. The keys are stored in
# blocks, and `gather` fetches those of a sequence in order; how it does that is chapter 4. The rest
# is a loop over the sequences that are served in a step (`spans`) and over their heads. On the way
# we note the weights, for we want to see what the model looks at.

# %%
from collections.abc import Callable

from minipaged import Parts
from minipaged.attention.batch import Batch
from minipaged.attention.reference import gather

Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class InTheEngine:
    """Attention of a whole batch, by a function for one head."""

    def __init__(self, head: Head) -> None:
        self.head = head  # it works out 1 / sqrt(d) itself, so `scale` goes unused
        self.seen: list[Tensor] = []  # for each call [heads, queries, keys]

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        out = torch.empty_like(q)  # [tokens, heads, head_dim]
        for span, table in zip(batch.spans, batch.block_tables, strict=True):
            k = gather(keys, table, span.seq_len)  # [length, kv_heads, head_dim]
            v = gather(values, table, span.seq_len)
            group = q.shape[1] // k.shape[1]
            rows, noted = slice(span.start, span.stop), []
            for h in range(q.shape[1]):
                out[rows, h], weights = self.head(q[rows, h], k[:, h // group], v[:, h // group])
                noted.append(weights)
            self.seen.append(torch.stack(noted))
        return out


def served_by(head: Head) -> tuple[LLM, InTheEngine]:
    mine = InTheEngine(head)
    parts = Parts(paged_attention=mine)
    return LLM("storyteller", num_blocks=64, enable_prefix_caching=False, parts=parts), mine


yours, watched = served_by(attention)
story = tell(num_facts=3, seed=2)
question = next(q for q in story.questions if q.kind == "person" and q.fact_index == 1)
[answer] = yours.generate(prompt(story, question), SamplingParams(temperature=0), use_tqdm=False)
print(prompt(story, question) + answer.outputs[0].text)

# %% [markdown]
# The model was called once for each token of the answer, and each of its 4 layers called your
# attention once. So `seen` holds 4 entries a step, each with the weights of 4 heads. We look for
# the head that gives most weight to the sentence with the answer, and draw what its last query saw
# in each step.

# %% What one head of layer 1 looks at while the model answers; the sentence with the fact is framed
tokenizer = yours.get_tokenizer()
ids = list(answer.prompt_token_ids)
names = [tokenizer.decode([t]).strip() for t in ids]
said = [tokenizer.decode([t]).strip() for t in answer.outputs[0].token_ids]
up_to_the_fact = prompt(story, question).partition(" " + str(story.facts[2]))[0]
end = len(tokenizer.encode(up_to_the_fact))
fact = slice(end - 11, end)  # each sentence has 11 tokens

last_queries = torch.stack([weights[:, -1, : len(ids)] for weights in watched.seen])
looks = last_queries.unflatten(0, (-1, 4))  # [steps, layers, heads, tokens of the prompt]
on_the_fact = looks[..., fact].sum(dim=(0, 3))  # [layers, heads]
layer, head = divmod(int(on_the_fact.argmax()), 4)
figure, axis = drawing.picture(7.2, 1.9)
axis.imshow(looks[:, layer, head].tolist(), cmap=shades, vmin=0, vmax=1, aspect="auto")
axis.set_xticks(range(len(ids)), names, rotation=90, fontsize=6)
axis.set_yticks(range(len(said)), [f"says {word}" for word in said], fontsize=8)
axis.axvspan(fact.start - 0.5, fact.stop - 0.5, fill=False, edgecolor=drawing.COLOURS[0], lw=2)

# %% [markdown]
# The answer looks back, and it looks into the right sentence, over two others that have the same
# form. But `A:`, the token that has to say *Dora*, does not attend to *Dora*: nearly all its weight
# is on `coin`. Look one layer lower, at the time when the prompt was read. What did `coin` attend
# to?

# %%
thing = fact.start + 6  # Dora the wren put the black coin
for below, weights in enumerate(watched.seen[0][:, thing]):  # layer 0, while it read the prompt
    found = int(weights.argmax())
    print(f"head {below}: {names[thing]!r} -> {names[found]!r:6} weight {weights[found]:.2f}")

# %% [markdown]
# Head 1 of layer 0 fetched *Dora*, so what `coin` hands on to layer 1 is no longer that of a word
# alone: it carries the name of the owner. This is why a cache must keep keys and values of *every
# layer*, and why they cannot be recomputed from a single token.
#
# ### What a token costs
#
# A key and a value, for each layer and each KV head:
#
# @@ minipaged.config.ModelConfig.kv_bytes_per_token
#
# For storyteller with its 4 bytes per element, and for models that people serve, with 2:

# %% Gigabytes of keys and values for one request of 2,048 tokens; requests beside the weights
from minipaged.evaluation.sim.catalogue import GPUS, MODELS

model = yours.engine.executor.runner.model
weight_bytes = 4 * sum(weight.numel() for weight in model.parameters())
a_token = model.config.kv_bytes_per_token(bytes_per_number=4)
print(
    f"storyteller: {a_token:,} bytes a token, all weights are {weight_bytes / a_token:,.0f} tokens"
)

served = {name: MODELS[name] for name in ("opt-13b", "llama-2-7b", "llama-3-8b")}
room = 0.95 * GPUS["a100-40g"].memory_bytes  # the rest is for what a step computes
requests: dict[str, float] = {}
for name, model in served.items():
    request_bytes = 2048 * model.kv_bytes_per_token
    requests[name] = (room - model.weight_bytes) // request_bytes
    print(
        f"{name:11} {model.kv_bytes_per_token / 1024:4.0f} KB a token, "
        f"{request_bytes / 1e9:.2f} GB a request, weights {model.weight_bytes / 1e9:.1f} GB: "
        f"{requests[name]:.0f} requests fit"
    )

figure, (left, right) = drawing.picture(ncols=2)
sizes = [2048 * model.kv_bytes_per_token / 1e9 for model in served.values()]
left.bar(list(served), sizes)
left.set(title="one request of 2,048 tokens", ylabel="GB of keys and values")
right.bar(list(served), list(requests.values()), color=drawing.COLOURS[1])
right.set(title="on an A100 with 40 GB", ylabel="requests at a time")

# %% [markdown]
# OPT-13B is the paper's example: 800 KB a token (section 3), so that seven requests of the longest
# kind fill what its weights leave. Llama 3 has 8 KV heads for 32 query heads, and so a quarter of
# the bytes of Llama 2.
#
# Why does it matter how many fit? Because the cache has changed what limits a step. To generate one
# token of one sequence, a model reads each of its weights once and does two operations with it, a
# multiplication and an addition: at 2 bytes a weight, one operation for each byte. An A100 computes
# 312 TFLOP/s (3.12e14 operations per second), but reads only 1.6 TB/s (1.6e12 bytes): 200
# operations in the time of one byte. So it waits for memory nearly all the time. (Operations for
# each byte are called *arithmetic intensity*.) If 50 sequences make a step together, the weights
# are read once for all of them. The keys and values are each sequence's own, and all of them must
# be read in every step. How much longer does the step take? The library has a cost model of such a
# server, which counts these bytes and the work of the host:

# %%
from minipaged.evaluation.sim.catalogue import DEPLOYMENTS
from minipaged.evaluation.sim.cost_model import CostModel

costs = CostModel(DEPLOYMENTS["opt-13b"])
for length in (300, 1000):
    one, fifty = (costs.step(n, n * length, 0, 0) for n in (1, 50))
    print(f"{length:5} tokens each: 50 sequences take {fifty / one:.1f} times as long as one")

# %% [markdown]
# That is why serving engines put requests together, which is
# [chapter 6](06_continuous_batching.md). The keys and values of all of them have to be in memory at
# once, and so memory decides how many run together.
#
# ## Check
#
# Rule 3: your attention gives the library's tokens, for stories of all lengths.

# %%
stories = [tell(num_facts=size, seed=size) for size in (1, 2, 4, 8, 16)]
prompts = [prompt(each, asked) for each in stories for asked in each.questions[:2]]


def answers(engine: LLM) -> list[str]:
    params = SamplingParams(temperature=0, max_tokens=12)
    outputs = engine.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


right_answers = answers(llm)
assert answers(yours) == right_answers
print(f"{len(prompts)} answers, the same with your attention")

# %% [markdown]
# Now two mistakes in the mask. In your own lines each would be a change of a few characters. The
# first takes the queries for the first tokens instead of the last: that makes no difference while a
# prompt is read, and all of it once there is a cache. The second is off by one, so that each token
# sees the next one.


# %%
def masked_by(sees: Callable[[int, int], Tensor]) -> Head:
    """Attention where queries see as many keys as `sees(queries, keys)` says."""

    def head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        behind = torch.arange(len(k)) >= sees(len(q), len(k))[:, None]
        scores = (q @ k.T / math.sqrt(k.shape[1])).masked_fill(behind, -torch.inf)
        return scores.softmax(dim=1) @ v, scores.softmax(dim=1)

    return head


mistakes = {
    "forgets the context": masked_by(lambda queries, keys: torch.arange(1, queries + 1)),
    "off by one": masked_by(lambda queries, keys: torch.arange(keys - queries + 2, keys + 2)),
}
for name, head_with_mistake in mistakes.items():
    given = answers(served_by(head_with_mistake)[0])
    wrong = [pair for pair in zip(right_answers, given, strict=True) if pair[0] != pair[1]]
    print(f"{name}: {len(wrong)} of {len(given)} answers differ")
    print(f"    {wrong[0][0]!r} became {wrong[0][1][:36]!r}")
    assert wrong, "the mistake was not noticed"

# %% [markdown]
# The first mistake is impossible to miss. The second hardly shows: a model that answers well does
# not prove that its attention is right. So rule 1 gets a check of its own, which needs no model:
# change the last token, and nothing may change before it.


# %%
def check_rule_1(name: str, head: Head) -> None:
    other_k, other_v = k.clone(), v.clone()
    other_k[-1] += 1
    other_v[-1] += 1
    before, after = head(q, k, v)[0][:-1], head(q, other_k, other_v)[0][:-1]
    assert torch.equal(before, after), f"{name}: a token sees one that comes after it"


check_rule_1("your attention", attention)
try:
    check_rule_1("off by one", mistakes["off by one"])
except AssertionError as error:
    print(error)
else:
    raise RuntimeError("the mistake was not noticed")

# %% [markdown]
# <details markdown="1"><summary>Your predictions</summary>
#
# Without a cache the model reads 344 tokens, then 345, and so on to 375: 11,504 in all. With one it
# reads 375: the prompt, and each generated token but the last. A token of storyteller takes 2 x 4 x
# 2 x 64 x 4 = 4,096 bytes, so 2,114 tokens are as large as the whole model: two texts of its full
# length. And 7 requests fit, with 5 % left for what a step computes.
#
# </details>
#
# ## Questions
#
# **Why are there keys and values in the cache, but no queries?**
#
# <details markdown="1"><summary>Answer</summary>
#
# A query is used once, by its own token, in the step that computes it. Keys and values are used by
# every token that comes later.
#
# </details>
#
# **Is the multiplication of the cache's rows with a new query free?**
#
# <details markdown="1"><summary>Answer</summary>
#
# No: $2nd$ multiplications a head and layer, and all $n$ keys and values must be read. So a token
# after a long text costs more than one after a short text, even with a cache. The work for a whole
# text still grows with the square of its length; without a cache it would grow with the cube.
#
# </details>
#
# **Would the cache still be right if tokens could see later ones?**
#
# <details markdown="1"><summary>Answer</summary>
#
# No. Each new token would then change what all earlier ones have computed, and their keys and
# values in every layer but the lowest. Everything would have to be computed again, for every token.
# It is rule 1 that makes rule 2 true.
#
# </details>
#
# ## Results

# %%
print(f"tokens read for 32 new ones: {read:,} without a cache, {prompt_len + 31} with one")
last = {name: multiplications[-1] for name, multiplications in work.items()}
print("multiplications for token 128 of one head: {:,} and {:,}".format(*last.values()))
print(f"kept for it, storyteller: {a_token:,} bytes a token, for as long as the request runs")

# %% [markdown]
# Next: [what happens if all that is reserved beforehand](02_the_memory_problem.md).
