"""Attention where each sequence lies in one piece: nothing is gathered, no table is followed.

This is what virtual memory buys (see `memory/virtual.py`): the keys of a sequence are a slice of
the cache, and any attention that takes strides reads them where they are. Here PyTorch's own.
Behind a sequence's last token there may be no memory at all, so nobody looks there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minipaged.attention.batch import Batch
from minipaged.attention.quantized_cache import KVPool, QuantizedPool
from minipaged.attention.reference import heads_per_kv_head
from minipaged.attention.torch_paged import attend, causal_mask
from minipaged.utils.shapes import Float


def unpaged_attention(
    q: Float[Tensor, "tokens heads head_dim"],
    k_cache: KVPool,
    v_cache: KVPool,
    batch: Batch,
    scale: float,
) -> Float[Tensor, "tokens heads head_dim"]:
    """Attention of every sequence over the slice that is its own."""
    heads_per_kv_head(q, k_cache, v_cache)  # refuses shapes that do not fit
    grouped = q.unflatten(1, (k_cache.shape[1], -1))  # [tokens, kv_heads, group, head_dim]
    out: list[Tensor] = []
    for span, slot in zip(batch.spans, _slots(batch), strict=True):
        # [1, kv_heads, length, head_dim] both; nothing is copied
        keys = k_cache[slot : slot + 1, :, : span.seq_len].to(q.dtype)
        values = v_cache[slot : slot + 1, :, : span.seq_len].to(q.dtype)
        if span.query_len == 1:
            # Decode: one query sees every key, so the heads of a group can stand as its queries.
            queries = grouped[span.start : span.stop]  # [1, kv_heads, group, head_dim]
            seen = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
            out.append(seen.flatten(1, 2))  # [1, heads, head_dim]
        else:
            if span not in batch.notes:  # the first layer
                batch.notes[span] = causal_mask(q, span)
            queries = q[span.start : span.stop]  # [queries, heads, head_dim]
            out.append(attend(queries, keys[0], values[0], batch.notes[span], scale))
    return torch.cat(out)  # [tokens, heads, head_dim]


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
        rows.index_copy_(0, batch.slot_mapping, new.to(cache.dtype))


def _slots(batch: Batch) -> list[int]:
    """The slot of every sequence: its table's only entry."""
    if "slots" not in batch.notes:  # the first layer: from a GPU, it would be waited for
        batch.notes["slots"] = batch.block_tables[:, 0].tolist()
    return batch.notes["slots"]
