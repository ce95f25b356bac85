"""Paged attention at speed in pure PyTorch: the default where no Triton kernel can run.

On a CPU every operation has a price of its own, whatever its size: a few microseconds, and some
fifty where several threads are woken for it. So what is the same in all layers of a step, namely
which rows of the pool belong to whom, is worked out in the first layer and noted with the batch.
What is left for each layer are a few large operations:

    store      one copy each for keys and values
    prefill    many queries a sequence: each sequence is worth a call of PyTorch's attention (SDPA)
    decode     one query a sequence: many sequences in one call, see `torch_decode`
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minipaged.attention.batch import Batch, Span
from minipaged.attention.quantized_cache import KVPool, QuantizedPool
from minipaged.attention.reference import heads_per_kv_head, store_kv
from minipaged.attention.torch_decode import Decodes, gather, rows_of_blocks
from minipaged.utils.shapes import Float, Int


def torch_store_kv(
    k: Float[Tensor, "tokens kv_heads head_dim"],
    v: Float[Tensor, "tokens kv_heads head_dim"],
    k_cache: KVPool,
    v_cache: KVPool,
    batch: Batch,
) -> None:
    """Write the step's new keys and values into their slots of the pool, in place."""
    if isinstance(k_cache, QuantizedPool) or isinstance(v_cache, QuantizedPool):
        store_kv(k, v, k_cache, v_cache, batch)
        return
    _, kv_heads, block_size, head_dim = k_cache.shape
    rows = batch.notes.get(("slots", k_cache.shape))
    if rows is None:  # the first layer
        blocks, offsets = (
            batch.slot_mapping // block_size,
            batch.slot_mapping % block_size,
        )  # [tokens] each
        heads = torch.arange(kv_heads, device=k.device)
        rows = ((blocks[:, None] * kv_heads + heads) * block_size + offsets[:, None]).flatten()
        batch.notes["slots", k_cache.shape] = rows
    k_cache.view(-1, head_dim).index_copy_(0, rows, k.to(k_cache.dtype).reshape(-1, head_dim))
    v_cache.view(-1, head_dim).index_copy_(0, rows, v.to(v_cache.dtype).reshape(-1, head_dim))


@dataclass(frozen=True)
class Prefill:
    """One sequence with several queries."""

    start: int  # its queries are tokens [start, stop) of the batch
    stop: int
    seq_len: int
    rows: Int[Tensor, " rows"]  # of the pool, where the block of one head is a row
    mask: Float[Tensor, "queries length"] | None  # None: all of it is new, and is_causal says it


def torch_paged_attention(
    q: Float[Tensor, "tokens heads head_dim"],
    k_cache: KVPool,
    v_cache: KVPool,
    batch: Batch,
    scale: float,
) -> Float[Tensor, "tokens heads head_dim"]:
    """The whole batch, whatever mixture of prefill and decode it is."""
    heads_per_kv_head(q, k_cache, v_cache)  # refuses shapes that do not fit
    key = "plan", q.shape, q.dtype, type(k_cache), k_cache.shape, k_cache.dtype
    if key not in batch.notes:  # the first layer
        batch.notes[key] = _plan_prefills(batch, k_cache, q), Decodes.plan(batch, k_cache, q)
    prefills, decodes = batch.notes[key]

    if decodes is not None and decodes.tokens is None:
        return decodes.attend(q, k_cache, v_cache, scale)
    out = torch.empty_like(q)
    for prefill in prefills:
        tokens = slice(prefill.start, prefill.stop)
        out[tokens] = _attend_many_queries(q[tokens], k_cache, v_cache, prefill, scale)
    if decodes is not None and decodes.tokens is not None:
        queries = q.index_select(0, decodes.tokens)  # [seqs, heads, head_dim]
        out.index_copy_(0, decodes.tokens, decodes.attend(queries, k_cache, v_cache, scale))
    return out


def _plan_prefills(batch: Batch, k_cache: KVPool, q: Tensor) -> list[Prefill]:
    _, kv_heads, block_size, _ = k_cache.shape
    prefills: list[Prefill] = []
    for span, table in zip(batch.spans, batch.block_tables, strict=True):
        if span.query_len == 1:
            continue
        blocks = table[None, : -(-span.seq_len // block_size)].long()  # [1, columns]
        mask = causal_mask(q, span)
        rows = rows_of_blocks(blocks, kv_heads)
        prefills.append(Prefill(span.start, span.stop, span.seq_len, rows, mask))
    return prefills


def _attend_many_queries(
    q: Float[Tensor, "queries heads head_dim"],
    k_cache: KVPool,
    v_cache: KVPool,
    prefill: Prefill,
    scale: float,
) -> Float[Tensor, "queries heads head_dim"]:
    """Prefill, whole or in chunks: the queries of one sequence, each up to its own position."""
    _, kv_heads, _, head_dim = k_cache.shape

    def gathered(cache: KVPool) -> Float[Tensor, "kv_heads length head_dim"]:
        keys = gather(cache, prefill.rows, q.dtype).view(kv_heads, -1, head_dim)
        return keys[:, : prefill.seq_len]

    return attend(q, gathered(k_cache), gathered(v_cache), prefill.mask, scale)


def causal_mask(q: Tensor, span: Span) -> Float[Tensor, "queries length"] | None:
    """What to add to the scores of one sequence's queries; None: `is_causal` says it."""
    if span.context_len == 0:
        return None  # for a sequence from its beginning it means the same, and computes half
    positions = torch.arange(span.seq_len, device=q.device)
    hidden = positions > positions[span.context_len :, None]  # [queries, length]
    return q.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def attend(
    q: Float[Tensor, "queries heads head_dim"],
    keys: Float[Tensor, "kv_heads length head_dim"],
    values: Float[Tensor, "kv_heads length head_dim"],
    mask: Float[Tensor, "queries length"] | None,
    scale: float,
) -> Float[Tensor, "queries heads head_dim"]:
    """PyTorch's own attention over the keys of one sequence, with a mask of `causal_mask`."""
    # [kv_heads, group, queries, head_dim]
    grouped = q.transpose(0, 1).unflatten(0, (keys.shape[0], -1))
    # Each head is seen by its whole group, by a stride of zero: nothing is copied for it.
    seen = (-1, grouped.shape[1], -1, -1)
    out = F.scaled_dot_product_attention(
        grouped,
        keys[:, None].expand(seen),
        values[:, None].expand(seen),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )  # [kv_heads, group, queries, head_dim]
    return out.flatten(0, 1).transpose(0, 1)  # [queries, heads, head_dim]
