"""Fast paged attention in pure PyTorch: the default where no Triton kernel can run.

On a CPU every operation has a fixed cost, whatever its size: a few microseconds, or about fifty if
it wakes several threads. Work that is the same in all layers of a step, namely finding the rows of
the pool that belong to each sequence, is therefore done once, by `prepare_torch`. Each layer then
needs only a few large operations:

    store      one copy each for keys and values
    prefill    many queries per sequence: one call of PyTorch's attention (SDPA) for each sequence
    decode     one query per sequence: many sequences in one call, see `torch_decode`; the blocks of
               a prefix that several share are read once, see `shared_prefix`
"""

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipaged.attention.batch import Batch, Span
from minipaged.attention.quantized_cache import KVPool, QuantizedPool
from minipaged.attention.reference import store_kv
from minipaged.attention.shared_prefix import SharedDecodes, prepare_decodes
from minipaged.attention.torch_decode import Decodes, gather, rows_of_blocks
from minipaged.utils.shapes import Float, Int


@dataclass(frozen=True)
class Prefill:
    """One sequence with several queries."""

    start: int  # its queries are tokens [start, stop) of the batch
    stop: int
    seq_len: int
    rows: Int[Tensor, " rows"]  # of the pool, where the block of one head is a row
    mask: Float[Tensor, "queries length"] | None  # None: no context, so is_causal is enough


@dataclass(frozen=True)
class TorchBatch(Batch):
    """A batch with the rows of the cache that it writes and reads, the same in every layer."""

    slot_rows: Int[Tensor, " slot_rows"]  # where keys are written, with one row per slot and head
    prefills: list[Prefill]
    decodes: Decodes | SharedDecodes | None


def prepare_torch(batch: Batch, k_cache: KVPool, num_heads: int, dtype: torch.dtype) -> TorchBatch:
    """Prepare a step; see `AttentionBackend.prepare`."""
    _, kv_heads, block_size, _ = k_cache.shape
    assert num_heads % kv_heads == 0, f"{num_heads} heads cannot share {kv_heads} KV heads evenly"
    slots = batch.slot_mapping
    heads = torch.arange(kv_heads, device=slots.device)
    rows = (slots // block_size * kv_heads)[:, None] + heads  # [tokens, kv_heads]
    rows = rows * block_size + (slots % block_size)[:, None]
    # One sequence shares nothing.
    prepare = prepare_decodes if len(batch.query_lens) > 1 else Decodes.prepare
    return TorchBatch(
        **batch_fields(batch),
        slot_rows=rows.flatten(),
        prefills=_prepare_prefills(batch, k_cache, dtype),
        decodes=prepare(batch, k_cache, num_heads, dtype),
    )


_FIELDS = tuple(field.name for field in fields(Batch))


def batch_fields(batch: Batch) -> dict[str, Any]:
    """The fields of a batch, to construct a derived class from them."""
    return dict(zip(_FIELDS, attrgetter(*_FIELDS)(batch), strict=True))


def torch_store_kv(
    k: Float[Tensor, "tokens kv_heads head_dim"],
    v: Float[Tensor, "tokens kv_heads head_dim"],
    k_cache: KVPool,
    v_cache: KVPool,
    batch: TorchBatch,
) -> None:
    """Write the step's new keys and values into their slots of the pool, in place."""
    if isinstance(k_cache, QuantizedPool) or isinstance(v_cache, QuantizedPool):
        store_kv(k, v, k_cache, v_cache, batch)
        return
    head_dim, rows = k_cache.shape[-1], batch.slot_rows
    k_cache.view(-1, head_dim).index_copy_(0, rows, k.to(k_cache.dtype).reshape(-1, head_dim))
    v_cache.view(-1, head_dim).index_copy_(0, rows, v.to(v_cache.dtype).reshape(-1, head_dim))


def torch_paged_attention(
    q: Float[Tensor, "tokens heads head_dim"],
    k_cache: KVPool,
    v_cache: KVPool,
    batch: TorchBatch,
    scale: float,
) -> Float[Tensor, "tokens heads head_dim"]:
    """Compute the attention of the whole batch, with any mixture of prefill and decode."""
    decodes = batch.decodes
    if decodes is not None and decodes.tokens is None:
        return decodes.attend(q, k_cache, v_cache, scale)
    out = torch.empty_like(q)
    for prefill in batch.prefills:
        tokens = slice(prefill.start, prefill.stop)
        out[tokens] = _attend_many_queries(q[tokens], k_cache, v_cache, prefill, scale)
    if decodes is not None and decodes.tokens is not None:
        queries = q.index_select(0, decodes.tokens)  # [seqs, heads, head_dim]
        out.index_copy_(0, decodes.tokens, decodes.attend(queries, k_cache, v_cache, scale))
    return out


def _prepare_prefills(batch: Batch, k_cache: KVPool, dtype: torch.dtype) -> list[Prefill]:
    _, kv_heads, block_size, _ = k_cache.shape
    prefills: list[Prefill] = []
    for seq in np.flatnonzero(batch.query_lens != 1):
        span, table = batch.spans[seq], batch.block_tables[seq]
        blocks = table[None, : -(-span.seq_len // block_size)].long()  # [1, columns]
        mask = causal_mask(span, dtype, table.device)
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
    """Prefill, whole or in chunks: each query of one sequence attends up to its own position."""
    _, kv_heads, _, head_dim = k_cache.shape

    def gathered(cache: KVPool) -> Float[Tensor, "kv_heads length head_dim"]:
        keys = gather(cache, prefill.rows, q.dtype).view(kv_heads, -1, head_dim)
        return keys[:, : prefill.seq_len]

    return attend(q, gathered(k_cache), gathered(v_cache), prefill.mask, scale)


def causal_mask(
    span: Span, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "queries length"] | None:
    """The mask to add to the scores of one sequence's queries; None: `is_causal` is enough."""
    if span.context_len == 0:
        return None  # without context, is_causal has the same effect with half the work
    positions = torch.arange(span.seq_len, device=device)
    hidden = positions > positions[span.context_len :, None]  # [queries, length]
    zeros = torch.zeros(hidden.shape, dtype=dtype, device=device)
    return zeros.masked_fill_(hidden, -torch.inf)


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
    # Each KV head is repeated for its group with a stride of zero, so nothing is copied.
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
