# %% [markdown]
# # 5. Models on pages
#
# A LLaMA and a GPT over blocks: only two lines of the model know about blocks; everything else
# works on rows of tokens.
#
# ## Goals
#
# - How tokens of several sequences, prompts and single ones, form one row without padding.
# - Where their keys and values go, and how the tensor of all blocks is laid out.
# - What a LLaMA and a GPT-2 do differently, and why paging does not care.
#
# ## Invariants
#
# 1. A token's logits depend only on its own sequence, not on the others in the step.
# 2. A key is in the slot of its position before attention reads it, and is not touched again.
# 3. Two functions know about blocks, `store_kv` and `paged_attention`. Everything else works on
#    rows, independently.
#
# ## Predict
#
# Blocks have 4 slots. A step computes one more token of A, one more of C, and 5 tokens from the
# middle of B's prompt.
#
# - How many rows does the model compute? How many, if the three were padded to one length? For how
#   many rows are logits wanted?
# - C's new token is its tenth, and its blocks are 2, 3 and 5. In which slot do its key and value
#   go?
# - The embedded model has 4 layers, 2 KV heads and 64 elements per head, of 4 bytes each. How many
#   bytes does a token take in the pool?
#
# ## Build it
#
# ### One row of tokens
#
# A model's `forward` receives four things: `token_ids`, `positions`, the cache and a *batch*. There
# is no padding in it and no attention mask. The tokens to compute form one row, sequence after
# sequence. Here is such a step, made by the library's own `BatchBuilder`. A and C are those of
# chapter 3, each with one more word; B comes with a long prompt, of which three words were computed
# before.

# %%
from minipaged.attention.batch import BatchBuilder
from minipaged.memory import BlockTable
from minipaged.scheduler.output import SequenceInput

words = {
    "A": "four score and seven years ago our fathers brought forth on".split(),
    "C": "once upon a time there was a small frog who".split(),
    "B": "it was the best of times it was the worst of times".split(),
}
tables = {"A": [0, 1, 4], "C": [2, 3, 5], "B": [6, 7, 8]}
computed = {"A": 10, "C": 9, "B": 3}
new = {"A": 1, "C": 1, "B": 5}
vocabulary = sorted({word for text in words.values() for word in text})

queries = []
for seq_id, name in enumerate(words):
    start, stop = computed[name], computed[name] + new[name]
    token_ids = [vocabulary.index(word) for word in words[name][start:stop]]
    samples = stop == len(words[name])  # B's prompt goes on: no token comes after it yet
    table = BlockTable(4, tables[name], len(words[name]))
    queries.append(SequenceInput(seq_id, token_ids, start, table.blocks, num_logits=int(samples)))
batch = BatchBuilder(max_num_seqs=4, max_blocks_per_seq=4, block_size=4).build(queries)

row = [vocabulary[token] for token in batch.token_ids]
print("words       ", *(f"{word:>6}" for word in row))
print("positions   ", *(f"{position:6}" for position in batch.positions))
print("slots       ", *(f"{slot:6}" for slot in batch.slot_mapping))
print("cu_seqlens_q", batch.cu_seqlens_q.tolist(), "  context_lens", batch.context_lens.tolist())
print("logit_rows  ", batch.logit_rows.tolist())

# %% Above the row of seven tokens, below the pool; framed: the slots that this step fills
import drawing

contents, owners = {}, {}
for name, blocks in tables.items():
    so_far = words[name][: computed[name] + new[name]]
    for logical, physical in enumerate(blocks):
        contents[physical], owners[physical] = so_far[4 * logical : 4 * logical + 4], name

figure, (above, below) = drawing.picture(7.2, 3.3, nrows=2, height_ratios=(1, 2.4))
drawing.blocks(below, contents, owners, num_blocks=9, block_size=4, columns=3)
owner_of_row = [name for name in words for _ in range(new[name])]
for number, slot in enumerate(batch.slot_mapping.tolist()):
    colour = drawing.COLOURS[ord(owner_of_row[number]) - ord("A")]
    above.barh(0, 1, left=number, color=colour, edgecolor=drawing.GREY)
    place = f"position {batch.positions[number]}\nslot {slot}"
    above.text(number + 0.5, 0, row[number], ha="center", va="center", color=drawing.ink(colour))
    above.text(number + 0.5, -0.5, place, ha="center", va="top", fontsize=8)
    line, column = divmod(slot // 4, 3)
    frame = drawing.Rectangle((5.2 * column + slot % 4, -1.25 * line - 1), 1, 1, fill=False)
    frame.set(edgecolor=drawing.COLOURS[5], linewidth=2.5)
    below.add_patch(frame)
above.set(xlim=(0, 7), ylim=(-1.3, 0.45))
above.axis("off")

# %% [markdown]
# A matrix times seven rows is one multiplication, whichever sequences the rows belong to. Norms,
# activations and matrices treat each row separately. Only attention looks at other rows' tokens,
# and it finds them in the pool.
#
# B samples nothing in this step: its prompt goes on. The scores of all words of the vocabulary, the
# *logits*, are computed for the two rows that sample and no others. This is how a step is run; its
# first lines move blocks, which chapters 7 and 9 are about:
#
# @@ minipaged.worker.model_runner.ModelRunner.run
#
# ### One tensor for all keys and values
#
# The pool is one tensor for all layers: `[layers, 2, num_blocks, kv_heads, block_size, head_dim]`.
# The 2 is for keys and values. A block number means the same place in every layer, so one table
# serves all of them, and a block is copied or swapped for all layers at once.

# %%
from minipaged import LLM

llm = LLM("storyteller", num_blocks=64, block_size=16)
cache, config = llm.engine.executor.runner.kv_cache, llm.engine.executor.runner.model.config
(k, v), last = cache.layers[0], cache.layers[-1][1]
print(len(cache.layers), "layers; keys of one:", list(k.shape))
assert k.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
num_bytes = k.untyped_storage().nbytes()
print(f"{num_bytes:,} bytes in one piece, {num_bytes // (64 * 16):,} a token")

# %% One block of 8 slots in memory: to which head each vector belongs, in two orders
figure, axes = drawing.picture(7.2, 1.5)
orders = {"head first (here)": "0" * 8 + "1" * 8, "token first": "01" * 8}
drawing.strips(axes, orders, {"0": "keys of head 0", "1": "keys of head 1"})
axes.set_xticks([])

# %% [markdown]
# Within a block the heads come before the slots. So the keys of one head in one block are adjacent,
# a matrix of `block_size` rows, and attention multiplies a query with all of them in place. The
# price is paid by the writer: a new token's key is cut into its heads, which go to different
# places. A token is written once and read in every later step.
#
# ### Positions as angles
#
# In a row that mixes sequences, a token's place in the row says nothing. So each brings its
# position. GPT-2 has a vector for every position, which it learned, and adds it to the token's.
# LLaMA *turns* queries and keys (rotary positions, RoPE). It takes the elements of a head in pairs,
# each a point in a plane, and turns pair $i$ at position $p$ by the angle $p\,\theta^{-2i/d}$. In
# complex numbers it is one multiplication:

# %%
import torch
from torch import Tensor


def turn(x: Tensor, positions: Tensor, theta: float = 500_000.0) -> Tensor:
    """Turn each pair of elements by the angle of its position: [tokens, heads, head_dim]."""
    half = x.shape[-1] // 2  # element i is paired with element i + half
    angles = positions[:, None, None] * theta ** (-torch.arange(half) / half)
    points = torch.complex(x[..., :half], x[..., half:])
    turned = points * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


random = torch.Generator().manual_seed(0)
q, k = torch.randn(2, 1, 1, 64, generator=random)  # one token, one head each


def score(query_position: int, key_position: int) -> float:
    at = torch.tensor([query_position]), torch.tensor([key_position])
    return float((turn(q, at[0]) * turn(k, at[1])).sum())


for position in (3, 10, 100, 900):
    print(f"query at {position:3}, key 3 before it: score {score(position, position - 3):.4f}")
    assert abs(score(position, position - 3) - score(3, 0)) < 1e-2

# %% Left: two pairs at positions 0 to 5; right: the score of a query and a key by their distance
figure, (left, right) = drawing.picture(7.2, 3.0, ncols=2, width_ratios=(2, 3))
for pair, radius in ((0, 1.0), (4, 0.6)):
    angles = torch.arange(6) * 500_000.0 ** (-pair / 32)
    x, y = radius * angles.cos(), radius * angles.sin()
    left.plot(x, y, "o", color=drawing.COLOURS[pair // 4], label=f"pair {pair}")
    for position in range(6) if pair == 0 else (0, 5):
        left.text(1.17 * x[position], 1.17 * y[position], position, ha="center", va="center")
left.set(aspect="equal", xlim=(-1.2, 1.2), ylim=(-1.2, 1.2))
left.axis("off")
left.legend(fontsize=8, loc="upper left", bbox_to_anchor=(-0.2, 1.1))
distances = range(64)
far, near = ([score(start, start - d) for d in distances] for start in (900, 63))
right.plot(distances, far, color=drawing.COLOURS[4], lw=4, label="query at 900")
right.plot(distances, near, color=drawing.COLOURS[5], ls=":", label="query at 63")
right.set(xlabel="distance", ylabel="score")
right.legend()

# %% [markdown]
# Both were turned, so the product of a query and a key depends on their distance, and on nothing
# else. That is why a key can be turned once, when it is stored: its position is not needed later.
#
# ### A LLaMA of your own
#
# Now the model, with weights from the embedded one. Their names are those of the library's modules;
# `qkv_proj` holds the matrices for queries, keys and values one below the other, `gate_up_proj` two
# of the feed-forward's. (On a CPU the library packs matrices of $2^{18}$ elements and more in a
# form of its own. Those of the embedded model are smaller.)

# %%
import torch.nn.functional as F

from minipaged.attention.backend import reference_paged_attention
from minipaged.attention.batch import Batch
from minipaged.attention.kv_cache import KVCache, KVPair
from minipaged.models.base import Model


class OwnLlama:
    """A LLaMA over paged keys and values: embedding, layers, norm, and logits when wanted."""

    def __init__(self, model: Model) -> None:
        self.config = model.config
        self.weights = dict(model.named_parameters())

    def __call__(
        self, token_ids: Tensor, positions: Tensor, kv_cache: KVCache, batch: Batch
    ) -> Tensor:
        x = self.weights["embedding.weight"][token_ids]  # [tokens, hidden]
        for number, kv in enumerate(kv_cache.layers):
            here = f"layers.{number}."
            normed = self.norm(x, here + "attention_norm")
            x = x + self.attention(normed, here + "attention.", positions, kv, batch)
            normed = self.norm(x, here + "mlp_norm")
            gate, up = self.times(normed, here + "mlp.gate_up_proj").chunk(2, dim=-1)
            x = x + self.times(F.silu(gate) * up, here + "mlp.down_proj")  # SwiGLU
        return self.norm(x, "norm")

    def attention(
        self, x: Tensor, here: str, positions: Tensor, kv: KVPair, batch: Batch
    ) -> Tensor:
        c = self.config
        qkv = self.times(x, here + "qkv_proj").unflatten(-1, (-1, c.head_dim))
        q, k, v = qkv.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=1)
        q, k = self.place(q, k, positions)
        self.store(k, kv[0], batch.slot_mapping)
        self.store(v, kv[1], batch.slot_mapping)
        out = reference_paged_attention(q, *kv, batch, c.head_dim**-0.5)
        return self.times(out.flatten(1), here + "o_proj")

    def place(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return turn(q, positions), turn(k, positions)

    def store(self, new: Tensor, cache: Tensor, slots: Tensor) -> None:
        block_size = cache.shape[2]
        cache[slots // block_size, :, slots % block_size] = new

    def norm(self, x: Tensor, name: str) -> Tensor:  # RMSNorm: divide by the root mean square
        root = (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return x / root * self.weights[name + ".weight"]

    def times(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[name + ".weight"].T

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weights["embedding.weight"].T  # the output matrix is the embedding's


# %% [markdown]
# A model is not a role of `Parts`; the `ModelRunner` gets it. Steps compute at most 40 tokens, so
# that prompts are cut and share steps with decodes. We record each step's message to the runner, a
# `StepInput`, and its logits.

# %%
from minipaged import SamplingParams
from minipaged.evaluation.stories import prompt, tell
from minipaged.scheduler.output import StepInput

greedy = SamplingParams(temperature=0, max_tokens=24)
stories = [tell(num_facts=size, seed=size) for size in (1, 2, 3, 4, 6, 8)]
prompts = [prompt(story, story.questions[0]) for story in stories]


def serve(choose_model) -> tuple[list[list[int]], list[tuple[StepInput, Tensor]]]:
    """Tokens of all requests, and every step's message and logits."""
    llm = LLM("storyteller", num_blocks=64, max_num_seqs=8, max_num_batched_tokens=40)
    executor, steps = llm.engine.executor, []
    executor.runner.model, run = choose_model(executor.runner.model), executor.run

    def noted(step: StepInput) -> Tensor:
        steps.append((step, run(step)))
        return steps[-1][1]

    executor.run = noted
    outputs = llm.generate(prompts, greedy, use_tqdm=False)
    assert llm.engine.scheduler.memory.num_free == 64
    return [output.outputs[0].token_ids for output in outputs], steps


tokens, steps = serve(lambda model: model)
own_tokens, own_steps = serve(OwnLlama)
assert own_tokens == tokens
furthest = max(
    float((mine - theirs).abs().max())
    for (_, mine), (_, theirs) in zip(own_steps, steps, strict=True)
    if len(theirs)
)
new_tokens = [[len(seq.token_ids) for seq in step.sequences] for step, _ in steps]
mixed = sum(min(counts) == 1 < max(counts) for counts in new_tokens)
print(f"{len(steps)} steps, {mixed} of them mixed; same tokens; logits differ by {furthest:.0e}")
assert furthest < 1e-4

# %% [markdown]
# Yours is a LLaMA, on pages, in a serving engine. The library's attention is this; find your lines
# in it:
#
# @@ minipaged.models.llama.Attention.forward
#
# ### And a GPT
#
# GPT-2 has the same structure with other parts:
#
# | | GPT-2 | LLaMA |
# |---|---|---|
# | norm | LayerNorm: less the mean, by the deviation | RMSNorm: by the root mean square |
# | position | a learned vector, added at the beginning | RoPE: an angle, in every layer |
# | KV heads | as many as query heads | as many (Llama 1), or fewer (grouped-query attention) |
# | feed-forward | two matrices, GELU between | SwiGLU: three, one the gate of another |
# | biases | everywhere | none |
#
# (GELU and SiLU are smooth variants of ReLU.) Its attention is the same except for the turning:
#
# @@ minipaged.models.layers.MultiHeadAttention.forward
#
# The pool needs three numbers from a model: layers, KV heads, and elements per head. To see that
# this is all, take a GPT-2 with random weights, and build an engine around it by hand. Random
# weights produce gibberish, but they make a stricter test: any bug changes the output.

# %%
from minipaged.attention.backend import BACKENDS
from minipaged.config import EngineConfig
from minipaged.engine.llm_engine import LLMEngine
from minipaged.engine.parts import Parts
from minipaged.models.gpt2 import GPT2, GPT2Config
from minipaged.worker.executor import UniExecutor
from minipaged.worker.model_runner import ModelRunner

numbers = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 12}
sizes = {"hidden_size": 48, "inner_size": 192, "vocab_size": 101, "max_position_embeddings": 128}
torch.manual_seed(0)
gpt2 = GPT2(GPT2Config(architecture="GPT2LMHeadModel", **numbers, **sizes), BACKENDS["torch"])
for parameter in gpt2.layers.parameters():
    parameter.data *= 4  # with the default initialisation, layers barely change their input
some_prompts = [[(7 * i + n) % 101 for i in range(n)] for n in (3, 17, 40)]


def gpt2_tokens(block_size: int, num_blocks: int) -> dict[str, list[int]]:
    config = EngineConfig(
        num_blocks=num_blocks,
        num_swap_blocks=0,
        block_size=block_size,
        max_model_len=128,
        max_num_batched_tokens=512,
        enable_prefix_caching=True,
    )
    cache = KVCache.build(gpt2.config, config, torch.float32, "cpu")
    batches = BatchBuilder(config.max_num_seqs, config.max_blocks_per_seq, block_size)
    runner = ModelRunner(gpt2, BACKENDS["torch"], cache, batches)
    executor = UniExecutor(runner)
    engine = LLMEngine(config, lambda: Parts().build_scheduler(config), executor, tokenizer=None)
    for number, token_ids in enumerate(some_prompts):
        engine.add_request(f"prompt {number}", token_ids, greedy)
    tokens = {}
    while engine.has_unfinished_requests():
        for progress in engine.step():
            tokens[progress.request_id] = progress.output().outputs[0].token_ids
    assert engine.memory.num_free == num_blocks
    return tokens


in_one_piece = gpt2_tokens(block_size=128, num_blocks=3)  # one block holds a whole sequence
for block_size, num_blocks in ((1, 150), (4, 40), (16, 12)):
    assert gpt2_tokens(block_size, num_blocks) == in_one_piece
    print(f"blocks of {block_size:2}: the tokens of a GPT-2 whose sequences are contiguous")
print(in_one_piece["prompt 0"][:12], "...")

# %% [markdown]
# ## Check
#
# Your LLaMA gave the library's tokens, and its logits within 1e-4. Here are three mistakes that are
# easily made when a model is moved to pages:


# %%
class PositionsRestart(OwnLlama):
    def __call__(
        self, token_ids: Tensor, positions: Tensor, kv_cache: KVCache, batch: Batch
    ) -> Tensor:
        positions = torch.cat([torch.arange(span.query_len) for span in batch.spans])
        return super().__call__(token_ids, positions, kv_cache, batch)


class SlotsOffByOne(OwnLlama):
    def store(self, new: Tensor, cache: Tensor, slots: Tensor) -> None:
        super().store(new, cache, (slots + 1) % (cache.shape[0] * cache.shape[2]))


class KeysStoredUnturned(OwnLlama):
    def place(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return turn(q, positions), k


for mistake in (PositionsRestart, SlotsOffByOne, KeysStoredUnturned):
    wrong, _ = serve(mistake)
    same = sum(mine == theirs for mine, theirs in zip(wrong, tokens, strict=True))
    print(f"{mistake.__name__:19}{same} of 6 answers are right")
    assert wrong != tokens, f"{mistake.__name__} was not noticed"

# %% [markdown]
# <details markdown="1"><summary>Your predictions</summary>
#
# Seven rows instead of the fifteen of three padded sequences, and logits for two of them. C's tenth
# token has position 9: logical block 2, offset 1, so physical block 5, slot 21. A token takes
# $2 \cdot 4 \cdot 2 \cdot 64 \cdot 4 = 4096$ bytes.
#
# </details>
#
# ## Questions
#
# **Why does the model get `positions`, when the batch knows every sequence's context already?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Because the model works on rows. For each row it needs one number, whether from a prompt or a
# decode. `BatchBuilder` computes it once per step; that file has all index arithmetic of the
# library.
#
# </details>
#
# **With learned positions, what would a mistake like `PositionsRestart` do to the keys in the
# pool?**
#
# <details markdown="1"><summary>Answer</summary>
#
# It would spoil them too. The position's vector is added to the token's at the beginning, so it is
# in everything that the layers compute, keys and values included. They would be stored wrong, and
# stay so as long as the sequence runs.
#
# </details>
#
# **Two sequences with a common prefix are to share a block (chapter 7). Does RoPE allow it?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Yes, since the tokens in it have the same positions in both. The same text in the *middle* of two
# sequences would have been turned by other angles, and cannot be shared.
#
# </details>
#
# ## Results

# %%
computed_rows = sum(sum(counts) for counts in new_tokens)
padded = sum(len(counts) * max(counts) for counts in new_tokens)
with_logits = sum(len(logits) for _, logits in steps)
print(f"rows computed for 6 requests   {computed_rows:6,}")
print(f"had each step been padded      {padded:6,}")
print(f"rows with logits               {with_logits:6,}")
print(f"bytes per token, 2 KV heads    {config.kv_bytes_per_token(4):6,}")
print(f"bytes per token, 4 KV heads    {2 * config.kv_bytes_per_token(4):6,}")

# %% [markdown]
# Next: [which sequences run in which step](06_continuous_batching.md).
