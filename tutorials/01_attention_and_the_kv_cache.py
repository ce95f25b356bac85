# %% [markdown]
# # 1. Attention and why a KV cache
#
# Each new token attends to all tokens before it, and their keys and values never change, so the
# engine keeps them.
#
# **Needs** [chapter 0](00_first_run.md) · **Time** 40 minutes
#
# ![A new token attends to all tokens so far. Only its own key and value are new.](openings/01.svg)
#
# ## Goals
#
# - What attention computes, in eight lines that the engine then runs on.
# - Why a cache reduces the work per token from quadratic to linear in the length of the text.
# - How many bytes a token costs, and how they limit the requests that a GPU can serve.
#
# ## Invariants
#
# 1. A token attends to itself and to earlier tokens, never to later ones.
# 2. A token's keys and values therefore stay valid when later tokens arrive.
# 3. Generation with a cache gives exactly the same tokens as generation without one.
#
# ## Predict
#
# - A prompt has 344 tokens, and 32 are generated. How many tokens does the model read if it reads
#   the whole text for each new token? How many with a cache?
# - In each of its 4 layers, *storyteller* keeps 2 keys and 2 values per token, each of 64 elements
#   of 4 bytes. How much memory does a token take? The whole model takes 8.7 MB: how many tokens
#   take as much?
# - A model of 13 billion parameters takes 26 of the 38 GB that a GPU has for it, and 0.8 MB more
#   per token. How many requests of 2,048 tokens fit?
#
# ## Build it: attention in eight lines
#
# Inside a model a token is a *vector*, a row of numbers. Three learned matrices turn it into a
# *query* (what the token looks for), a *key* (what it can be found by) and a *value* (what it
# contributes). Attention compares the query with the key of every visible token, turns the results
# into weights that add up to one, and sums the values by these weights (section 2.1 of the paper):
#
# $$a_{ij} = \frac{\exp(q_i \cdot k_j / \sqrt{d})}{\sum_{t \le i} \exp(q_i \cdot k_t / \sqrt{d})},
# \qquad o_i = \sum_{j \le i} a_{ij} v_j$$
#
# The fraction is the *softmax* of the scores $q_i \cdot k_j / \sqrt{d}$. Here it is for one *head*,
# one set of queries, keys and values:

# %%
import math

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The queries are those of the last tokens, the keys and values those of all."""
    positions = torch.arange(len(k))
    of_queries = positions[len(k) - len(q) :]
    scores = q @ k.T / math.sqrt(k.shape[1])  # [queries, keys]
    later = positions > of_queries[:, None]
    scores = scores.masked_fill(later, -torch.inf)
    weights = scores.softmax(dim=1)  # exp(-inf) is 0: later tokens have no weight
    return weights @ v, weights


torch.manual_seed(0)
q, k, v = torch.randn(3, 6, 64, dtype=torch.float64)  # six tokens, d = 64
out, weights = attention(q, k, v)
print("from", tuple(q.shape), "to", tuple(out.shape), "with weights", tuple(weights.shape))

# %% [markdown]
# `later` is the *causal mask*. Masked fields of the picture are empty.
#
# Why divide by $\sqrt{d}$? The product of two vectors is a sum of $d$ terms, which has variance $d$
# if their elements have variance 1. Softmax of large scores gives nearly all weight to one key, and
# a model cannot learn from that. The division keeps the variance at 1:

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
# A model has several heads and concatenates their results. With *grouped-query attention*, a group
# of query heads shares one head of keys and values, a *KV head*, so the cache is smaller.
# storyteller has 4 query heads and 2 KV heads, so query head `h` reads KV head `h // 2`.
#
# ### Generate with and without a cache
#
# Here is the smallest model that generates: a table of vectors, three matrices, one head. It has
# learned nothing, so it talks nonsense, but it must always talk the same nonsense.

# %%
vocabulary, d = 300, 32
table, to_q, to_k, to_v = (
    torch.randn(rows, d, dtype=torch.float64) / math.sqrt(d) for rows in (vocabulary, d, d, d)
)


def likeliest(out: Tensor) -> int:
    """The token whose vector is most similar to the last row of attention's output."""
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
# `WithCache` is a *KV cache*: one key and one value per token, appended and never changed. We run
# both versions for 128 tokens, and PyTorch counts the multiplications.

# %% Multiplications for one more token, by the length of the text so far
from torch.utils.flop_counter import FlopCounterMode

cached, tokens = WithCache(), [0]
work: dict[str, list[int]] = {"without a cache": [], "with a cache": []}
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
print("tokens:", *tokens[:12], "...")

figure, axes = drawing.picture()
for name, multiplications in work.items():
    axes.plot(range(1, 129), multiplications, label=name)
axes.set(xscale="log", yscale="log", xlabel="tokens so far", ylabel="multiplications")
axes.legend()

# %% [markdown]
# The outputs agree to twelve digits, and the tokens are the same. After $n$ tokens, one more takes
# $3nd^2 + 2n^2d$ multiplications without a cache, which grows with the *square* of $n$. With a
# cache it takes $3d^2 + 2nd$. The work for a whole text grows with the square of its length instead
# of the cube.
#
# Could the version without a cache compute only the last row? With one layer, yes. With several,
# the keys of the second layer are computed from the results of the first for every token, so all
# rows are needed.
#
# ### Measure a real model
#
# To do without the engine's cache, we ask for one token at a time: each call is a new request that
# reads the whole text (if the prefix cache of chapter 8 is off).

# %%
import time

from minipaged import LLM, SamplingParams
from minipaged.evaluation.stories import prompt, tell

llm = LLM("storyteller", num_blocks=64, enable_prefix_caching=False)
long_story = tell(num_facts=30, seed=0)
text = prompt(long_story, long_story.questions[5])


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


llm.generate(text, greedy(1), use_tqdm=False)  # a warm-up: the first call is slow
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
print(f"tokens that the model reads: {read:,} without a cache, {prompt_len + 31} with one")
print(f"measured: {seconds_without / seconds_with:.0f} times as long without a cache")

# %% [markdown]
# The time differs less than the number of tokens read, because every step has a fixed cost, which
# is large for so small a model.
#
# ### Run the engine on your attention
#
# `Parts` replaces parts of the engine, here its attention by your eight lines. Keys are stored in
# blocks, and `gather` fetches those of a sequence in order (chapter 4). The rest loops over the
# sequences of a step (`spans`) and over their heads, and records the weights.

# %%
from collections.abc import Callable

from minipaged import Parts
from minipaged.attention.batch import Batch
from minipaged.attention.reference import gather

Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class InTheEngine:
    """Attention of a whole batch, by a function for one head."""

    def __init__(self, head: Head) -> None:
        self.head = head  # it computes 1 / sqrt(d) itself, so `scale` is unused
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
# `seen` has one entry per step and layer, with the weights of 4 heads. We draw what the last query
# attends to, for the head that gives most weight to the sentence with the answer:

# %% What one head of layer 1 attends to while the model answers; the fact's sentence is framed
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
axis.set_yticks(range(len(said)), [f"generates {word}" for word in said], fontsize=8)
axis.axvspan(fact.start - 0.5, fact.stop - 0.5, fill=False, edgecolor=drawing.COLOURS[0], lw=2)

# %% [markdown]
# The answer attends to the right sentence, although two others have the same form. But the query
# that generates *Dora* has nearly all its weight on `coin`, not on *Dora*. What did `coin` attend
# to one layer lower, in the step that read the prompt?

# %%
thing = fact.start + 6  # Dora the wren put the black coin
for below, weights in enumerate(watched.seen[0][:, thing]):  # layer 0, while it read the prompt
    found = int(weights.argmax())
    print(f"head {below}: {names[thing]!r} -> {names[found]!r:6} weight {weights[found]:.2f}")

# %% [markdown]
# Head 1 of layer 0 fetched *Dora*, so the vector that `coin` passes to layer 1 contains the name of
# the owner. This is why a cache must keep keys and values of *every layer*, and why they cannot be
# recomputed from a single token.
#
# ### The cost of a token
#
# A key and a value, for each layer and each KV head:
#
# @@ minipaged.config.ModelConfig.kv_bytes_per_token
#
# For storyteller with 4 bytes per element, and for larger models with 2:

# %% Gigabytes of keys and values for one request of 2,048 tokens; requests that fit in a GPU
from minipaged.evaluation.sim.catalogue import GPUS, MODELS

model = yours.engine.executor.runner.model
weight_bytes = 4 * sum(weight.numel() for weight in model.parameters())
a_token = model.config.kv_bytes_per_token(bytes_per_number=4)
print(
    f"storyteller: {a_token:,} bytes per token; the weights are as large as "
    f"{weight_bytes / a_token:,.0f} tokens"
)

served = {name: MODELS[name] for name in ("opt-13b", "llama-2-7b", "llama-3-8b")}
room = 0.95 * GPUS["a100-40g"].memory_bytes  # the rest is for activations
requests: dict[str, float] = {}
for name, model in served.items():
    request_bytes = 2048 * model.kv_bytes_per_token
    requests[name] = (room - model.weight_bytes) // request_bytes
    print(
        f"{name:11} {model.kv_bytes_per_token / 1024:4.0f} KB per token, "
        f"{request_bytes / 1e9:.2f} GB per request, weights {model.weight_bytes / 1e9:.1f} GB: "
        f"{requests[name]:.0f} requests fit"
    )

figure, (left, right) = drawing.picture(ncols=2)
sizes = [2048 * model.kv_bytes_per_token / 1e9 for model in served.values()]
left.bar(list(served), sizes)
left.set(title="one request of 2,048 tokens", ylabel="GB of keys and values")
right.bar(list(served), list(requests.values()), color=drawing.COLOURS[1])
right.set(title="on an A100 with 40 GB", ylabel="requests that fit")

# %% [markdown]
# OPT-13B is the paper's example: a token takes 800 KB (section 3), so seven requests of the maximum
# length fill the memory that its weights leave. Llama 3 has 8 KV heads for 32 query heads, so its
# tokens take a quarter of the bytes of Llama 2's.
#
# Why does it matter how many fit? To generate a token of one sequence, a model reads each weight
# once and does two operations with it, a multiplication and an addition. At 2 bytes per weight,
# that is one operation per byte, its *arithmetic intensity*. An A100 computes 3.12e14 operations
# per second (312 TFLOP/s) but reads only 1.6e12 bytes, so it could do 200 operations per byte. It
# waits for memory nearly all the time. If 50 sequences share a step, the weights are read once for
# all, and only the keys and values are read for each. How much longer does such a step take? The
# library's cost model counts these bytes and the work of the host CPU:

# %%
from minipaged.evaluation.sim.catalogue import DEPLOYMENTS
from minipaged.evaluation.sim.cost_model import CostModel

costs = CostModel(DEPLOYMENTS["opt-13b"])
for length in (300, 1000):
    one, fifty = (costs.step(n, n * length, 0, 0) for n in (1, 50))
    print(f"{length:5} tokens each: a step of 50 takes {fifty / one:.1f} times as long as of one")

# %% [markdown]
# Fifty tokens take only two to three times as long as one, so engines batch requests (chapter 6).
# Memory limits the batch, since it must hold the keys and values of all.
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
# Now we make two mistakes in the mask. The first takes the queries for the first tokens instead of
# the last. This makes no difference while a prompt is read, but breaks everything once there is a
# cache. The second is off by one: each token sees the next one.


# %%
def masked_by(sees: Callable[[int, int], Tensor]) -> Head:
    """Attention in which query i sees the first `sees(queries, keys)[i]` keys."""

    def head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        later = torch.arange(len(k)) >= sees(len(q), len(k))[:, None]
        scores = (q @ k.T / math.sqrt(k.shape[1])).masked_fill(later, -torch.inf)
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
# The second mistake hardly shows: good answers do not prove that attention is right. Rule 1
# therefore gets its own check, without a model: if the last token changes, no earlier result may
# change.


# %%
def check_rule_1(name: str, head: Head) -> None:
    other_k, other_v = k.clone(), v.clone()
    other_k[-1] += 1
    other_v[-1] += 1
    before, after = head(q, k, v)[0][:-1], head(q, other_k, other_v)[0][:-1]
    assert torch.equal(before, after), f"{name}: a token sees a later one"


check_rule_1("your attention", attention)
try:
    check_rule_1("off by one", mistakes["off by one"])
except AssertionError as error:
    print(error)
else:
    raise RuntimeError("the mistake was not noticed")

# %% [markdown]
# ### Exercise: a cache for two layers
#
# Here is the small model with two layers. `next_row` computes only the newest token, but overwrites
# the cache, so the token attends only to itself. Keep the keys and values of the earlier tokens in
# `cache[layer]`, and use them. Then run this cell and the next one again.

# %%
layers = [torch.randn(3, d, d, dtype=torch.float64) / math.sqrt(d) for _ in range(2)]
Cache = list[tuple[Tensor, Tensor]]  # for each layer keys and values: [tokens, d]


def empty_cache() -> Cache:
    return [(torch.empty(0, d, dtype=torch.float64),) * 2 for _ in layers]


def next_row(token: int, cache: Cache) -> Tensor:
    """Compute one new token, and add its keys and values to the cache: [1, d]."""
    x = table[[token]]
    for layer, (to_q, to_k, to_v) in enumerate(layers):
        k, v = x @ to_k, x @ to_v  # your turn
        cache[layer] = k, v
        x = x + attention(x @ to_q, k, v)[0]
    return x


# %%
def without_cache(tokens: list[int]) -> Tensor:
    """All tokens through both layers; the last row: [1, d]."""
    x = table[tokens]
    for to_q, to_k, to_v in layers:
        x = x + attention(x @ to_q, x @ to_k, x @ to_v)[0]
    return x[-1:]


def check_exercise(next_row) -> bool:
    """Compare with the model without a cache, for two texts that take turns."""
    texts = [[3, 1, 4, 1, 5, 9, 2, 6], [27, 18, 28, 18, 28, 45, 90, 45]]
    caches = [empty_cache() for _ in texts]
    errors = []
    for length in range(1, 9):
        for text, cache in zip(texts, caches, strict=True):
            yours, expected = next_row(text[length - 1], cache), without_cache(text[:length])
            errors.append(math.inf if yours is None else float((yours - expected).abs().max()))
    first_wrong = next((i // 2 for i, each in enumerate(errors) if not each < 1e-9), None)
    print(f"largest error, yours: {max(errors):.0e}; expected: below 1e-09")
    if first_wrong is not None:
        print(f"the first wrong token is number {first_wrong + 1} of 8")
    shapes = [[tuple(part.shape) for part in pair] for pair in caches[0]]
    print(f"cache after 8 tokens, yours:    {shapes}")
    print(f"                      expected: {[[(8, d), (8, d)]] * 2}")
    return first_wrong is None and shapes == [[(8, d), (8, d)]] * 2


print("solved" if check_exercise(next_row) else "not solved yet")

# %% [markdown]
# <details markdown="1"><summary>Hint</summary>
#
# `WithCache` does the same for one layer: append first, then attend. The keys of layer 1 are made
# from `x` as layer 0 has left it, so each layer needs its own cache.
#
# </details>
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# def next_row(token: int, cache: Cache) -> Tensor:
#     """Compute one new token, and add its keys and values to the cache: [1, d]."""
#     x = table[[token]]
#     for layer, (to_q, to_k, to_v) in enumerate(layers):
#         old_k, old_v = cache[layer]
#         k, v = torch.cat([old_k, x @ to_k]), torch.cat([old_v, x @ to_v])
#         cache[layer] = k, v
#         x = x + attention(x @ to_q, k, v)[0]
#     return x
# ```
#
# </details>
#
# <details markdown="1"><summary>Your predictions</summary>
#
# Without a cache the model reads 344 tokens, then 345, and so on to 375: 11,504 in all. With a
# cache it reads 375: the prompt, and each generated token but the last. A token of storyteller
# takes 2 x 4 x 2 x 64 x 4 = 4,096 bytes, so 2,114 tokens take as much as the model. On the GPU 7
# requests fit.
#
# </details>
#
# ## Questions
#
# **Why are there keys and values in the cache, but no queries?**
#
# <details markdown="1"><summary>Answer</summary>
#
# A query is used once, in the step that computes it. Keys and values are used by every later token.
#
# </details>
#
# **Would the cache still be right if tokens could see later ones?**
#
# <details markdown="1"><summary>Answer</summary>
#
# No. Each new token would change the results of all earlier tokens, and their keys and values in
# every layer but the lowest. Rule 1 makes rule 2 true.
#
# </details>
#
# ## Results

# %%
print(f"tokens read for 32 new ones: {read:,} without a cache, {prompt_len + 31} with one")
last = {name: multiplications[-1] for name, multiplications in work.items()}
print("multiplications for token 128 of one head: {:,} and {:,}".format(*last.values()))
print(f"cache of storyteller: {a_token:,} bytes per token, for as long as the request runs")

# %% [markdown]
# Next: [what happens if a server reserves all this memory beforehand](02_the_memory_problem.md).
