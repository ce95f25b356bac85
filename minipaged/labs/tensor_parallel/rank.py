"""Tensor parallelism: each rank stores a part of every matrix, and the ranks sum their results.

"Megatron-LM" (arXiv 1909.08053, section 3) cuts the first matrix of a block by its outputs and the
second by its inputs, so that each half of a layer needs one sum over all ranks. The PagedAttention
paper (section 4.6) serves large models in this way: a message starts each step on all workers.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minipaged.labs.tensor_parallel.model import (
    Config,
    Layer,
    Linear,
    Weights,
    attend,
    norm,
    share,
)
from minipaged.utils.shapes import Float, Int

# ---- cut by outputs ------------------------------------------------------------------------------


def cut_columns(layer: Linear, outputs: range) -> Linear:
    """A layer that computes only these outputs. Copies its weights, so that the whole can be freed.

    Args:
        layer: weight [outputs, inputs], and a bias or None.
        outputs: consecutive indices.
    """
    which = slice(outputs.start, outputs.stop)
    bias = None if layer.bias is None else layer.bias[which].clone()
    return Linear(layer.weight[which].clone(), bias)


def heads_of(config: Config, rank: int, num_ranks: int) -> tuple[range, range]:
    """A rank's query heads, and the KV heads that they read.

    Either the number of ranks divides the number of KV heads, or the other way around; in the
    second case, several ranks have a copy of the same KV head.
    """
    heads = share(config.num_heads, rank, num_ranks)
    group = config.num_heads // config.num_kv_heads  # query heads that read the same KV head
    return heads, range(heads.start // group, (heads.stop - 1) // group + 1)


def cut_heads(layer: Linear, heads: range, head_dim: int) -> Linear:
    """A layer that computes only the outputs of these heads. Each head has `head_dim` outputs."""
    return cut_columns(layer, range(heads.start * head_dim, heads.stop * head_dim))


# ---- cut by inputs -------------------------------------------------------------------------------


def cut_rows(layer: Linear, inputs: range) -> Linear:
    """A layer that takes only these inputs, for `row_linear`. Copies the weights, not the bias."""
    return Linear(layer.weight[:, inputs.start : inputs.stop].clone(), layer.bias)


def row_linear(x: Float[Tensor, "tokens inputs"], layer: Linear) -> Float[Tensor, "tokens outputs"]:
    """The output of the whole layer, on every rank.

    Args:
        x: this rank's share of the inputs.
        layer: this rank's share of the layer, from `cut_rows`.
    """
    out = F.linear(x, layer.weight)  # this rank's summand of every output
    dist.all_reduce(out)
    return out if layer.bias is None else out + layer.bias  # after the sum: added only once


# ---- cut by tokens of the vocabulary -------------------------------------------------------------


def cut_vocabulary(
    embedding: Float[Tensor, "vocab hidden"], rank: int, num_ranks: int
) -> Float[Tensor, "share hidden"]:
    """A rank's rows of the embedding: equally many per rank, padded with zeros at the end."""
    vocab_size = len(embedding)
    padded = F.pad(embedding, (0, 0, 0, -vocab_size % num_ranks))  # [padded vocab, hidden]
    rows = share(len(padded), rank, num_ranks)
    return padded[rows.start : rows.stop].clone()


def embed(
    token_ids: Int[Tensor, " tokens"], rows: Float[Tensor, "share hidden"]
) -> Float[Tensor, "tokens hidden"]:
    """The embeddings of these tokens, on every rank.

    Args:
        rows: this rank's share, from `cut_vocabulary`.
    """
    local = token_ids - dist.get_rank() * len(rows)
    is_here = (local >= 0) & (local < len(rows))
    found = rows[local.where(is_here, 0)]  # [tokens, hidden]
    found = found.where(is_here[:, None], 0)
    dist.all_reduce(found)
    return found


def gather_logits(
    hidden: Float[Tensor, " hidden"], rows: Float[Tensor, "share hidden"], vocab_size: int
) -> Float[Tensor, " vocab"] | None:
    """The logits of the whole vocabulary on rank 0; None on other ranks. One gather.

    Args:
        hidden: the last token's, after the final norm.
        rows: this rank's share, from `cut_vocabulary`.
    """
    logits = rows @ hidden  # [share]
    is_first = dist.get_rank() == 0
    num_ranks = dist.get_world_size()
    parts = [torch.empty_like(logits) for _ in range(num_ranks)] if is_first else None
    dist.gather(logits, parts, dst=0)
    return None if parts is None else torch.cat(parts)[:vocab_size]  # without the padding


# ---- a rank --------------------------------------------------------------------------------------


class Rank:
    """A rank's share of the model, and what the rank does in each step."""

    def __init__(self, weights: Weights, rank: int, num_ranks: int) -> None:
        """Cut this rank's share out of the whole model."""
        self.config = config = weights.config
        heads, kv_heads = heads_of(config, rank, num_ranks)

        def mine(size: int) -> range:
            return share(size, rank, num_ranks)

        self.rows = cut_vocabulary(weights.embedding, rank, num_ranks)
        self.layers = [
            Layer(
                attention_norm=layer.attention_norm,
                q=cut_heads(layer.q, heads, config.head_dim),
                k=cut_heads(layer.k, kv_heads, config.head_dim),
                v=cut_heads(layer.v, kv_heads, config.head_dim),
                o=cut_rows(layer.o, mine(layer.o.weight.shape[1])),
                mlp_norm=layer.mlp_norm,
                gate=cut_columns(layer.gate, mine(len(layer.gate.weight))),
                up=cut_columns(layer.up, mine(len(layer.up.weight))),
                down=cut_rows(layer.down, mine(layer.down.weight.shape[1])),
            )
            for layer in weights.layers
        ]
        self.norm = weights.norm

    # ---- one step, on every rank -----------------------------------------------------------------

    def attention(
        self, layer: Layer, x: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens hidden"]:
        """Attention of this rank's heads, and the sum over all ranks. One all_reduce."""
        mine = attend(self.config, layer.q(x), layer.k(x), layer.v(x))  # [tokens, heads * head_dim]
        return row_linear(mine, layer.o)

    def mlp(
        self, layer: Layer, x: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens hidden"]:
        """The gated feed-forward: down(silu(gate(x)) * up(x)). One all_reduce."""
        return row_linear(F.silu(layer.gate(x)) * layer.up(x), layer.down)

    def step(self, token_ids: list[int]) -> Float[Tensor, " vocab"] | None:
        """The logits of the next token on rank 0; None on other ranks. All ranks call it together.

        Follow `whole_logits`. It takes two sums per layer, one for the embedding, and one gather.
        """
        x = embed(torch.tensor(token_ids), self.rows)  # [tokens, hidden]
        for layer in self.layers:
            x = x + self.attention(layer, norm(self.config, x, layer.attention_norm))
            x = x + self.mlp(layer, norm(self.config, x, layer.mlp_norm))
        last = norm(self.config, x[-1], self.norm)  # [hidden]
        return gather_logits(last, self.rows, self.config.vocab_size)

    # ---- the loop --------------------------------------------------------------------------------

    def send(self, token_ids: list[int]) -> None:
        """Rank 0: send the tokens of the next step to all ranks. An empty list means stop.

        One broadcast of 64-bit integers. A receiver must know the size in advance, so every message
        has 1 + max_tokens of them: [number of tokens, token, ..., token, 0, ..., 0].

        Raises:
            ValueError: more than max_tokens tokens; nothing was sent.
        """
        longest = self.config.max_tokens
        if len(token_ids) > longest:
            raise ValueError(f"{len(token_ids)} tokens: a message has room for {longest}.")
        padding = [0] * (longest - len(token_ids))
        dist.broadcast(torch.tensor([len(token_ids), *token_ids, *padding]), src=0)

    def receive(self) -> list[int]:
        """Other ranks: wait for the tokens of the next step. An empty list means stop."""
        message = torch.zeros(1 + self.config.max_tokens, dtype=torch.int64)
        dist.broadcast(message, src=0)
        num_tokens, *token_ids = message.tolist()
        return token_ids[:num_tokens]

    def work(self) -> None:
        """Other ranks: take part in every step until rank 0 sends the stop message."""
        while token_ids := self.receive():
            self.step(token_ids)

    def generate(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Rank 0: the greedy continuation, token by token. Other ranks stay in `work`."""
        token_ids = list(prompt)
        for _ in range(num_tokens):
            self.send(token_ids)
            logits = self.step(token_ids)
            assert logits is not None, "the logits are on rank 0"
            token_ids.append(int(logits.argmax()))
        return token_ids[len(prompt) :]

    def stop(self) -> None:
        """Rank 0: end `work` on all other ranks."""
        self.send([])
