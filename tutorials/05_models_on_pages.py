# %% [markdown]
# # 5. Models on pages
#
# A LLaMA and a GPT keep their keys and values in blocks: two lines of the model deal with blocks,
# and everything else works on rows of tokens.
#
# **Needs** [chapter 4](04_paged_attention.md) · **Time** 35 minutes
#
# ![Only two lines of a layer deal with blocks. The rest works on rows of tokens.](openings/05.svg)
#
# ## Goals
#
# - How the tokens of several sequences, prompts and decodes, form one batch without padding.
# - Where their keys and values go, and how the tensor of all blocks is laid out.
# - How LLaMA and GPT-2 differ, and why paging treats them alike.
#
# ## Invariants
#
# 1. The *logits* of a token, the scores of all possible next tokens, depend only on its own
#    sequence, not on the others in the step.
# 2. A key is in the slot of its position before attention reads it, and does not change afterwards.
# 3. Only two functions deal with blocks, `store_kv` and `paged_attention`. Everything else treats
#    each token independently.
#
# ## Predict
#
# Blocks have 4 slots. A step computes one more token of A, one more of C, and 5 tokens from the
# middle of B's prompt.
#
# - How many tokens does the model compute? How many, if all three were padded to the same length?
#   For how many does it need logits?
# - C's new token is its tenth, and its blocks are 2, 3 and 5. In which slot are its key and value
#   stored?
# - storyteller has 4 layers, 2 KV heads and 64 elements per head, of 4 bytes each. How many bytes
#   does a token take in the pool?
#
# ## Build it
#
# ### One row of tokens
#
# A model's `forward` receives `token_ids`, `positions`, the cache and a *batch*. The tokens of a
# step form one flat row, sequence after sequence, without padding or attention mask. Here is such a
# step, built by the library's `BatchBuilder`. A and C are the sequences of chapter 3, each with one
# more word. B has a long prompt, whose first three words were computed in an earlier step.

# %%
from minipaged.attention.batch import BatchBuilder
from minipaged.scheduler.output import SequenceInput

words = {
    "A": "four score and seven years ago our fathers brought forth on".split(),
    "C": "once upon a time there was a small frog who".split(),
    "B": "it was the best of times it was the worst of times".split(),
}
tables = {"A": [0, 1, 4], "C": [2, 3, 5], "B": [6, 7, 8]}
computed, new = {"A": 10, "C": 9, "B": 3}, {"A": 1, "C": 1, "B": 5}

row, sequences = [], []
for seq_id, name in enumerate(words):
    start, stop = computed[name], computed[name] + new[name]
    row += words[name][start:stop]
    tokens = [0] * new[name]  # any numbers: nothing is computed
    samples = stop == len(words[name])  # B's prompt goes on
    sequences.append(SequenceInput(seq_id, tokens, start, tables[name], num_logits=int(samples)))
batch = BatchBuilder(max_num_seqs=4, max_blocks_per_seq=4, block_size=4).build(sequences)
print("words       ", *(f"{word:>6}" for word in row))
print("positions   ", *(f"{position:6}" for position in batch.positions))
print("slots       ", *(f"{slot:6}" for slot in batch.slot_mapping))
print("cu_seqlens_q", batch.cu_seqlens_q.tolist(), "  context_lens", batch.context_lens.tolist())
print("logit_rows  ", batch.logit_rows.tolist())

# %% The pool after this step; framed: the slots that it fills
import drawing

contents, owners = {}, {}
for name, blocks in tables.items():
    so_far = words[name][: computed[name] + new[name]]
    for logical, physical in enumerate(blocks):
        contents[physical], owners[physical] = so_far[4 * logical : 4 * logical + 4], name

figure, axes = drawing.picture(7.2, 2.3)
drawing.blocks(axes, contents, owners, num_blocks=9, block_size=4, columns=3)
for slot in batch.slot_mapping.tolist():
    line, column = divmod(slot // 4, 3)
    frame = drawing.Rectangle((5.2 * column + slot % 4, -1.25 * line - 1), 1, 1, fill=False)
    frame.set(edgecolor=drawing.COLOURS[5], linewidth=2.5)
    axes.add_patch(frame)

# %% [markdown]
# `slots` has the slot of each token's key and value. `cu_seqlens_q` has the borders between the
# sequences, and `logit_rows` the rows that need logits: B generates nothing yet, because its prompt
# is not complete.
#
# A matrix multiplies all seven rows at once. Norms, activations and linear layers treat each row
# separately. Only attention uses other tokens, and it reads those from the pool. The function that
# runs a step first moves blocks (chapters 7 and 9):
#
# @@ minipaged.worker.model_runner.ModelRunner.run
#
# ### One tensor for all keys and values
#
# The pool is one tensor for all layers: `[layers, 2, num_blocks, kv_heads, block_size, head_dim]`.
# The 2 is for keys and values. A block has the same number in every layer, so one table serves all
# layers, and a block is copied or swapped for all layers at once.

# %%
from minipaged import LLM

llm = LLM("storyteller", num_blocks=64, block_size=16)
cache = llm.engine.executor.runner.kv_cache
k, _ = cache.layers[0]
print(len(cache.layers), "layers; keys of one:", list(k.shape))
num_bytes = k.untyped_storage().nbytes()
print(f"{num_bytes:,} bytes in one allocation, {num_bytes // (64 * 16):,} per token")

# %% [markdown]
# Within a block the heads come before the slots. The keys of one head are therefore adjacent: a
# matrix of `block_size` rows, which attention multiplies in place. The heads of a new key are
# stored in different places, but a token is written once and read in every later step.
#
# ### A LLaMA of your own
#
# Each layer of the model normalises its input, applies attention, and adds the result to its input.
# It then does the same with a *feed-forward* part, which works on each token alone. The weights are
# those of storyteller, under the names of the library's modules. `qkv_proj` stacks the matrices of
# queries, keys and values, and `gate_up_proj` two of the feed-forward part.
#
# The index of a token in a flat row is not its position, so the model receives `positions`. LLaMA
# encodes them as rotations of queries and keys (*rotary position embedding*, RoPE). We use the
# library's `rotate`; the [appendix](#appendix-positions-as-angles) builds it.

# %%
import torch
import torch.nn.functional as F
from torch import Tensor

from minipaged.attention.backend import reference_paged_attention
from minipaged.attention.batch import Batch
from minipaged.attention.kv_cache import KVCache, KVPair
from minipaged.models.llama import Llama
from minipaged.models.rope import rotate


class OwnLlama:
    """A LLaMA over paged keys and values."""

    def __init__(self, model: Llama) -> None:
        self.config, self.rotary = model.config, model.rotary
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
        cos, sin = self.rotary(positions, q.dtype)
        return rotate(q, cos, sin), rotate(k, cos, sin)

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
# The library chooses the model by its checkpoint, so we replace it in the `ModelRunner`. At most 40
# tokens per step cut prompts into chunks, which share steps with decodes. We record each step's
# message to the runner, a `StepInput`, and its logits.

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
print(f"same tokens in {len(steps)} steps; logits differ by {furthest:.0e}")
assert furthest < 1e-4

# %% [markdown]
# Your LLaMA runs on pages in a serving engine. Find your lines in the library's attention:
#
# @@ minipaged.models.llama.Attention.forward
#
# ### And a GPT
#
# GPT-2 has the same structure with other parts:
#
# | | GPT-2 | LLaMA |
# |---|---|---|
# | norm | LayerNorm: mean and deviation | RMSNorm: root mean square only |
# | position | a learned vector, added to the embedding | RoPE: a rotation in every layer |
# | KV heads | as many as query heads | as many (Llama 1), or fewer (grouped-query attention) |
# | feed-forward | two matrices with GELU between them | SwiGLU: three matrices, one is a gate |
# | biases | everywhere | none |
#
# (GELU and SiLU are smooth variants of ReLU.) Its attention is the same without the rotation:
#
# @@ minipaged.models.layers.MultiHeadAttention.forward
#
# The pool needs three numbers from a model: layers, KV heads, and elements per head. To show that
# these are enough, we build an engine around a GPT-2 with random weights. They produce gibberish,
# but they make a stricter test: any bug changes the output.

# %%
from minipaged.attention.backend import BACKENDS
from minipaged.config import EngineConfig
from minipaged.engine.llm_engine import LLMEngine
from minipaged.engine.parts import Parts
from minipaged.models.gpt2 import GPT2, GPT2Config
from minipaged.worker.executor import UniExecutor
from minipaged.worker.model_runner import ModelRunner

shape = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 12, "hidden_size": 48}
sizes = {"inner_size": 192, "vocab_size": 101, "max_position_embeddings": 128}
torch.manual_seed(0)
gpt2 = GPT2(GPT2Config(architecture="GPT2LMHeadModel", **shape, **sizes), BACKENDS["torch"])
for parameter in gpt2.layers.parameters():
    parameter.data *= 4  # with the default initialisation, layers barely change their input
some_prompts = [[(7 * i + n) % 101 for i in range(n)] for n in (3, 17, 40)]


def gpt2_tokens(block_size: int) -> dict[str, list[int]]:
    config = EngineConfig(
        num_blocks=150,
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
    assert engine.memory.num_free == config.num_blocks
    return tokens


in_one_piece = gpt2_tokens(block_size=128)  # one block holds a whole sequence
for block_size in (1, 4, 16):
    assert gpt2_tokens(block_size) == in_one_piece
print("the same tokens from blocks of 1, 4 and 16, and from contiguous sequences")

# %% [markdown]
# ## Check
#
# Your LLaMA generated the library's tokens, and its logits are within 1e-4. Three mistakes are
# easily made:


# %%
class PositionsRestart(OwnLlama):
    def __call__(self, token_ids, positions, kv_cache, batch) -> Tensor:
        positions = torch.cat([torch.arange(span.query_len) for span in batch.spans])
        return super().__call__(token_ids, positions, kv_cache, batch)


class SlotsOffByOne(OwnLlama):
    def store(self, new: Tensor, cache: Tensor, slots: Tensor) -> None:
        super().store(new, cache, (slots + 1) % (cache.shape[0] * cache.shape[2]))


class KeysNotRotated(OwnLlama):
    def place(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return super().place(q, k, positions)[0], k


for mistake in (PositionsRestart, SlotsOffByOne, KeysNotRotated):
    wrong, _ = serve(mistake)
    same = sum(mine == theirs for mine, theirs in zip(wrong, tokens, strict=True))
    print(f"{mistake.__name__:17}{same} of 6 answers are right")
    assert wrong != tokens, "the mistake was not noticed"

# %% [markdown]
# ### Exercise: the row of a step
#
# For each sequence of a step you know how many tokens are computed, how many are new, and its
# blocks. Compute two numbers for each new token, sequence after sequence: its position, and the
# slot of its key and value. The two marked lines are right only for the first token of a prompt.
# Change them, and run this cell and the next one again.


# %%
Step = list[tuple[int, int, list[int]]]  # per sequence: computed tokens, new tokens, blocks


def positions_and_slots(step: Step, block_size: int) -> tuple[list[int], list[int]]:
    positions, slots = [], []
    for num_computed, num_new, blocks in step:
        positions += [num_computed] * num_new  # your turn
        slots += [blocks[0] * block_size] * num_new  # your turn
    return positions, slots


# %%
def check_exercise(own) -> bool:
    """Compare the rows of three steps with those that the library builds."""
    steps: dict[str, tuple[Step, int]] = {
        "a new prompt": ([(0, 3, [2])], 4),
        "the step above": ([(10, 1, [0, 1, 4]), (9, 1, [2, 3, 5]), (3, 5, [6, 7, 8])], 4),
        "blocks of 2": ([(2, 1, [5, 3]), (1, 4, [0, 7, 4])], 2),
    }
    solved = True
    for name, (step, block_size) in steps.items():
        sequences = [
            SequenceInput(seq_id, [0] * num_new, num_computed, blocks, num_logits=0)
            for seq_id, (num_computed, num_new, blocks) in enumerate(step)
        ]
        batch = BatchBuilder(4, max_blocks_per_seq=4, block_size=block_size).build(sequences)
        expected = batch.positions.tolist(), batch.slot_mapping.tolist()
        answer = own(step, block_size)
        print(f"{name:14}  yours:    {answer}")
        print(f"{'':14}  expected: {expected}")
        solved = solved and answer == expected
    return solved


print("solved" if check_exercise(positions_and_slots) else "not solved yet")

# %% [markdown]
# <details markdown="1"><summary>Hint</summary>
#
# The positions of new tokens continue after the computed ones. A position is a logical block and an
# offset in it; the sequence's table turns the logical block into a physical one.
#
# </details>
#
# <details markdown="1"><summary>Solution</summary>
#
# ```python
# def positions_and_slots(step: Step, block_size: int) -> tuple[list[int], list[int]]:
#     positions, slots = [], []
#     for num_computed, num_new, blocks in step:
#         for position in range(num_computed, num_computed + num_new):
#             positions.append(position)
#             logical, offset = divmod(position, block_size)
#             slots.append(blocks[logical] * block_size + offset)
#     return positions, slots
# ```
#
# </details>
#
# <details markdown="1"><summary>Your predictions</summary>
#
# The model computes 7 tokens, instead of 15 with padding, and needs logits for 2. C's tenth token
# has position 9: logical block 2, offset 1. Its physical block is 5, so the slot is 21. A token
# takes $2 \cdot 4 \cdot 2 \cdot 64 \cdot 4 = 4096$ bytes.
#
# </details>
#
# ## Questions
#
# **With learned positions, what would a mistake like `PositionsRestart` do to the keys in the
# pool?**
#
# <details markdown="1"><summary>Answer</summary>
#
# It would corrupt them, and the values. The position's vector is added to the token's embedding, so
# everything that the layers compute depends on it. The wrong entries would be read until the
# sequence ends.
#
# </details>
#
# **Two sequences with a common prefix share a block (chapter 7). Does RoPE allow it?**
#
# <details markdown="1"><summary>Answer</summary>
#
# Yes: the tokens in that block have the same positions in both sequences. The same text in the
# *middle* of two sequences would be rotated by different angles, and cannot be shared.
#
# </details>
#
# ## Results

# %%
computed_rows = sum(sum(counts) for counts in new_tokens)
padded = sum(len(counts) * max(counts) for counts in new_tokens)
with_logits = sum(len(logits) for _, logits in steps)
print(f"rows computed for 6 requests   {computed_rows:6,}")
print(f"rows if each step were padded  {padded:6,}")

# %% [markdown]
# Next: [which sequences run in which step](06_continuous_batching.md).
#
# ### Appendix: positions as angles
#
# GPT-2 adds a learned vector for each position to the token's embedding. RoPE takes the elements of
# a head in pairs, each a point in a plane, and rotates pair $i$ at position $p$ by the angle
# $p\,\theta^{-2i/d}$. In complex numbers that is one multiplication:


# %%
def turn(x: Tensor, positions: Tensor, theta: float = 500_000.0) -> Tensor:
    """Rotate each pair of elements by the angle of its position: [tokens, heads, head_dim]."""
    half = x.shape[-1] // 2  # element i is paired with element i + half
    angles = positions[:, None, None] * theta ** (-torch.arange(half) / half)
    points = torch.complex(x[..., :half], x[..., half:])
    turned = points * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


random = torch.Generator().manual_seed(0)
q, k = torch.randn(2, 1, 1, 64, generator=random)  # one token, one head each
rotary = llm.engine.executor.runner.model.rotary
at_900 = torch.tensor([900])
assert torch.allclose(turn(q, at_900), rotate(q, *rotary(at_900, q.dtype)), atol=1e-3)


def score(query_position: int, key_position: int) -> float:
    at = torch.tensor([query_position]), torch.tensor([key_position])
    return float((turn(q, at[0]) * turn(k, at[1])).sum())


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
far, near = ([score(start, start - d) for d in range(64)] for start in (900, 63))
right.plot(far, color=drawing.COLOURS[4], lw=4, label="query at 900")
right.plot(near, color=drawing.COLOURS[5], ls=":", label="query at 63")
right.set(xlabel="distance", ylabel="score")
right.legend()
assert all(abs(a - b) < 1e-2 for a, b in zip(far, near, strict=True))

# %% [markdown]
# Query and key are both rotated, so their product depends only on the distance between them. A key
# can therefore be rotated once, before it is stored.
