"""Paged attention block by block, as in Equation 4 of the paper (section 4.1), never gathering.

The paper cuts a sequence's keys and values into blocks K_j and V_j and writes, for query q_i,

    A_ij = exp(q_i K_j / sqrt(d)) / sum over all blocks t of exp(q_i K_t / sqrt(d)) 1
    o_i  = sum over all blocks j of  V_j A_ij

The denominator runs over all blocks, so they seem to need two passes. One pass is enough: keep
three running values, and rescale them when a later block contains a larger score.

    maximum  the largest score so far; subtracted, so that exp never overflows
    total    the denominator so far: the sum of exp(score - maximum)
    output   the numerator so far: the sum of exp(score - maximum) * value

Subtracting the maximum changes no ratio, and output / total at the end is the paper's o_i. This
method is known as online softmax.
"""

import torch
from torch import Tensor

from minipaged.attention.batch import Batch
from minipaged.attention.quantized_cache import KVPool
from minipaged.attention.reference import heads_per_kv_head
from minipaged.utils.shapes import Float


def blockwise_paged_attention(
    q: Float[Tensor, "tokens heads head_dim"],
    k_cache: KVPool,
    v_cache: KVPool,
    batch: Batch,
    scale: float,
) -> Float[Tensor, "tokens heads head_dim"]:
    """Attention of every sequence in the batch, reading one block of one sequence at a time."""
    block_size = k_cache.shape[2]
    out = torch.empty_like(q)
    for span, table in zip(batch.spans, batch.block_tables, strict=True):
        num_blocks = -(-span.seq_len // block_size)
        rows = slice(span.start, span.stop)
        out[rows] = _attend_to_blocks(
            q[rows], k_cache, v_cache, table[:num_blocks].tolist(), span.context_len, scale
        )
    return out


def _attend_to_blocks(
    q: Float[Tensor, "queries heads head_dim"],
    k_cache: KVPool,
    v_cache: KVPool,
    blocks: list[int],
    context_len: int,
    scale: float,
) -> Float[Tensor, "queries heads head_dim"]:
    """Attention of one sequence's queries over the physical blocks of its table, in order."""
    num_queries, heads, head_dim = q.shape
    block_size = k_cache.shape[2]
    group_size = heads_per_kv_head(q, k_cache, v_cache)
    exact = torch.promote_types(q.dtype, torch.float32)
    q_heads = q.to(exact).transpose(0, 1)  # [heads, queries, head_dim]
    positions = context_len + torch.arange(num_queries, device=q.device)  # [queries]

    maximum = q_heads.new_full((heads, num_queries, 1), float("-inf"))
    total = q_heads.new_zeros(heads, num_queries, 1)
    output = q_heads.new_zeros(heads, num_queries, head_dim)
    for logical, physical in enumerate(blocks):
        first = logical * block_size
        filled = min(block_size, context_len + num_queries - first)  # of the last block, a part
        # K_j and V_j, each head as often as query heads share it: [heads, filled, head_dim]
        keys = k_cache[physical, :, :filled].to(exact).repeat_interleave(group_size, dim=0)
        values = v_cache[physical, :, :filled].to(exact).repeat_interleave(group_size, dim=0)

        scores = scale * q_heads @ keys.transpose(1, 2)  # [heads, queries, filled]
        hidden = first + torch.arange(filled, device=q.device) > positions[:, None]
        scores = scores.masked_fill(hidden, float("-inf"))

        # Position 0 is in the first block and visible to every query. After that block the
        # maximum is finite, so -inf minus -inf (NaN) cannot occur.
        new_maximum = torch.maximum(maximum, scores.amax(dim=-1, keepdim=True))
        correction = torch.exp(maximum - new_maximum)  # 0 at the first block
        weights = torch.exp(scores - new_maximum)  # [heads, queries, filled]
        total = correction * total + weights.sum(dim=-1, keepdim=True)
        output = correction * output + weights @ values
        maximum = new_maximum
    return (output / total).transpose(0, 1).to(q.dtype)  # [queries, heads, head_dim]
