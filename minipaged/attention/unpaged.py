"""Attention over contiguous sequences, without gathering and without block tables.

This is the benefit of virtual memory (see `VirtualMemory`): the keys of a sequence are a slice of
the cache, so any attention kernel that supports strides, here PyTorch's own, can read them in
place. Memory after a sequence's last token may not be mapped, so it is never read.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minipaged.attention.batch import Batch
from minipaged.attention.quantized_cache import KVPool, QuantizedPool
from minipaged.attention.reference import heads_per_kv_head
from minipaged.attention.torch_paged import attend, batch_fields, causal_mask
from minipaged.utils.shapes import Float


@dataclass(frozen=True)
class UnpagedBatch(Batch):
    """A batch with what all layers share: the region of each sequence, and masks for prefills."""

    regions: list[int]
    masks: list[Tensor | None]


def prepare_unpaged(
    batch: Batch, k_cache: KVPool, num_heads: int, dtype: torch.dtype
) -> UnpagedBatch:
    """Prepare a step; see `AttentionBackend.prepare`."""
    return UnpagedBatch(
        **batch_fields(batch),
        regions=batch.block_tables[:, 0].tolist(),  # a table's only entry
        masks=[causal_mask(span, dtype, batch.block_tables.device) for span in batch.spans],
    )


def unpaged_attention(
    q: Float[Tensor, "tokens heads head_dim"],
    k_cache: KVPool,
    v_cache: KVPool,
    batch: UnpagedBatch,
    scale: float,
) -> Float[Tensor, "tokens heads head_dim"]:
    """Compute the attention of every sequence over its own region."""
    heads_per_kv_head(q, k_cache, v_cache)  # checks the shapes
    grouped = q.unflatten(1, (k_cache.shape[1], -1))  # [tokens, kv_heads, group, head_dim]
    out: list[Tensor] = []
    for span, region, mask in zip(batch.spans, batch.regions, batch.masks, strict=True):
        # [1, kv_heads, length, head_dim] both: views
        keys = k_cache[region : region + 1, :, : span.seq_len].to(q.dtype)
        values = v_cache[region : region + 1, :, : span.seq_len].to(q.dtype)
        if span.query_len == 1:
            # Decode: one query sees every key, so the heads of a group can serve as its queries.
            queries = grouped[span.start : span.stop]  # [1, kv_heads, group, head_dim]
            seen = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
            out.append(seen.flatten(1, 2))  # [1, heads, head_dim]
        else:
            queries = q[span.start : span.stop]  # [queries, heads, head_dim]
            out.append(attend(queries, keys[0], values[0], mask, scale))
    return torch.cat(out)  # [tokens, heads, head_dim]


def unpaged_store_kv(
    k: Float[Tensor, "tokens kv_heads head_dim"],
    v: Float[Tensor, "tokens kv_heads head_dim"],
    k_cache: KVPool,
    v_cache: KVPool,
    batch: Batch,
) -> None:
    """Write the step's new keys and values into their slots, in place."""
    for new, cache in ((k, k_cache), (v, v_cache)):
        assert not isinstance(cache, QuantizedPool), "scales would need their own pages"
        # The pool as one list of token slots, indexed by slot number. `view` raises an error
        # where this would need a copy.
        _, kv_heads, _, head_dim = cache.shape
        rows = cache.transpose(1, 2).view(-1, kv_heads, head_dim)  # [regions * length, ...]
        rows.index_copy_(0, batch.slot_mapping, new.to(cache.dtype))
