"""Decode in pure PyTorch: one query per sequence, two ways to read the blocks.

    gathered   copy the blocks of some sequences side by side, a piece at a time, and give them to
               PyTorch's attention (SDPA). Each key is read, written, and read again
    in place   multiply every block, where it is, by the query of its owner, and put only the
               scores in order, which are 1 / head_dim as many numbers. Each key is read once

In place takes about as long as SDPA takes over keys that are already contiguous, but more
operations, and it multiplies all else between the first and the last block in use. So it
is for large batches whose blocks fill their part of the pool; there it is up to twice as fast.
`Decodes.prepare` chooses. It runs once per step, because the answer is the same in every layer.
"""

from dataclasses import dataclass
from math import inf
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minipaged.attention.batch import Batch
from minipaged.attention.quantized_cache import KVPool, QuantizedPool
from minipaged.utils.device import to_device
from minipaged.utils.shapes import Float, Int

Way = Literal["gathered", "in place"]

# Gather at most so many elements at a time. A copy of this size is still in the processor's cache
# when attention reads it.
NUMBERS_AT_ONCE = 2**20
# In place, from so many elements on: below, what counts is operations, and threads to be woken.
FEWEST_IN_PLACE = 2**17
FEWEST_FOR_SEVERAL_THREADS = 2**19
# In place, if at least this part of the range of blocks is in use: the rest is read in vain.
LEAST_IN_USE = 2 / 3
# In place, if a table of all sequences, padded to the longest, has at most so many entries a block.
MOST_ENTRIES = 4
# In place, if no more query heads share a KV head: SDPA is faster where it has much to multiply.
LARGEST_GROUP = 3


@dataclass(frozen=True)
class Gathered:
    """Some sequences of similar length, side by side."""

    start: int  # they are sequences [start, stop) of those that decode
    stop: int
    rows: Int[Tensor, " rows"]  # of the pool, where the block of one head is a row
    mask: Float[Tensor, "seqs 1 1 positions"]


@dataclass(frozen=True)
class InPlace:
    """All sequences at once, in the blocks [first, stop) of the pool.

    A table entry is one column of one sequence in a table of all, padded to the longest.
    """

    first: int
    stop: int
    owner: Int[Tensor, " blocks"]  # the sequence with whose query a block is multiplied
    block_of_entry: Int[Tensor, " entries"]
    entry_of_block: Int[Tensor, " blocks"]
    blocks: Int[Tensor, " used"]  # those of each sequence, one sequence after another
    starts: Int[Tensor, " seqs"]  # where in `blocks` a sequence's begin
    mask: Float[Tensor, "seqs 1 positions"]


@dataclass(frozen=True)
class Decodes:
    """The sequences of a batch with one query, and how to attend to them."""

    tokens: Int[Tensor, " seqs"] | None  # of the batch: their queries; None: all, in their order
    way: InPlace | list[Gathered]
    scratch: Tensor | None  # [2, rows, block_size, head_dim], for gathered keys and values

    @classmethod
    def prepare(
        cls,
        batch: Batch,
        k_cache: KVPool,
        num_heads: int,
        dtype: torch.dtype,
        way: Way | None = None,  # None: the one that should be faster
    ) -> "Decodes | None":
        """What all layers of this step share; None if no sequence decodes.

        Shared blocks are gathered even if `way` is "in place".
        """
        spans = batch.spans
        seqs = [seq for seq, span in enumerate(spans) if span.query_len == 1]
        if not seqs:
            return None
        _, kv_heads, block_size, head_dim = k_cache.shape
        device = batch.block_tables.device
        lengths = [spans[seq].seq_len for seq in seqs]
        numbers_if_padded = len(seqs) * max(lengths) * kv_heads * head_dim
        if numbers_if_padded > NUMBERS_AT_ONCE:  # in groups of similar length, little is padding
            seqs.sort(key=lambda seq: spans[seq].seq_len, reverse=True)
            lengths.sort(reverse=True)
        columns = [-(-length // block_size) for length in lengths]
        widest = max(columns)

        # Table entries after a sequence's end are no blocks. Its own first block replaces them: it
        # gets weight zero, and never holds NaN, as the block of another sequence might.
        tables = batch.block_tables[to_device(seqs, device)].long()[:, :widest]
        used = torch.arange(widest, device=device) < to_device(columns, device)[:, None]
        tables = torch.where(used, tables, tables[:, :1])  # [seqs, columns]
        positions = torch.arange(widest * block_size, device=device)
        hidden = positions >= to_device(lengths, device)[:, None]  # [seqs, positions]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -inf)

        starts = [spans[seq].start for seq in seqs]
        is_all = starts == list(range(len(batch.token_ids)))
        tokens = None if is_all else to_device(starts, device)
        forced = way == "in place"
        worth_it = forced or (way is None and _is_worth_it(sum(lengths), k_cache, num_heads))
        if worth_it and _is_possible(k_cache, dtype):
            in_place = _prepare_in_place(tables, used, columns, mask, forced)
            if in_place is not None:
                return cls(tokens, in_place, None)
        groups = _prepare_gathered(tables, columns, mask, k_cache)
        most = max([len(group.rows) for group in groups])
        scratch = torch.empty(2, most, block_size, head_dim, dtype=dtype, device=device)
        return cls(tokens, groups, scratch)

    def attend(
        self,
        q: Float[Tensor, "seqs heads head_dim"],
        k_cache: KVPool,
        v_cache: KVPool,
        scale: float,
    ) -> Float[Tensor, "seqs heads head_dim"]:
        """The last query of each sequence sees all its keys."""
        if isinstance(self.way, InPlace):
            k_blocks, v_blocks = cast(Tensor, k_cache), cast(Tensor, v_cache)  # as prepared
            return _attend_in_place(q, k_blocks, v_blocks, self.way, scale)
        keys, values = cast(Tensor, self.scratch)
        parts: list[Tensor] = []
        for each in self.way:
            queries = q[each.start : each.stop]
            parts.append(_attend_gathered(queries, k_cache, v_cache, each, keys, values, scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


# ------------------------------------------------------------------------------------- gathered


def _prepare_gathered(
    tables: Int[Tensor, "seqs columns"],
    columns: list[int],
    mask: Float[Tensor, "seqs positions"],
    k_cache: KVPool,
) -> list[Gathered]:
    """As many sequences at a time as are allowed, each group padded to its longest."""
    _, kv_heads, block_size, head_dim = k_cache.shape
    blocks_at_once = NUMBERS_AT_ONCE // (kv_heads * block_size * head_dim)
    groups: list[Gathered] = []
    start = 0
    while start < len(columns):
        longest = max(columns[start:])
        stop = min(len(columns), start + max(1, blocks_at_once // longest))
        rows = rows_of_blocks(tables[start:stop, :longest], kv_heads)
        part = mask[start:stop, None, None, : longest * block_size].contiguous()
        groups.append(Gathered(start, stop, rows, part))
        start = stop
    return groups


def _attend_gathered(
    q: Float[Tensor, "seqs heads head_dim"],
    k_cache: KVPool,
    v_cache: KVPool,
    group: Gathered,
    key_room: Tensor,
    value_room: Tensor,
    scale: float,
) -> Float[Tensor, "seqs heads head_dim"]:
    seqs, kv_heads = q.shape[0], k_cache.shape[1]
    keys = gather(k_cache, group.rows, q.dtype, key_room)
    values = gather(v_cache, group.rows, q.dtype, value_room)
    # The query heads of a KV head take the place of several queries of one head, as SDPA sees it:
    # the keys are read once for all of them.
    out = F.scaled_dot_product_attention(
        q.unflatten(1, (kv_heads, -1)),  # [seqs, kv_heads, group, head_dim]
        keys.view(seqs, kv_heads, -1, q.shape[2]),  # [seqs, kv_heads, positions, head_dim]
        values.view(seqs, kv_heads, -1, q.shape[2]),
        attn_mask=group.mask,
        scale=scale,
    )  # [seqs, kv_heads, group, head_dim]
    return out.flatten(1, 2)  # [seqs, heads, head_dim]


def rows_of_blocks(
    tables: Int[Tensor, "seqs columns"], kv_heads: int
) -> Int[Tensor, " rows_of_all"]:
    """Which rows of the pool to gather, so that each head's keys are contiguous.

    A row is the block of one head: block b of head h is row b * kv_heads + h.
    """
    heads = torch.arange(kv_heads, device=tables.device)[:, None]
    return (tables[:, None, :] * kv_heads + heads).flatten()  # [seqs * kv_heads * columns]


def gather(
    cache: KVPool, rows: Int[Tensor, " rows"], dtype: torch.dtype, scratch: Tensor | None = None
) -> Float[Tensor, "rows block_size head_dim"]:
    """These rows, in this type; in `scratch`, if there is one and they need no conversion."""
    if isinstance(cache, QuantizedPool):
        # float8 has no index_select, and needs none: to copy, any 8 bits will do.
        numbers = cache.numbers.view(torch.int8).flatten(0, 1).index_select(0, rows)
        scales = cache.scales.flatten(0, 1).index_select(0, rows)
        return (numbers.view(cache.numbers.dtype).float() * scales[..., None]).to(dtype)
    # index_select copies whole rows, and so is faster than indexing.
    if scratch is None or cache.dtype != dtype:
        return cache.flatten(0, 1).index_select(0, rows).to(dtype)
    return torch.index_select(cache.flatten(0, 1), 0, rows, out=scratch[: len(rows)])


# ------------------------------------------------------------------------------------- in place


def _is_possible(k_cache: KVPool, dtype: torch.dtype) -> bool:
    on_cpu = isinstance(k_cache, Tensor) and k_cache.device.type == "cpu"
    return on_cpu and k_cache.dtype == dtype


def _is_worth_it(num_keys: int, k_cache: KVPool, num_heads: int) -> bool:
    _, kv_heads, _, head_dim = k_cache.shape
    fewest = FEWEST_IN_PLACE if torch.get_num_threads() == 1 else FEWEST_FOR_SEVERAL_THREADS
    numbers = num_keys * kv_heads * head_dim
    return numbers >= fewest and num_heads <= LARGEST_GROUP * kv_heads


def _prepare_in_place(
    tables: Int[Tensor, "seqs columns"],
    used: Tensor,
    columns: list[int],
    mask: Float[Tensor, "seqs positions"],
    forced: bool,
) -> InPlace | None:
    """None if sequences share blocks or, unless forced, if it would be slow: see above."""
    blocks = tables[used]  # [used]
    first, stop = int(blocks.min()), int(blocks.max()) + 1
    is_dense = len(blocks) >= LEAST_IN_USE * (stop - first)
    is_even = tables.numel() <= MOST_ENTRIES * len(blocks)
    if not forced and not (is_dense and is_even):
        return None
    blocks = blocks - first
    entries = used.flatten().nonzero()[:, 0]  # [used]
    entry_of_block = torch.zeros(stop - first, dtype=torch.long)
    entry_of_block[blocks] = entries
    if not torch.equal(entry_of_block[blocks], entries):  # a block with two entries
        return None
    ends = torch.tensor(columns).cumsum(0)
    return InPlace(
        first,
        stop,
        owner=entry_of_block // tables.shape[1],
        block_of_entry=(tables - first).flatten(),
        entry_of_block=entry_of_block,
        blocks=blocks,
        starts=ends - torch.tensor(columns),
        mask=mask[:, None],
    )


def _attend_in_place(
    q: Float[Tensor, "seqs heads head_dim"],
    k_cache: Float[Tensor, "num_blocks kv_heads block_size head_dim"],
    v_cache: Float[Tensor, "num_blocks kv_heads block_size head_dim"],
    way: InPlace,
    scale: float,
) -> Float[Tensor, "seqs heads head_dim"]:
    """The range may include free blocks and blocks of prefills. They are multiplied too, and what
    comes out of that, be it NaN, is never looked at.
    """
    seqs, heads, head_dim = q.shape
    _, kv_heads, block_size, _ = k_cache.shape
    num_blocks = way.stop - way.first
    keys = k_cache[way.first : way.stop].flatten(0, 1)  # [blocks * kv_heads, block_size, ...]
    values = v_cache[way.first : way.stop].flatten(0, 1)
    queries = q.flatten(1).index_select(0, way.owner)  # [blocks, heads * head_dim]
    queries = queries.view(num_blocks * kv_heads, -1, head_dim)  # [.., group, head_dim]
    scores = torch.bmm(queries, keys.transpose(1, 2))  # [blocks * kv_heads, group, block_size]

    # From the order of blocks to that of positions, where softmax wants them, and back.
    scores = scores.view(num_blocks, -1).index_select(0, way.block_of_entry)
    scores = scores.view(seqs, -1, heads, block_size).transpose(1, 2)
    scores = scores.reshape(seqs, heads, -1)  # [seqs, heads, positions]
    weights = torch.add(way.mask, scores, alpha=scale).softmax(-1)
    weights = weights.view(seqs, heads, -1, block_size).transpose(1, 2)
    weights = weights.reshape(-1, heads * block_size)  # [entries, heads * block_size]
    weights = weights.index_select(0, way.entry_of_block)

    parts = torch.bmm(weights.view(num_blocks * kv_heads, -1, block_size), values)
    parts = parts.view(num_blocks, -1)  # [blocks, heads * head_dim]
    # The sum over the blocks of each sequence: what embedding_bag was made for.
    return F.embedding_bag(way.blocks, parts, way.starts, mode="sum").view_as(q)
