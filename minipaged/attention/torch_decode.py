"""Decode in pure PyTorch: one query per sequence, and two ways to read the blocks.

    gathered   copy the blocks of a few sequences at a time into a contiguous buffer, and call
               PyTorch's attention (SDPA) on it. Each key is read, written, and read again
    in place   multiply every block in place by the query of its owner, and reorder only the
               scores, which have 1 / head_dim as many elements. Each key is read once

In place takes about as long as SDPA over contiguous keys, but it launches more operations, and it
multiplies every block between the first and the last one in use. It therefore suits large batches
that use most of that range; there it is up to twice as fast. `Decodes.prepare` chooses, once per
step, because the choice is the same in every layer.
"""

from dataclasses import dataclass
from math import inf
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipaged.attention.batch import Batch
from minipaged.attention.quantized_cache import KVPool, QuantizedPool
from minipaged.utils.device import to_device
from minipaged.utils.shapes import Float, Int

Way = Literal["gathered", "in place"]

# Elements to gather at a time, at most. A copy of this size is still in the processor's cache when
# attention reads it.
NUMBERS_AT_ONCE = 2**20
# Fewest elements for in place: below, launching operations dominates.
FEWEST_IN_PLACE = 2**17
# Smallest part of the range of blocks that must be in use for in place: the rest is wasted work.
LEAST_IN_USE = 2 / 3
# Most entries per block for in place, in a table of all sequences padded to the longest.
MOST_ENTRIES = 4
# Most query heads per KV head for in place: with larger groups, SDPA is faster.
LARGEST_GROUP = 3


@dataclass(frozen=True)
class Gathered:
    """Some sequences of similar length, gathered into one batch."""

    start: int  # sequences [start, stop) of those that decode
    stop: int
    rows: Int[Tensor, " rows"]  # of the pool, where the block of one head is a row
    mask: Float[Tensor, "seqs 1 1 positions"]


@dataclass(frozen=True)
class InPlace:
    """All decoding sequences at once, in the blocks [first, stop) of the pool.

    A table entry is one column of one sequence in a table of all, padded to the longest.
    """

    first: int
    stop: int
    owner: Int[Tensor, " blocks"]  # the sequence whose query each block is multiplied by
    block_of_entry: Int[Tensor, " entries"]
    entry_of_block: Int[Tensor, " blocks"]
    blocks: Int[Tensor, " used"]  # those of each sequence, one sequence after another
    starts: Int[Tensor, " seqs"]  # index in `blocks` of each sequence's first block
    mask: Float[Tensor, "seqs 1 positions"]


@dataclass(frozen=True)
class Decodes:
    """The sequences of a batch with one query, and how to attend to them."""

    tokens: Int[Tensor, " seqs"] | None  # rows of the batch; None: all rows, in order
    way: InPlace | list[Gathered]
    scratch: Tensor | None  # [2, rows, block_size, head_dim], for gathered keys and values

    @classmethod
    def prepare(
        cls,
        batch: Batch,
        k_cache: KVPool,
        num_heads: int,
        dtype: torch.dtype,
        way: Way | None = None,  # None: the way that should be faster
    ) -> "Decodes | None":
        """Prepare what all layers of this step share; None if no sequence decodes.

        Shared blocks are gathered even if `way` is "in place".
        """
        seqs: list[int] = np.flatnonzero(batch.query_lens == 1).tolist()
        if not seqs:
            return None
        _, kv_heads, block_size, head_dim = k_cache.shape
        device = batch.block_tables.device
        lengths: list[int] = batch.seq_lens[seqs].tolist()
        numbers_if_padded = len(seqs) * max(lengths) * kv_heads * head_dim
        if numbers_if_padded > NUMBERS_AT_ONCE:  # sorted by length, groups need little padding
            seqs.sort(key=lambda seq: batch.seq_lens[seq], reverse=True)
            lengths.sort(reverse=True)
        columns = [-(-length // block_size) for length in lengths]
        widest = max(columns)

        # Table entries after a sequence's end are not block numbers. Its own first block replaces
        # them: its weight there is zero, and unlike another sequence's block it never contains NaN.
        tables, context_lens = batch.block_tables.long()[:, :widest], batch.context_lens
        if seqs != list(range(len(batch.seq_lens))):
            chosen = to_device(seqs, device)
            tables, context_lens = tables[chosen], context_lens[chosen]
        positions = torch.arange(widest * block_size, device=device)
        hidden = positions >= context_lens[:, None] + 1  # [seqs, positions]
        used = ~hidden[:, ::block_size]  # [seqs, columns]
        tables = torch.where(used, tables, tables[:, :1])  # [seqs, columns]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -inf)

        is_all = seqs == list(range(len(batch.token_ids)))
        tokens = None if is_all else to_device([batch.spans[seq].start for seq in seqs], device)
        forced = way == "in place"
        worth_it = forced or (way is None and _is_worth_it(sum(lengths), k_cache, num_heads))
        if worth_it and _is_possible(k_cache, dtype):
            in_place = _prepare_in_place(tables, used, columns, mask, forced)
            if in_place is not None:
                return cls(tokens, in_place, None)
        groups = prepare_gathered(tables, columns, mask, k_cache)
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
        """Compute the attention of each sequence's one query over all its keys."""
        if isinstance(self.way, InPlace):
            weights = scores_in_place(q, k_cache, self.way, scale).softmax(-1)
            return sum_in_place(weights, v_cache, self.way)
        parts: list[Tensor] = []
        for each in self.way:
            queries, keys, values = self.gathered(q, k_cache, v_cache, each)
            out = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=each.mask, scale=scale
            )  # [seqs, kv_heads, group, head_dim]
            parts.append(out.flatten(1, 2))  # [seqs, heads, head_dim]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def gathered(
        self, q: Tensor, k_cache: KVPool, v_cache: KVPool, group: Gathered
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gather the queries, keys and values of a group: [seqs, kv_heads, .., head_dim] each."""
        kv_heads, head_dim = k_cache.shape[1], q.shape[2]
        # The query heads of a KV head are passed as several queries of one head, so the keys are
        # read once for all of them.
        queries = q[group.start : group.stop].unflatten(1, (kv_heads, -1))
        key_room, value_room = cast(Tensor, self.scratch)
        keys = gather(k_cache, group.rows, q.dtype, key_room)
        values = gather(v_cache, group.rows, q.dtype, value_room)
        sizes = len(queries), kv_heads, -1, head_dim
        return queries, keys.view(sizes), values.view(sizes)


# ------------------------------------------------------------------------------------- gathered


def prepare_gathered(
    tables: Int[Tensor, "seqs columns"],
    columns: list[int],
    mask: Float[Tensor, "seqs positions"],
    k_cache: KVPool,
) -> list[Gathered]:
    """Split the sequences into groups of the allowed size, each padded to its longest."""
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


def rows_of_blocks(
    tables: Int[Tensor, "seqs columns"], kv_heads: int
) -> Int[Tensor, " rows_of_all"]:
    """Return the rows of the pool to gather, such that each head's keys are contiguous.

    A row is the block of one head: block b of head h is row b * kv_heads + h.
    """
    heads = torch.arange(kv_heads, device=tables.device)[:, None]
    return (tables[:, None, :] * kv_heads + heads).flatten()  # [seqs * kv_heads * columns]


def gather(
    cache: KVPool, rows: Int[Tensor, " rows"], dtype: torch.dtype, scratch: Tensor | None = None
) -> Float[Tensor, "rows block_size head_dim"]:
    """Gather these rows in this dtype; into `scratch`, if given, unless they need conversion."""
    if isinstance(cache, QuantizedPool):
        # index_select does not support float8, so the bits are copied as int8.
        numbers = cache.numbers.view(torch.int8).flatten(0, 1).index_select(0, rows)
        scales = cache.scales.flatten(0, 1).index_select(0, rows)
        return (numbers.view(cache.numbers.dtype).float() * scales[..., None]).to(dtype)
    # index_select copies whole rows, so it is faster than indexing.
    if scratch is None or cache.dtype != dtype:
        return cache.flatten(0, 1).index_select(0, rows).to(dtype)
    return torch.index_select(cache.flatten(0, 1), 0, rows, out=scratch[: len(rows)])


# ------------------------------------------------------------------------------------- in place


def _is_possible(k_cache: KVPool, dtype: torch.dtype) -> bool:
    on_cpu = isinstance(k_cache, Tensor) and k_cache.device.type == "cpu"
    return on_cpu and k_cache.dtype == dtype


def _is_worth_it(num_keys: int, k_cache: KVPool, num_heads: int) -> bool:
    _, kv_heads, _, head_dim = k_cache.shape
    numbers = num_keys * kv_heads * head_dim
    return numbers >= FEWEST_IN_PLACE and num_heads <= LARGEST_GROUP * kv_heads


def _prepare_in_place(
    tables: Int[Tensor, "seqs columns"],
    used: Tensor,
    columns: list[int],
    mask: Float[Tensor, "seqs positions"],
    forced: bool,
) -> InPlace | None:
    """Prepare reading in place; None if sequences share blocks or, unless forced, if it is slow."""
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


def scores_in_place(
    q: Float[Tensor, "seqs heads head_dim"], k_cache: KVPool, way: InPlace, scale: float
) -> Float[Tensor, "seqs heads positions"]:
    """Multiply keys in place, and reorder the scores from blocks to positions, for softmax."""
    seqs, heads, head_dim = q.shape
    keys = cast(Tensor, k_cache)[way.first : way.stop].flatten(0, 1)  # [rows, block_size, head_dim]
    queries = q.flatten(1).index_select(0, way.owner)  # [blocks, heads * head_dim]
    queries = queries.view(len(keys), -1, head_dim)  # [rows, group, head_dim]
    scores = torch.bmm(queries, keys.transpose(1, 2))  # [rows, group, block_size]
    # From here, results of free blocks and of prefills are dropped.
    scores = scores.view(len(way.owner), -1).index_select(0, way.block_of_entry)
    scores = scores.view(seqs, -1, heads, keys.shape[1]).transpose(1, 2)
    scores = scores.reshape(seqs, heads, -1)  # [seqs, heads, positions]
    return torch.add(way.mask, scores, alpha=scale)


def sum_in_place(
    weights: Float[Tensor, "seqs heads positions"], v_cache: KVPool, way: InPlace
) -> Float[Tensor, "seqs heads head_dim"]:
    """Reorder the weights from positions to blocks, and multiply values in place."""
    seqs, heads, _ = weights.shape
    num_blocks = way.stop - way.first
    values = cast(Tensor, v_cache)[way.first : way.stop].flatten(0, 1)  # [rows, block_size, ...]
    weights = weights.view(seqs, heads, -1, values.shape[1]).transpose(1, 2)
    weights = weights.reshape(-1, heads * values.shape[1])  # [entries, heads * block_size]
    weights = weights.index_select(0, way.entry_of_block)
    parts = torch.bmm(weights.view(len(values), -1, values.shape[1]), values)
    parts = parts.view(num_blocks, -1)  # [blocks, heads * head_dim]
    # embedding_bag sums over the blocks of each sequence.
    sums = F.embedding_bag(way.blocks, parts, way.starts, mode="sum")
    return sums.view(seqs, heads, -1)
