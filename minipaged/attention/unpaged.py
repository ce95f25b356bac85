"""Attention where each sequence lies in one piece: nothing is gathered, no table is followed.

This is what virtual memory buys (see `memory/virtual.py`): the keys of a sequence are a slice of
the cache, and any attention that takes strides reads them where they are. Here PyTorch's own.
Behind a sequence's last token there may be no memory at all, so nobody looks there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minipaged.attention.reference import heads_per_kv_head
from minipaged.attention.torch_paged import attend, causal_mask
from minipaged.batch import Batch
from minipaged.quantized import KVPool, QuantizedPool
from minipaged.shapes import Float


def unpaged_attention(
    q: Float[Tensor, "tokens heads head_dim"],
    k_cache: KVPool,
    v_cache: KVPool,
    batch: Batch,
    scale: float,
) -> Float[Tensor, "tokens heads head_dim"]:
    """Attention of every sequence over the slice that is its own."""
    heads_per_kv_head(q, k_cache, v_cache)  # refuses shapes that do not fit
    out = torch.empty_like(q)
    for span, slot in zip(batch.spans, _slots(batch), strict=True):
        keys = k_cache[slot, :, : span.seq_len].to(q.dtype)  # [kv_heads, length, head_dim]
        values = v_cache[slot, :, : span.seq_len].to(q.dtype)  # [kv_heads, length, head_dim]
        queries = q[span.start : span.stop]
        if span.query_len == 1:
            out[span.start] = _attend_one_query(queries[0], keys, values, scale)
        else:
            if span not in batch.notes:  # the first layer
                batch.notes[span] = causal_mask(q, span)
            mask = batch.notes[span]
            out[span.start : span.stop] = attend(queries, keys, values, mask, scale)
    return out


def unpaged_store_kv(
    k: Float[Tensor, "tokens kv_heads head_dim"],
    v: Float[Tensor, "tokens kv_heads head_dim"],
    k_cache: KVPool,
    v_cache: KVPool,
    batch: Batch,
) -> None:
    """Write the step's new keys and values where they belong, in place."""
    for new, cache in ((k, k_cache), (v, v_cache)):
        assert not isinstance(cache, QuantizedPool), "scales would need pages of their own"
        # Token-major, all slots one behind the other: a token's slot number is its row. A view, or
        # PyTorch raises.
        _, kv_heads, _, head_dim = cache.shape
        rows = cache.transpose(1, 2).view(-1, kv_heads, head_dim)  # [slots * length, ...]
        rows.index_copy_(0, batch.slots, new.to(cache.dtype))


def _attend_one_query(
    q: Float[Tensor, "heads head_dim"],
    keys: Float[Tensor, "kv_heads length head_dim"],
    values: Float[Tensor, "kv_heads length head_dim"],
    scale: float,
) -> Float[Tensor, "heads head_dim"]:
    """Decode: one query sees every key, so the heads of a group can stand as its queries."""
    grouped = q.unflatten(0, (keys.shape[0], -1))[None]  # [1, kv_heads, group, head_dim]
    out = F.scaled_dot_product_attention(grouped, keys[None], values[None], scale=scale)
    return out[0].flatten(0, 1)  # [heads, head_dim]


def _slots(batch: Batch) -> list[int]:
    """The slot of every sequence: its table's only entry."""
    if "slots" not in batch.notes:  # the first layer: from a GPU, it would be waited for
        batch.notes["slots"] = batch.block_tables[:, 0].tolist()
    return batch.notes["slots"]
