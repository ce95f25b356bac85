"""Paged attention at speed in pure PyTorch: the default where no Triton kernel can run.

PyTorch's attention (SDPA) is fast but knows no block tables, so the blocks are gathered for it, and
the art is to gather little at a time and to call it seldom:

    decode    one query a sequence: many sequences of similar length share a gather and a call
    prefill   many queries a sequence: each sequence is worth a call of its own
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minipaged.attention.reference import heads_per_kv_head
from minipaged.batch import Batch, Span
from minipaged.quantized import KVPool, QuantizedPool
from minipaged.shapes import Float, Int
from minipaged.transfer import to_device

# Gather at most so many numbers at a time (one sequence at least). A copy of this size is still in
# the processor's cache when attention reads it, and its memory serves for the next one: fresh
# copies of 25 MB cost more, in page faults, than the attention itself.
_NUMBERS_AT_ONCE = 1 << 20


def torch_paged_attention(
    q: Float[Tensor, "tokens heads head_dim"],
    k_cache: KVPool,
    v_cache: KVPool,
    batch: Batch,
    scale: float,
) -> Float[Tensor, "tokens heads head_dim"]:
    """The whole batch, whatever mixture of prefill and decode it is."""
    out = torch.empty_like(q)
    decoding: list[int] = []
    for seq, span in enumerate(batch.spans):
        if span.query_len == 1:
            decoding.append(seq)
            continue
        rows = slice(span.start, span.stop)
        table = batch.block_tables[seq]
        out[rows] = _attend_many_queries(q[rows], k_cache, v_cache, table, span.context_len, scale)

    _, kv_heads, _, head_dim = k_cache.shape
    positions_at_once = _NUMBERS_AT_ONCE // (kv_heads * head_dim)
    for group in _alike_in_length(decoding, batch.spans, positions_at_once):
        seqs = to_device(group, q.device)  # [seqs]
        rows = batch.query_starts[seqs]  # [seqs]
        tables = batch.block_tables[seqs]  # [seqs, max_blocks]
        seq_lens = batch.context_lens[seqs] + 1  # [seqs]
        longest = batch.spans[group[0]].seq_len
        out[rows] = _attend_one_query_each(
            q[rows], k_cache, v_cache, tables, seq_lens, longest, scale
        )
    return out


def _alike_in_length(
    seqs: list[int], spans: tuple[Span, ...], positions_at_once: int
) -> list[list[int]]:
    """Groups of sequences, the longest first: padding each group to its longest wastes little."""
    groups: list[list[int]] = []
    longest = 0  # in the group that is being filled
    for seq in sorted(seqs, key=lambda s: spans[s].seq_len, reverse=True):
        if not groups or (len(groups[-1]) + 1) * longest > positions_at_once:
            groups.append([])
            longest = spans[seq].seq_len
        groups[-1].append(seq)
    return groups


def _attend_one_query_each(
    q: Float[Tensor, "seqs heads head_dim"],
    k_cache: KVPool,
    v_cache: KVPool,
    tables: Int[Tensor, "seqs max_blocks"],
    seq_lens: Int[Tensor, " seqs"],
    longest: int,
    scale: float,
) -> Float[Tensor, "seqs heads head_dim"]:
    """Decode: the last query of each sequence sees all its keys, so only padding is masked."""
    block_size = k_cache.shape[2]
    columns = -(-longest // block_size)
    positions = torch.arange(columns * block_size, device=q.device)  # [positions]
    visible = positions < seq_lens[:, None]  # [seqs, positions]

    # Table entries behind a sequence's end are no blocks. Its own first block stands in for them:
    # weighted with zero, but never NaN, as another's block might be.
    used = visible[:, ::block_size]  # [seqs, columns]
    tables = torch.where(used, tables[:, :columns], tables[:, :1])  # [seqs, columns]
    keys = _gather(k_cache, tables, q.dtype)  # [seqs, kv_heads, positions, head_dim]
    values = _gather(v_cache, tables, q.dtype)  # [seqs, kv_heads, positions, head_dim]

    # The query heads that share a key head stand where SDPA expects several queries of one head:
    # the keys are read once for all of them.
    grouped = q.unflatten(1, (-1, heads_per_kv_head(q, k_cache, v_cache)))
    out = F.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=visible[:, None, None, :], scale=scale
    )  # [seqs, kv_heads, group, head_dim]
    return out.flatten(1, 2)  # [seqs, heads, head_dim]


def _attend_many_queries(
    q: Float[Tensor, "queries heads head_dim"],
    k_cache: KVPool,
    v_cache: KVPool,
    table: Int[Tensor, " max_blocks"],
    context_len: int,
    scale: float,
) -> Float[Tensor, "queries heads head_dim"]:
    """Prefill, whole or in chunks: the queries of one sequence, each up to its own position."""
    num_queries = q.shape[0]
    group_size = heads_per_kv_head(q, k_cache, v_cache)
    seq_len = context_len + num_queries
    blocks = table[None, : -(-seq_len // k_cache.shape[2])]  # [1, blocks]

    # Each key head is seen group_size times, by a stride of zero: nothing is copied for it.
    # [1, kv_heads, positions, head_dim] -> [kv_heads, group, length, head_dim]
    keys = _gather(k_cache, blocks, q.dtype)[0, :, None, :seq_len].expand(-1, group_size, -1, -1)
    values = _gather(v_cache, blocks, q.dtype)[0, :, None, :seq_len].expand(-1, group_size, -1, -1)
    grouped = q.transpose(0, 1).unflatten(0, (-1, group_size))
    visible = None  # is_causal says the same for a sequence from its beginning, and computes half
    if context_len > 0:
        positions = torch.arange(seq_len, device=q.device)  # [length]
        visible = positions <= positions[context_len:, None]  # [queries, length]
    out = F.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=visible, is_causal=visible is None, scale=scale
    )  # [kv_heads, group, queries, head_dim]
    return out.flatten(0, 1).transpose(0, 1)  # [queries, heads, head_dim]


def _gather(
    cache: KVPool, tables: Int[Tensor, "seqs columns"], dtype: torch.dtype
) -> Float[Tensor, "seqs kv_heads positions head_dim"]:
    """Keys (or values) in the order of their positions, each head's side by side, in one copy."""
    if isinstance(cache, QuantizedPool):
        # float8 has no index_select, and needs none: to copy, any 8 bits will do.
        stored = _gather_rows(cache.numbers.view(torch.int8), tables).view(cache.numbers.dtype)
        return (stored.float() * _gather_rows(cache.scales[..., None], tables)).to(dtype)
    return _gather_rows(cache, tables).to(dtype)


def _gather_rows(cache: Tensor, tables: Tensor) -> Tensor:
    seqs, columns = tables.shape
    _, kv_heads, block_size, head_dim = cache.shape
    # Blocks of one head as rows: block b of head h is row b * kv_heads + h.
    heads = torch.arange(kv_heads, device=cache.device)[:, None]
    rows = tables[:, None, :] * kv_heads + heads  # [seqs, kv_heads, columns]
    # index_select copies whole rows and so is 1.5 times faster than cache[tables].
    blocks = cache.flatten(0, 1).index_select(0, rows.flatten())
    return blocks.view(seqs, kv_heads, columns * block_size, head_dim)
