# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
"""Decode: one query per sequence against all its keys, at memory speed.

What it computes   for every sequence with one query token, attention over its keys in the pool
                   (section 4.1, Equation 4). `prefill` computes sequences with more queries.
Grid               (kv_heads, seqs, splits): the keys of a sequence are cut into splits, one program
                   each, so that a few long sequences fill the GPU as well as many short ones.

                       sequence 0, 2,000 keys    [ 512 ][ 512 ][ 512 ][ 464 ]
                       sequence 1,   900 keys    [ 256 ][ 256 ][ 256 ][ 132 ]
                       sequence 2,   400 keys    [ 256 ][ 144 ]   -      -     - ends at once

                   With one split, a program writes the final result. With more, it writes a
                   partial result, and a second kernel merges those of each sequence and head.
                   Heads come first in the grid, because the heads of one block are contiguous and
                   are read together.
Bytes              2 * seq_len * kv_heads * head_dim elements per sequence, each read once: a
                   program serves all query heads of its KV head. (Queries and results add less
                   than 1 % if a sequence has more than 100 keys per query head of a group.) This
                   is the floor: bytes / bandwidth. A split adds 8 * heads * head_dim bytes.
Operations         4 * seq_len * heads * head_dim: in half precision, the operations per byte equal
                   the query heads per KV head, 1 to 8, and a GPU could do about 200. The
                   arithmetic is therefore free, although the tensor cores multiply 16 rows for
                   those 1 to 8 heads.

Of the paper's kernels (section 5.1) it is "fused block read and attention".
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipaged.attention.batch import Batch
from minipaged.attention.quantized_cache import KVPool
from minipaged.attention.reference import heads_per_kv_head
from minipaged.attention.triton.launch import (
    LOG2_E,
    math_type,
    on_its_gpu,
    pointers,
    pool_constants,
)
from minipaged.attention.triton.machine import has_large_sms, is_interpreted, programs_per_gpu
from minipaged.attention.triton.shapes import TileShape, choose_tile
from minipaged.attention.triton.splits import (
    INTERPRETED_PLACES,
    SPLIT_RULE,
    merge,
    most_splits,
    split_length,
    splits_to_fill,
)
from minipaged.attention.triton.tile import (
    attend_to_tile,
    begin_output,
    load_blocks,
    load_query,
    whole_output,
)


@on_its_gpu
def decode(
    q: Tensor,
    k_cache: KVPool,
    v_cache: KVPool,
    batch: Batch,
    scale: float,
    out: Tensor,
    to_fill: int | None = None,
    shape: TileShape | None = None,
    fixed_split_size: int | None = None,
) -> None:
    """Write to `out` the attention of all sequences with one query.

    Args:
        q: [tokens, heads, head_dim].
        out: the same; rows of other sequences are not written.
        to_fill: splits per sequence that fill the GPU; None: as `count_places` allows.
        shape: None: `choose_tile`.
        fixed_split_size: positions per split, whatever the batch; then `to_fill` has no effect.
    """
    _, heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    constants = _constants(q, k_cache, v_cache, shape)
    tensors = pointers(k_cache, v_cache)
    if fixed_split_size is not None:
        to_fill, constants["LONGEST"] = 1, fixed_split_size
    elif to_fill is None:
        to_fill = splits_to_fill(batch.num_seqs, kv_heads, _places(q, tensors, constants))
    num_splits = most_splits(batch.longest, to_fill, constants["LONGEST"])

    partial, log_sums = out, out  # not written if there is one split: there is nothing to merge
    if num_splits > 1:
        pieces = (batch.num_seqs, heads, num_splits)
        partial = torch.empty((*pieces, head_dim), dtype=torch.float32, device=q.device)
        log_sums = torch.empty(pieces, dtype=torch.float32, device=q.device)
    decode_kernel[(kv_heads, batch.num_seqs, num_splits)](
        out,
        partial,
        log_sums,
        q,
        *tensors,
        batch.cu_seqlens_q,
        batch.context_lens,
        batch.block_tables,
        scale * LOG2_E,
        to_fill,
        q.stride(0),
        q.stride(1),
        batch.block_tables.stride(0),
        SPLIT=num_splits > 1,
        **constants,
    )
    if num_splits > 1:
        merge(out, partial, log_sums, batch, to_fill, constants["TILE"], constants["LONGEST"])


def _constants(
    q: Tensor, k_cache: KVPool, v_cache: KVPool, shape: TileShape | None
) -> dict[str, Any]:
    """All compile-time constants of the kernel but SPLIT."""
    constants = pool_constants(k_cache)
    group = heads_per_kv_head(q, k_cache, v_cache)
    if shape is None:
        bytes_each = q.itemsize, pointers(k_cache, v_cache)[0].itemsize
        shape = choose_tile(group, constants["WIDTH"], *bytes_each, has_large_sms(q.device))
    return constants | {
        "HEADS": q.shape[1],
        "GROUP": group,
        "ROWS": max(16, triton.next_power_of_2(group)),
        "TILE": shape.tile,
        "MATH": math_type(q.dtype),
        "num_warps": shape.num_warps,
        "num_stages": shape.num_stages,
        "maxnreg": shape.max_registers,
        **SPLIT_RULE,
    }


@on_its_gpu
def count_places(
    q: Tensor, k_cache: KVPool, v_cache: KVPool, shape: TileShape | None = None
) -> int:
    """Programs of `decode` that the GPU of these tensors runs at the same time."""
    return _places(q, pointers(k_cache, v_cache), _constants(q, k_cache, v_cache, shape))


def _places(q: Tensor, tensors: tuple[Tensor, ...], constants: dict[str, Any]) -> int:
    if is_interpreted():
        return INTERPRETED_PLACES
    types = q.dtype, tensors[0].dtype, tensors[2].dtype  # of queries, keys, scales
    return _compiled_places(q.device, types, q.stride()[:2], tuple(constants.items()))


@cache
def _compiled_places(
    device: torch.device,
    types: tuple[torch.dtype, ...],
    q_strides: tuple[int, ...],
    constants: tuple[tuple[str, Any], ...],
) -> int:
    """Compile and load the kernel for splits, without a launch, to know its resources.

    This happens once, in the normal run that precedes the recording of a CUDA graph.
    """
    query, cache, scales = types
    numbers, counts = torch.float32, torch.int32
    kernel = decode_kernel.warmup(
        query, numbers, numbers, query, cache, cache, scales, scales, counts, counts, counts,
        1.0, 1, *q_strides, 1, SPLIT=True, **dict(constants), grid=(1,),
    )  # fmt: skip
    kernel._init_handles()  # registers are known when the kernel is loaded
    taken = kernel.n_regs, kernel.metadata.shared, kernel.metadata.num_warps
    return programs_per_gpu(device, *taken)


# Values that change from step to step are not specialized, or each would compile a new kernel.
@triton.jit(do_not_specialize=["to_fill", "table_stride"])
def decode_kernel(
    out,  # [tokens, heads, head_dim]
    partial,  # [seqs, heads, splits, head_dim] float32: the result of each split alone
    log_sums,  # [seqs, heads, splits] float32: log2 of the sum of its weights
    q,  # [tokens, heads, head_dim]
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    cu_seqlens_q,
    context_lens,
    block_tables,
    scale,  # of scores, times log2(e)
    to_fill,
    q_token_stride,
    q_head_stride,
    table_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads that share a KV head
    ROWS: tl.constexpr,  # GROUP, padded to the minimum of tl.dot
    SPLIT: tl.constexpr,  # whether there are partial results to merge
    TILE: tl.constexpr,
    SHORTEST: tl.constexpr,
    LONGEST: tl.constexpr,
    MOST: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    LARGEST: tl.constexpr,
    MATH: tl.constexpr,
):
    """Attention of one split of one sequence, for the query heads of one KV head."""
    kv_head = tl.program_id(0)
    seq = tl.program_id(1)
    # In reverse: only long sequences have late splits, which would start when all others end.
    split = tl.num_programs(2) - 1 - tl.program_id(2)

    token = tl.load(cu_seqlens_q + seq)
    seq_len = tl.load(context_lens + seq) + 1
    if tl.load(cu_seqlens_q + seq + 1) - token != 1:
        return  # not decoding, or padding
    split_len = split_length(seq_len, to_fill, TILE, SHORTEST, LONGEST, MOST)
    start = split * split_len
    end = tl.minimum(start + split_len, seq_len)
    if start >= end:
        return  # a short sequence has fewer splits

    rows = tl.arange(0, ROWS)
    is_row = rows < GROUP
    heads = kv_head * GROUP + rows
    tokens = tl.full([ROWS], 0, tl.int32) + token
    query = load_query(
        q, tokens, heads, is_row, q_token_stride, q_head_stride,
        HEAD_DIM, WIDTH, MATH, QUANTIZED,
    )  # fmt: skip
    last_position = tl.full([ROWS], 0, tl.int32) + (seq_len - 1)
    table = block_tables + seq.to(tl.int64) * table_stride

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    output = begin_output(ROWS, WIDTH, QUANTIZED)
    whole_tiles_end = start + (end - start) // TILE * TILE
    blocks = load_blocks(table, start, end, BLOCK_SIZE, TILE)
    for tile_start in range(start, whole_tiles_end, TILE):  # without masks: most tiles
        next_blocks = load_blocks(table, tile_start + TILE, end, BLOCK_SIZE, TILE)
        maximum, total, output = attend_to_tile(
            maximum, total, output, query, last_position, tile_start, end, blocks,
            k_cache, v_cache, k_scales, v_scales, kv_head, scale,
            KV_HEADS, HEAD_DIM, WIDTH, BLOCK_SIZE, TILE, False, QUANTIZED, LARGEST, MATH,
        )  # fmt: skip
        blocks = next_blocks
    if whole_tiles_end < end:
        maximum, total, output = attend_to_tile(
            maximum, total, output, query, last_position, whole_tiles_end, end, blocks,
            k_cache, v_cache, k_scales, v_scales, kv_head, scale,
            KV_HEADS, HEAD_DIM, WIDTH, BLOCK_SIZE, TILE, True, QUANTIZED, LARGEST, MATH,
        )  # fmt: skip

    dims = tl.arange(0, WIDTH)
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    result = whole_output(output, QUANTIZED) / (total * LARGEST)[:, None]  # [ROWS, WIDTH]
    if SPLIT:
        places = (seq.to(tl.int64) * HEADS + heads) * tl.num_programs(2) + split  # [ROWS]
        tl.store(partial + places[:, None] * HEAD_DIM + dims[None, :], result, mask=mask)
        tl.store(log_sums + places, maximum + tl.log2(total), mask=is_row)
    else:
        places = tokens.to(tl.int64) * HEADS + heads  # [ROWS]
        tl.store(out + places[:, None] * HEAD_DIM + dims[None, :], result, mask=mask)
