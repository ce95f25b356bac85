"""Paged attention in its plainest form: gather, then attend. This is the specification.

Every faster implementation is tested against this one, so it is never optimised. Softmax and sums
are in float32, or in float64 when the inputs are.
"""

import torch
from torch import Tensor

from minipaged.attention.batch import Batch
from minipaged.attention.quantized_cache import KVPool
from minipaged.utils.shapes import Float, Int


def reference_paged_attention(
    q: Float[Tensor, "tokens heads head_dim"],
    k_cache: KVPool,
    v_cache: KVPool,
    batch: Batch,
    scale: float,
) -> Float[Tensor, "tokens heads head_dim"]:
    """Attention of every sequence in the batch over its own keys and values in the pool."""
    out = torch.empty_like(q)
    for span, table in zip(batch.spans, batch.block_tables, strict=True):
        keys = gather(k_cache, table, span.seq_len)  # [length, kv_heads, head_dim]
        values = gather(v_cache, table, span.seq_len)  # [length, kv_heads, head_dim]
        rows = slice(span.start, span.stop)
        out[rows] = causal_attention(q[rows], keys, values, span.context_len, scale)
    return out


def gather(
    cache: KVPool,
    table: Int[Tensor, " max_blocks"],
    seq_len: int,
) -> Float[Tensor, "length kv_heads head_dim"]:
    """Return the first `seq_len` keys (or values) of a sequence, by position (section 4.2)."""
    # Only the first num_blocks entries of the table are valid; the rest may hold any number.
    num_blocks = -(-seq_len // cache.shape[2])
    blocks = cache[table[:num_blocks].long()]  # [blocks, kv_heads, block_size, head_dim]
    in_order = blocks.transpose(1, 2).flatten(0, 1)  # [blocks * block_size, kv_heads, head_dim]
    return in_order[:seq_len]  # [length, kv_heads, head_dim]


def causal_attention(
    q: Float[Tensor, "queries heads head_dim"],
    keys: Float[Tensor, "length kv_heads head_dim"],
    values: Float[Tensor, "length kv_heads head_dim"],
    context_len: int,
    scale: float,
) -> Float[Tensor, "queries heads head_dim"]:
    """Attention over contiguous keys. Query i sees the keys at positions up to context_len + i."""
    exact = torch.promote_types(q.dtype, torch.float32)
    group_size = heads_per_kv_head(q, keys, values)
    keys = keys.to(exact).repeat_interleave(group_size, dim=1)  # [length, heads, head_dim]
    values = values.to(exact).repeat_interleave(group_size, dim=1)  # [length, heads, head_dim]

    scores = scale * torch.einsum("qhd,khd->hqk", q.to(exact), keys)  # [heads, queries, length]
    query_positions = context_len + torch.arange(q.shape[0], device=q.device)
    key_positions = torch.arange(keys.shape[0], device=q.device)
    hidden = key_positions > query_positions[:, None]  # [queries, length]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)  # [queries, heads, head_dim]


def heads_per_kv_head(q: Tensor, keys: Tensor | KVPool, values: Tensor | KVPool) -> int:
    """The number of query heads per KV head. All three tensors have their heads in dimension 1."""
    # Without these checks a single head might be broadcast to all, unnoticed.
    heads, kv_heads = q.shape[1], keys.shape[1]
    assert keys.shape == values.shape, (
        f"keys are {tuple(keys.shape)}, but values are {tuple(values.shape)}"
    )
    assert q.shape[-1] == keys.shape[-1], (
        f"query heads have {q.shape[-1]} elements, KV heads have {keys.shape[-1]}"
    )
    assert heads % kv_heads == 0, (
        f"{heads} query heads cannot be divided evenly among {kv_heads} KV heads"
    )
    return heads // kv_heads


def store_kv(
    k: Float[Tensor, "tokens kv_heads head_dim"],
    v: Float[Tensor, "tokens kv_heads head_dim"],
    k_cache: KVPool,
    v_cache: KVPool,
    batch: Batch,
) -> None:
    """Write the step's new keys and values into their slots of the pool, in place."""
    _, kv_heads, block_size, head_dim = k_cache.shape
    expected = (len(batch.slot_mapping), kv_heads, head_dim)
    for name, new in (("keys", k), ("values", v)):
        # Assignment broadcasts: without this check, one head could be written to all heads.
        assert new.shape == expected, (
            f"the new {name} have shape {tuple(new.shape)}, the cache expects {expected}"
        )
    blocks, offsets = (
        batch.slot_mapping // block_size,
        batch.slot_mapping % block_size,
    )  # [tokens] each
    k_cache[blocks, :, offsets] = k.to(k_cache.dtype)
    v_cache[blocks, :, offsets] = v.to(v_cache.dtype)
