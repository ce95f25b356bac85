# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
"""Splits: into how many pieces decode cuts a sequence, and how their results become one.

What it computes   each split has answered as if its keys were all. Its answer is an average, and
                   log_sums has the logarithm of what it was divided by; so the true answer is the
                   average of the answers, each weighted by 2^log_sum.
Grid               (seqs, heads): a program merges the splits of one sequence and head.
Bytes              4 * head_dim a split and head, written by `decode` and read here: with splits of
                   256 keys and 4 query heads per KV head, some 3 % of what decode reads.
Operations         2 * head_dim a split and head.

The paper has no such kernel: its attention gave a sequence and head to one thread block.
"""

from math import ceil

import triton
import triton.language as tl
from torch import Tensor

import minipaged.attention.triton.launch  # noqa: F401 - settles how kernels run
from minipaged.attention.batch import Batch

SHORTEST_SPLIT = 256  # positions; a program that does less is mostly beginning and end
LONGEST_SPLIT = 4096  # positions; else one long sequence keeps a few programs busy after all others
MOST_SPLITS = 128  # more, and merging them costs more than it saves
PROGRAMS_PER_SM = 4  # that find registers there at a time, with heads of 128 in 16 bits
SPLIT_RULE = {"SHORTEST": SHORTEST_SPLIT, "LONGEST": LONGEST_SPLIT, "MOST": MOST_SPLITS}


def splits_to_fill(num_seqs: int, kv_heads: int, num_sms: int) -> int:
    """How many splits of every sequence make as many programs as the GPU can hold at a time.

    Any more, and some would wait for others to end.

    Args:
        num_sms: multiprocessors of the GPU.
    """
    fitting = PROGRAMS_PER_SM * num_sms // (num_seqs * kv_heads)
    return min(max(1, fitting), MOST_SPLITS)


def most_splits(longest: int, to_fill: int) -> int:
    """Into how many splits the longest sequence is cut, `to_fill` being what fills the GPU.

    To fill the GPU is not all: one sequence of 32,000 keys among a hundred short ones is read by
    kv_heads programs, long after all others have ended, unless it is cut up. The kernel cuts every
    sequence by this rule, on the GPU. The host needs it for the grid only, and any bound of the
    longest length will do: to look it up on the GPU would be to wait for it.
    """
    not_too_long = ceil(longest / LONGEST_SPLIT)
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

    Whole tiles, so that only the last split ends inside one: there the sequence ends, too.
    """
    splits = tl.minimum(tl.maximum(to_fill, (seq_len + LONGEST - 1) // LONGEST), MOST)
    tiles = (seq_len + splits * TILE - 1) // (splits * TILE)
    return tl.maximum(tiles * TILE, SHORTEST)


def merge(
    out: Tensor, partial: Tensor, log_sums: Tensor, batch: Batch, to_fill: int, tile: int
) -> None:
    """Write to `out` the merged answers of all sequences with one query.

    Args:
        out: [tokens, heads, head_dim].
        partial: [seqs, heads, splits, head_dim], float32.
        log_sums: [seqs, heads, splits], float32.
        to_fill: as `decode` was launched with.
        tile: the same.
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
        **SPLIT_RULE,
    )


@triton.jit(do_not_specialize=["to_fill", "num_splits"])
def merge_kernel(
    out,  # [tokens, heads, head_dim]
    partial,  # [seqs, heads, splits, head_dim] float32
    log_sums,  # [seqs, heads, splits] float32
    cu_seqlens_q,
    context_lens,
    to_fill,
    num_splits,  # for which there is room; a sequence may have left some out
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS_WIDTH: tl.constexpr,  # num_splits, or the next power of two
    TILE: tl.constexpr,
    SHORTEST: tl.constexpr,
    LONGEST: tl.constexpr,
    MOST: tl.constexpr,
):
    """The splits of one sequence and head, each weighted by its share of all weights."""
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
