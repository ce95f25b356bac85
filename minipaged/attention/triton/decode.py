# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
"""Decode: one query a sequence against all its keys, at the speed of the memory.

What it computes   for every sequence with one query token, attention over its keys in the pool
                   (section 4.1, Equation 4). Sequences with more queries are left to `prefill`.
Grid               (kv_heads, seqs, splits): the keys of a sequence are cut into splits, a program
                   each, so that few long sequences fill the GPU as well as many short ones.

                       sequence 0, 900 keys    [ split 0 ][ split 1 ][ split 2 ][ 3 ]
                       sequence 1, 450 keys    [ split 0 ][    1   ]   -   -      - ends at once
                       sequence 2, 120 keys    [   0 ]   -   -   -

                   With one split a program writes its result. With more, it leaves a partial
                   result, and a second kernel merges those of a sequence and head.
Bytes              2 * seq_len * kv_heads * head_dim numbers a sequence, each read once: a program
                   serves all query heads of its key head. (Queries, tables and results are less
                   than a hundredth of that from 100 keys on.) This is the floor: bytes / bandwidth.
Operations         4 * seq_len * heads * head_dim: in half precision as many a byte as query heads
                   share a key head, 1 to 8, where a GPU could do some 200. So the arithmetic is
                   free, even though a matrix of 16 rows is multiplied for those 1 to 8 heads.

Of the paper's kernels (section 5.1) it is "fused block read and attention".
"""

from math import ceil
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipaged.attention.reference import heads_per_kv_head
from minipaged.attention.triton.launch import LOG2_E, math_type, pointers, pool_constants
from minipaged.attention.triton.machine import num_sms
from minipaged.attention.triton.tile import attend_to_tile, load_query
from minipaged.batch import Batch
from minipaged.quantized import KVPool

SHORTEST_SPLIT = 256  # positions; a program that does less is mostly beginning and end
LONGEST_SPLIT = 4096  # positions; else one long sequence keeps a few programs busy after all others
MOST_SPLITS = 128  # more, and merging them costs more than it saves
PROGRAMS_PER_SM = 4  # as many as find registers there: splits are made until the GPU is full


def choose_num_splits(num_seqs: int, kv_heads: int, longest: int, num_sms: int) -> int:
    """Into how many pieces the longest sequence is cut, a power of two; a shorter one fills fewer.

    From numbers that the host knows: looking at the lengths on the GPU would make it wait for it.
    A power of two, since each number of splits is a kernel of its own, to be compiled.

    Args:
        longest: keys of the longest sequence, or more.
        num_sms: multiprocessors of the GPU.
    """
    fill_the_gpu = ceil(PROGRAMS_PER_SM * num_sms / (num_seqs * kv_heads))
    # Batch and heads alone do not decide: one sequence of 32,000 keys among a hundred short ones
    # is read by kv_heads programs, long after all others are done, unless it is cut up.
    cut_the_longest = ceil(longest / LONGEST_SPLIT)
    not_to_slivers = ceil(longest / SHORTEST_SPLIT)
    num_splits = min(max(fill_the_gpu, cut_the_longest), not_to_slivers)
    return min(triton.next_power_of_2(num_splits), MOST_SPLITS)


class TileShape(NamedTuple):
    """How a program of `decode` works; `minipaged bench tune` measures others."""

    tile: int  # positions
    num_warps: int
    num_stages: int  # tiles in flight


def choose_tile(width: int, query_bytes: int, cache_bytes: int) -> TileShape:
    """The shape for tiles with rows of so many numbers, and so many bytes a number."""
    if query_bytes == 4 and width >= 128:  # float32 takes many registers; see `prefill`
        return TileShape(16, 8, 2)
    return TileShape(64 if width * cache_bytes <= 256 else 32, 4, 3)


def decode(
    q: Tensor,
    k_cache: KVPool,
    v_cache: KVPool,
    batch: Batch,
    scale: float,
    out: Tensor,
    num_splits: int | None = None,
    shape: TileShape | None = None,
) -> None:
    """Write to `out` the attention of all sequences with one query.

    Args:
        q, out: [tokens, heads, head_dim]; the rows of other sequences are left alone.
        num_splits: pieces of a sequence, a power of two; None: `choose_num_splits`.
        shape: None: `choose_tile`.
    """
    _, heads, head_dim = q.shape
    constants = pool_constants(k_cache)
    kv_heads, width = constants["KV_HEADS"], constants["WIDTH"]
    tensors = pointers(k_cache, v_cache)
    if shape is None:
        shape = choose_tile(width, q.itemsize, tensors[0].itemsize)
    if num_splits is None:
        num_splits = choose_num_splits(batch.num_seqs, kv_heads, batch.longest, num_sms(q.device))
    cut = {"TILE": shape.tile, "NUM_SPLITS": num_splits, "SHORTEST": SHORTEST_SPLIT}

    partial, lse = out, out  # with one split there is nothing to merge, and these are not written
    if num_splits > 1:
        pieces = (batch.num_seqs, heads, num_splits)
        partial = torch.empty((*pieces, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty(pieces, dtype=torch.float32, device=q.device)
    decode_kernel[(kv_heads, batch.num_seqs, num_splits)](
        out,
        partial,
        lse,
        q,
        *tensors,
        batch.query_starts,
        batch.context_lens,
        batch.block_tables,
        scale * LOG2_E,
        q.stride(0),
        q.stride(1),
        batch.block_tables.stride(0),
        HEADS=heads,
        GROUP=heads_per_kv_head(q, k_cache, v_cache),
        ROWS=max(16, triton.next_power_of_2(heads // kv_heads)),
        MATH=math_type(q.dtype),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        **cut,
        **constants,
    )
    if num_splits > 1:
        merge_kernel[(batch.num_seqs, heads)](
            out,
            partial,
            lse,
            batch.query_starts,
            batch.context_lens,
            HEADS=heads,
            HEAD_DIM=head_dim,
            WIDTH=width,
            num_warps=4 if num_splits <= 32 else 8,
            **cut,
        )


@triton.jit(do_not_specialize=["table_stride"])  # it changes while sequences grow
def decode_kernel(
    out,  # [tokens, heads, head_dim]
    partial,  # [seqs, heads, splits, head_dim] float32: what each split alone would answer
    lse,  # [seqs, heads, splits] float32: log2 of the sum of its weights
    q,  # [tokens, heads, head_dim]
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    query_starts,
    context_lens,
    block_tables,
    scale,  # of scores, times log2(e)
    q_token_stride,
    q_head_stride,
    table_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads that share a key head
    ROWS: tl.constexpr,  # GROUP, padded to what tl.dot takes
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SHORTEST: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    MATH: tl.constexpr,
):
    """One split of one sequence, for the query heads of one key head."""
    kv_head = tl.program_id(0)
    seq = tl.program_id(1)
    split = tl.program_id(2)

    token = tl.load(query_starts + seq)
    if tl.load(query_starts + seq + 1) - token != 1:
        return  # not decoding, or padding
    seq_len = tl.load(context_lens + seq) + 1
    split_len = _split_len(seq_len, TILE, NUM_SPLITS, SHORTEST)
    start = split * split_len
    end = tl.minimum(start + split_len, seq_len)
    if start >= end:
        return  # a short sequence has fewer splits

    rows = tl.arange(0, ROWS)
    is_row = rows < GROUP
    heads = kv_head * GROUP + rows
    tokens = tl.full([ROWS], 0, tl.int32) + token
    query = load_query(
        q, tokens, heads, is_row, q_token_stride, q_head_stride, HEAD_DIM, WIDTH, MATH
    )
    last_position = tl.full([ROWS], 0, tl.int32) + (seq_len - 1)
    table = block_tables + seq.to(tl.int64) * table_stride

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    output = tl.full([ROWS, WIDTH], 0.0, tl.float32)
    whole_tiles_end = start + (end - start) // TILE * TILE
    for tile_start in range(start, whole_tiles_end, TILE):  # without masks: most of the time
        maximum, total, output = attend_to_tile(
            maximum, total, output, query, last_position, tile_start, end,
            k_cache, v_cache, k_scales, v_scales, table, kv_head, scale,
            KV_HEADS, HEAD_DIM, WIDTH, BLOCK_SIZE, TILE, False, QUANTIZED, MATH,
        )  # fmt: skip
    if whole_tiles_end < end:
        maximum, total, output = attend_to_tile(
            maximum, total, output, query, last_position, whole_tiles_end, end,
            k_cache, v_cache, k_scales, v_scales, table, kv_head, scale,
            KV_HEADS, HEAD_DIM, WIDTH, BLOCK_SIZE, TILE, True, QUANTIZED, MATH,
        )  # fmt: skip

    dims = tl.arange(0, WIDTH)
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    result = output / total[:, None]  # [ROWS, WIDTH]
    if NUM_SPLITS == 1:
        places = tokens.to(tl.int64) * HEADS + heads  # [ROWS]
        tl.store(out + places[:, None] * HEAD_DIM + dims[None, :], result, mask=mask)
    else:
        places = (seq.to(tl.int64) * HEADS + heads) * NUM_SPLITS + split  # [ROWS]
        tl.store(partial + places[:, None] * HEAD_DIM + dims[None, :], result, mask=mask)
        tl.store(lse + places, maximum + tl.log2(total), mask=is_row)


@triton.jit
def merge_kernel(
    out,  # [tokens, heads, head_dim]
    partial,  # [seqs, heads, splits, head_dim] float32
    lse,  # [seqs, heads, splits] float32
    query_starts,
    context_lens,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SHORTEST: tl.constexpr,
):
    """The splits of one sequence and head, each weighted by its share of all weights."""
    seq = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(query_starts + seq)
    if tl.load(query_starts + seq + 1) - token != 1:
        return
    seq_len = tl.load(context_lens + seq) + 1

    splits = tl.arange(0, NUM_SPLITS)
    split_len = _split_len(seq_len, TILE, NUM_SPLITS, SHORTEST)
    written = splits * split_len < seq_len  # the first is always
    dims = tl.arange(0, WIDTH)
    places = (seq.to(tl.int64) * HEADS + head) * NUM_SPLITS + splits
    sums = tl.load(lse + places, mask=written, other=float("-inf"))  # [NUM_SPLITS]
    shares = tl.exp2(sums - tl.max(sums, axis=0))  # 0 where nothing was written
    results = tl.load(
        partial + places[:, None] * HEAD_DIM + dims[None, :],
        mask=written[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )  # [NUM_SPLITS, WIDTH]
    merged = tl.sum(shares[:, None] * results, axis=0) / tl.sum(shares, axis=0)
    place = (token.to(tl.int64) * HEADS + head) * HEAD_DIM
    tl.store(out + place + dims, merged, mask=dims < HEAD_DIM)


@triton.jit
def _split_len(seq_len, TILE: tl.constexpr, NUM_SPLITS: tl.constexpr, SHORTEST: tl.constexpr):
    """Positions in each split of a sequence of this length: whole tiles, and no slivers."""
    tiles = (seq_len + TILE * NUM_SPLITS - 1) // (TILE * NUM_SPLITS)
    return tl.maximum(tiles, SHORTEST // TILE) * TILE
