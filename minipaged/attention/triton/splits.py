# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
"""Splits: how many pieces decode cuts a sequence into, and how their results are merged.

What it computes   each split has a result for its own keys alone: a weighted average, and in
                   log_sums the logarithm of the sum of its weights. The result for all keys is the
                   average of the splits' results, each weighted by 2^log_sum.
Grid               (seqs, heads): each program merges the splits of one sequence and head.
Bytes              4 * head_dim per split and head, written by `decode` and read here: with splits
                   of 256 keys and 4 query heads per KV head, about 3 % of what decode reads.
Operations         2 * head_dim per split and head.

The paper has no such kernel: its attention used one thread block per sequence and head.
"""

from math import ceil

import triton
import triton.language as tl
from torch import Tensor

from minipaged.attention.batch import Batch
from minipaged.attention.triton.launch import on_its_gpu

SHORTEST_SPLIT = 256  # positions; with fewer, start-up and end dominate a program
LONGEST_SPLIT = 4096  # positions; with more, a few programs of one long sequence outlast all others
MOST_SPLITS = 128  # with more, merging costs more than splitting saves
INTERPRETED_PLACES = 16  # assumed without a GPU: few, but enough for some splits
SPLIT_RULE = {"SHORTEST": SHORTEST_SPLIT, "LONGEST": LONGEST_SPLIT, "MOST": MOST_SPLITS}


def splits_to_fill(num_seqs: int, kv_heads: int, places: int) -> int:
    """The number of splits per sequence that fills the GPU with concurrent programs.

    With more, some programs would wait for others to end.

    Args:
        places: programs that the GPU runs at the same time.
    """
    return min(max(1, places // (num_seqs * kv_heads)), MOST_SPLITS)


def most_splits(longest: int, to_fill: int, longest_split: int = LONGEST_SPLIT) -> int:
    """The number of splits of the longest sequence; `to_fill` is the number that fills the GPU.

    Filling the GPU is not enough: without more splits, one sequence of 32,000 keys among a hundred
    short ones keeps kv_heads programs busy long after all others have ended. The kernel applies
    this rule to every sequence, on the GPU. The host needs it only for the grid, where any upper
    bound of the longest length is enough: reading the exact length would wait for the GPU.

    With `to_fill` 1, the splits of a sequence depend on its own length alone (`fixed_split_size`).
    """
    not_too_long = ceil(longest / longest_split)
    no_slivers = ceil(longest / SHORTEST_SPLIT)
    return min(max(to_fill, not_too_long), no_slivers, MOST_SPLITS)


@triton.jit
def split_length(
    seq_len,
    to_fill,
    TILE: tl.constexpr,
    SHORTEST: tl.constexpr,
    LONGEST: tl.constexpr,
    MOST: tl.constexpr,
):
    """Positions in each split of a sequence of this length; see `most_splits`.

    Always whole tiles, so that only the last split, where the sequence ends, can end inside a tile.
    """
    splits = tl.minimum(tl.maximum(to_fill, (seq_len + LONGEST - 1) // LONGEST), MOST)
    tiles = (seq_len + splits * TILE - 1) // (splits * TILE)
    return tl.maximum(tiles * TILE, SHORTEST)


@on_its_gpu
def merge(
    out: Tensor,
    partial: Tensor,
    log_sums: Tensor,
    batch: Batch,
    to_fill: int,
    tile: int,
    longest_split: int = LONGEST_SPLIT,
) -> None:
    """Write to `out` the merged results of all sequences with one query.

    Args:
        out: [tokens, heads, head_dim].
        partial: [seqs, heads, splits, head_dim], float32.
        log_sums: [seqs, heads, splits], float32.
        to_fill: as `decode` was launched with.
        tile: the same.
        longest_split: the same.
    """
    num_seqs, heads, num_splits, head_dim = partial.shape
    merge_kernel[(num_seqs, heads)](
        out,
        partial,
        log_sums,
        batch.cu_seqlens_q,
        batch.context_lens,
        to_fill,
        num_splits,
        HEADS=heads,
        HEAD_DIM=head_dim,
        WIDTH=triton.next_power_of_2(head_dim),
        SPLITS_WIDTH=triton.next_power_of_2(num_splits),
        TILE=tile,
        num_warps=4 if num_splits <= 32 else 8,
        **SPLIT_RULE | {"LONGEST": longest_split},
    )


@triton.jit(do_not_specialize=["to_fill", "num_splits"])
def merge_kernel(
    out,  # [tokens, heads, head_dim]
    partial,  # [seqs, heads, splits, head_dim] float32
    log_sums,  # [seqs, heads, splits] float32
    cu_seqlens_q,
    context_lens,
    to_fill,
    num_splits,  # allocated; a sequence may have fewer
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS_WIDTH: tl.constexpr,  # num_splits, or the next power of two
    TILE: tl.constexpr,
    SHORTEST: tl.constexpr,
    LONGEST: tl.constexpr,
    MOST: tl.constexpr,
):
    """Merge the splits of one sequence and head, each weighted by its share of all weights."""
    seq = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(cu_seqlens_q + seq)
    if tl.load(cu_seqlens_q + seq + 1) - token != 1:
        return
    seq_len = tl.load(context_lens + seq) + 1

    splits = tl.arange(0, SPLITS_WIDTH)
    split_len = split_length(seq_len, to_fill, TILE, SHORTEST, LONGEST, MOST)
    written = splits * split_len < seq_len  # the first is always
    dims = tl.arange(0, WIDTH)
    places = (seq.to(tl.int64) * HEADS + head) * num_splits + splits
    sums = tl.load(log_sums + places, mask=written, other=float("-inf"))  # [SPLITS_WIDTH]
    shares = tl.exp2(sums - tl.max(sums, axis=0))  # 0 where nothing was written
    results = tl.load(
        partial + places[:, None] * HEAD_DIM + dims[None, :],
        mask=written[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )  # [SPLITS_WIDTH, WIDTH]
    merged = tl.sum(shares[:, None] * results, axis=0) / tl.sum(shares, axis=0)
    place = (token.to(tl.int64) * HEADS + head) * HEAD_DIM
    tl.store(out + place + dims, merged, mask=dims < HEAD_DIM)
