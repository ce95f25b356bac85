"""Decode with shared prefixes: their blocks are read once for all owners, not once per owner.

Sequences with the same prompt share its blocks: cached prefixes, samples, beams. Their block tables
begin with the same numbers, here up to the bar:

    sequence 0    7 2 9 | 4
    sequence 1    7 2 9 | 1 8
    sequence 2    7 2 9 | 3

If each sequence reads its whole table, block 7 is read three times, each time for one query. Here
it is read once and multiplied by the queries of all three owners: one matrix product instead of
three products of a matrix and a vector. What follows the bar is decoded as usual (`torch_decode`),
as if it were all of a shorter sequence. Then both results are merged (`log_sum_exp`).

A prefix ends with a full block, and before the last block of its shortest owner. A sequence has at
most one prefix: of nested ones, as in a tree of beams, those are chosen that save most. Blocks that
are still shared after that are read once per owner.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain, groupby
from math import inf
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minipaged.attention.batch import Batch
from minipaged.attention.log_sum_exp import attend_with_lse, merge, softmax_with_lse
from minipaged.attention.quantized_cache import KVPool
from minipaged.attention.torch_decode import (
    Decodes,
    Gathered,
    InPlace,
    gather,
    prepare_gathered,
    scores_in_place,
    sum_in_place,
)
from minipaged.utils.shapes import Float, Int

# Fewest elements of keys that reading prefixes once must save, for each call that does so.
FEWEST_SAVED = 2**19
# From so many elements of other keys on, a prefix is read once however short it is: a shared block
# would prevent them from being read in place.
MANY_OTHERS = 2**21


class Sharing(NamedTuple):
    """Sequences whose block tables begin with the same blocks."""

    seqs: Int[np.ndarray, " owners"]
    num_blocks: int

    @property
    def num_saved(self) -> int:
        """The number of times that a block is not read again: once for all owners but one."""
        return (len(self.seqs) - 1) * self.num_blocks


@dataclass(frozen=True)
class Prefixes:
    """Prefixes with equally many owners, in one batch: sequences with one query per owner."""

    blocks: Gathered
    owners: Int[Tensor, " owners"]  # numbers of queries: those of the first prefix, and so on


@dataclass(frozen=True)
class SharedDecodes:
    """The decodes of a batch in which sequences share prefixes, and how to attend to them."""

    own: Decodes  # every sequence without its prefix
    prefixes: list[Prefixes]
    scratch: Tensor  # [2, rows, block_size, head_dim], for keys and values of prefixes

    @property
    def tokens(self) -> Int[Tensor, " seqs"] | None:
        """Rows of the batch; None: all rows, in order."""
        return self.own.tokens

    def attend(
        self,
        q: Float[Tensor, "seqs heads head_dim"],
        k_cache: KVPool,
        v_cache: KVPool,
        scale: float,
    ) -> Float[Tensor, "seqs heads head_dim"]:
        """Compute the attention of each sequence's one query over all its keys."""
        out, lse = _attend_to_own(self.own, q, k_cache, v_cache, scale)
        for each in self.prefixes:
            queries = q.index_select(0, each.owners)  # [owners, heads, head_dim]
            of_prefix = _attend_to_prefixes(
                queries, k_cache, v_cache, each.blocks, self.scratch, scale
            )
            own = out.index_select(0, each.owners), lse.index_select(0, each.owners)
            out.index_copy_(0, each.owners, merge(own, of_prefix))
        return out


# --------------------------------------------------------------------------------- once per step


def prepare_decodes(
    batch: Batch,
    k_cache: KVPool,
    num_heads: int,
    dtype: torch.dtype,
    fewest_saved: int | None = None,  # None: what should be fastest
) -> Decodes | SharedDecodes | None:
    """Prepare what all layers of this step share; None if no sequence decodes."""
    calls = _choose_calls(batch, k_cache, fewest_saved)
    if not calls:
        return Decodes.prepare(batch, k_cache, num_heads, dtype)
    _, _, block_size, head_dim = k_cache.shape
    shorter = _without_prefixes(batch, chain.from_iterable(calls), block_size)
    own = Decodes.prepare(shorter, k_cache, num_heads, dtype)
    assert own is not None, "an owner of a prefix decodes"
    prefixes = [p for call in calls for p in _prepare_prefixes(call, batch, own, k_cache, dtype)]
    most = max(len(each.blocks.rows) for each in prefixes)
    return SharedDecodes(own, prefixes, torch.empty(2, most, block_size, head_dim, dtype=dtype))


def _choose_calls(batch: Batch, k_cache: KVPool, fewest_saved: int | None) -> list[list[Sharing]]:
    """Choose the prefixes to read once; those with equally many owners are read in one call."""
    _, kv_heads, block_size, head_dim = k_cache.shape
    decodes = batch.query_lens == 1  # [seqs]
    # A sequence keeps a block of its own, so that no part is empty.
    can_share = decodes * ((batch.seq_lens - 1) // block_size)  # [seqs]
    fewest = FEWEST_SAVED if fewest_saved is None else fewest_saved
    fewest_blocks = fewest / (kv_heads * block_size * head_dim)
    if can_share.sum() < fewest_blocks or k_cache.device.type != "cpu":
        return []  # on a GPU, block tables are not on the host
    found = find_prefixes(batch.block_tables.numpy(), can_share, can_share.nonzero()[0])
    num_shared = block_size * sum(len(each.seqs) * each.num_blocks for each in found)
    num_others = int(batch.seq_lens[decodes].sum()) - num_shared
    if fewest_saved is None and num_others * kv_heads * head_dim >= MANY_OTHERS:
        fewest_blocks = 0

    def num_owners(sharing: Sharing) -> int:
        return len(sharing.seqs)

    found.sort(key=lambda each: (num_owners(each), each.num_blocks), reverse=True)
    calls = [list(call) for _, call in groupby(found, num_owners)]
    return [call for call in calls if sum(each.num_saved for each in call) >= fewest_blocks]


def find_prefixes(
    tables: Int[np.ndarray, "all columns"],
    can_share: Int[np.ndarray, " all"],  # number of leading blocks of each sequence, at most
    seqs: Int[np.ndarray, " seqs"],  # those to choose from
) -> list[Sharing]:
    """Choose the prefixes that save most, at most one for each sequence.

    Block tables form a tree. Where it branches, there are two choices: one prefix that ends there,
    for all sequences, or longer prefixes, each for the sequences of one branch.
    """
    if len(seqs) < 2:
        return []
    longest = int(can_share[seqs].min())
    is_common = (tables[seqs, :longest] == tables[seqs[0], :longest]).all(axis=0)  # [longest]
    num_blocks = longest if is_common.all() else int(is_common.argmin())
    together = Sharing(seqs, num_blocks)

    longer = seqs[can_share[seqs] > num_blocks]
    next_blocks = tables[longer, num_blocks] if len(longer) else longer
    apart: list[Sharing] = []
    for block, count in zip(*np.unique(next_blocks, return_counts=True), strict=True):
        if count > 1:
            apart += find_prefixes(tables, can_share, longer[next_blocks == block])
    return [together] if together.num_saved > sum(each.num_saved for each in apart) else apart


def _without_prefixes(batch: Batch, found: Iterable[Sharing], block_size: int) -> Batch:
    """The batch as if each owner's sequence began after its prefix."""
    left_out = np.zeros(batch.num_seqs, np.int64)  # blocks of each sequence
    for seqs, num_blocks in found:
        left_out[seqs] = num_blocks
    width = batch.block_tables.shape[1]
    columns = (np.arange(width) + left_out[:, None]).clip(max=width - 1)  # [seqs, columns]
    return replace(
        batch,
        block_tables=batch.block_tables.gather(1, torch.from_numpy(columns)),
        context_lens=batch.context_lens - torch.from_numpy(left_out * block_size).int(),
        seq_lens=batch.seq_lens - left_out * block_size,
    )


def _prepare_prefixes(
    call: list[Sharing], batch: Batch, own: Decodes, k_cache: KVPool, dtype: torch.dtype
) -> list[Prefixes]:
    """Prepare prefixes like sequences, padded to the longest, in pieces of the allowed size."""
    # Number of each decoding sequence's query, by the sequence's first token
    starts = range(batch.num_seqs) if own.tokens is None else own.tokens.tolist()
    query_of = {start: number for number, start in enumerate(starts)}

    columns = [each.num_blocks for each in call]
    used = torch.arange(columns[0]) < torch.tensor(columns)[:, None]  # [prefixes, columns]
    tables = batch.block_tables[[each.seqs[0] for each in call], : columns[0]].long()
    tables = torch.where(used, tables, tables[:, :1])
    hidden = ~used.repeat_interleave(k_cache.shape[2], dim=1)  # [prefixes, positions]
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -inf)
    prefixes: list[Prefixes] = []
    for piece in prepare_gathered(tables, columns, mask, k_cache):
        seqs = np.concatenate([each.seqs for each in call[piece.start : piece.stop]])
        owners = [query_of[batch.spans[seq].start] for seq in seqs]
        prefixes.append(Prefixes(piece, torch.tensor(owners)))
    return prefixes


# ------------------------------------------------------------------------------- in every layer


def _attend_to_prefixes(
    q: Float[Tensor, "owners heads head_dim"],
    k_cache: KVPool,
    v_cache: KVPool,
    blocks: Gathered,
    scratch: Float[Tensor, "2 rows block_size head_dim"],
    scale: float,
) -> tuple[Float[Tensor, "owners heads head_dim"], Float[Tensor, "owners heads"]]:
    """Multiply each key by the queries of all its owners."""
    num, kv_heads, head_dim = blocks.stop - blocks.start, k_cache.shape[1], q.shape[2]
    keys = gather(k_cache, blocks.rows, q.dtype, scratch[0]).view(num, kv_heads, -1, head_dim)
    values = gather(v_cache, blocks.rows, q.dtype, scratch[1]).view(num, kv_heads, -1, head_dim)
    queries = q.view(num, -1, kv_heads, q.shape[1] // kv_heads, head_dim).transpose(1, 2)
    each = queries.shape[2:4]  # owners of a prefix, query heads of a KV head
    out, lse = attend_with_lse(queries.flatten(2, 3), keys, values, blocks.mask, scale)
    out = out.unflatten(2, each).transpose(1, 2)  # [prefixes, owners of each, kv_heads, group, ..]
    lse = lse.unflatten(2, each).transpose(1, 2)
    return out.reshape(q.shape), lse.reshape(q.shape[:2])


def _attend_to_own(
    own: Decodes,
    q: Float[Tensor, "seqs heads head_dim"],
    k_cache: KVPool,
    v_cache: KVPool,
    scale: float,
) -> tuple[Float[Tensor, "seqs heads head_dim"], Float[Tensor, "seqs heads"]]:
    """As `Decodes.attend`, with the log-sum-exp, which PyTorch's own attention does not return."""
    if isinstance(own.way, InPlace):
        weights, lse = softmax_with_lse(scores_in_place(q, k_cache, own.way, scale))
        return sum_in_place(weights, v_cache, own.way), lse
    parts: list[tuple[Tensor, Tensor]] = []
    for each in own.way:
        queries, keys, values = own.gathered(q, k_cache, v_cache, each)
        parts.append(attend_with_lse(queries, keys, values, each.mask, scale))
    out, lse = map(torch.cat, zip(*parts, strict=True))  # [seqs, kv_heads, group, ...]
    return out.flatten(1, 2), lse.flatten(1, 2)
