# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
"""Prefill: many queries per sequence, whole prompts or chunks, after any context.

What it computes   for every sequence with two or more query tokens, causal attention of each over
                   all keys up to its own. All keys are already in the pool, whether from this
                   step, an earlier chunk or a cached prefix. `decode` computes the sequences with
                   a single query.
Grid               (tiles, kv_heads). The flattened query tokens are cut into tiles of QUERIES, each
                   within one sequence. The number of tiles per sequence is known only on the GPU,
                   so the grid has the maximum number, and each program looks up its tile:

                       tokens   0 1 2 3 4 5 6 | 7 8 9 | 10 11 ...      QUERIES = 4
                       tiles    [  0  ][  1 ]   [ 2 ]   [ 4 ...
                       first tile of sequence s = cu_seqlens_q[s] // QUERIES + s

                   (A sequence may have one tile too many, like tile 3 here; that program ends at
                   once.) A tile's rows are its tokens times the query heads that share the KV
                   head.
Bytes              A tile of queries reads all keys up to its last position, mostly from the L2
                   cache, because earlier tiles have read them.
Operations         4 * head_dim per query head and visible key: half of
                   4 * queries * seq_len * heads * head_dim for a whole prompt. This is the floor:
                   operations / operations per second of the tensor cores.

The paper has no such kernel: it computed whole prompts with an attention kernel without blocks, and
wrote the result to blocks (section 4.3). Tiles below the diagonal are computed without masks.
"""

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
from minipaged.attention.triton.machine import has_large_sms
from minipaged.attention.triton.shapes import TileShapes, choose_tiles
from minipaged.attention.triton.tile import (
    attend_to_tile,
    begin_output,
    load_blocks,
    load_query,
    whole_output,
)


@on_its_gpu
def prefill(
    q: Tensor,
    k_cache: KVPool,
    v_cache: KVPool,
    batch: Batch,
    scale: float,
    out: Tensor,
    shapes: TileShapes | None = None,
) -> None:
    """Write to `out` the attention of all sequences with two queries or more.

    Args:
        q: [tokens, heads, head_dim].
        out: the same; rows of other sequences are not written.
        shapes: None: `choose_tiles`.
    """
    num_tokens, heads, _ = q.shape
    constants = pool_constants(k_cache)
    group_size = heads_per_kv_head(q, k_cache, v_cache)
    tensors = pointers(k_cache, v_cache)
    if shapes is None:
        shapes = choose_tiles(constants["WIDTH"], q.itemsize, has_large_sms(q.device))
    rows = max(shapes.rows, triton.next_power_of_2(group_size))
    queries = rows // group_size
    most_tiles = num_tokens // queries + batch.num_seqs
    prefill_kernel[(most_tiles, constants["KV_HEADS"])](
        out,
        q,
        *tensors,
        batch.cu_seqlens_q,
        batch.context_lens,
        batch.block_tables,
        batch.num_seqs,
        scale * LOG2_E,
        q.stride(0),
        q.stride(1),
        batch.block_tables.stride(0),
        HEADS=heads,
        GROUP=group_size,
        ROWS=rows,
        QUERIES=queries,
        TILE=shapes.tile,
        MATH=math_type(q.dtype),
        num_warps=shapes.num_warps,
        num_stages=shapes.num_stages,
        **constants,
    )


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def prefill_kernel(
    out,  # [tokens, heads, head_dim]
    q,  # [tokens, heads, head_dim]
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    cu_seqlens_q,
    context_lens,
    block_tables,
    num_seqs,
    scale,  # of scores, times log2(e)
    q_token_stride,
    q_head_stride,
    table_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads that share a KV head
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,  # query tokens in a tile: ROWS // GROUP
    TILE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    LARGEST: tl.constexpr,
    MATH: tl.constexpr,
):
    """Attention of one tile of query tokens, for the query heads of one KV head."""
    # In reverse: the last tile of a prompt reads the most keys, so if it started last, it would
    # end long after the others. (Tiles come first in the grid, so neighbours read the same keys.)
    query_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)

    seq = _find_sequence(cu_seqlens_q, num_seqs, query_tile, QUERIES)
    first_token = tl.load(cu_seqlens_q + seq)
    query_len = tl.load(cu_seqlens_q + seq + 1) - first_token
    first_query = (query_tile - (first_token // QUERIES + seq)) * QUERIES
    if (query_len == 1) | (first_query >= query_len):
        return  # a sequence for `decode`, or a tile too many
    context_len = tl.load(context_lens + seq)

    rows = tl.arange(0, ROWS)
    queries = first_query + rows // GROUP  # [ROWS], counted from the sequence's first query token
    is_row = (rows < QUERIES * GROUP) & (queries < query_len)
    heads = kv_head * GROUP + rows % GROUP
    query = load_query(
        q, first_token + queries, heads, is_row, q_token_stride, q_head_stride,
        HEAD_DIM, WIDTH, MATH, QUANTIZED,
    )  # fmt: skip
    row_positions = context_len + queries
    table = block_tables + seq.to(tl.int64) * table_stride

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    output = begin_output(ROWS, WIDTH, QUANTIZED)
    end = context_len + tl.minimum(first_query + QUERIES, query_len)
    # Keys visible to the first query are visible to every row, so these tiles need no mask.
    whole_tiles_end = (context_len + first_query + 1) // TILE * TILE
    blocks = load_blocks(table, 0, end, BLOCK_SIZE, TILE)
    for tile_start in range(0, whole_tiles_end, TILE):
        next_blocks = load_blocks(table, tile_start + TILE, end, BLOCK_SIZE, TILE)
        maximum, total, output = attend_to_tile(
            maximum, total, output, query, row_positions, tile_start, end, blocks,
            k_cache, v_cache, k_scales, v_scales, kv_head, scale,
            KV_HEADS, HEAD_DIM, WIDTH, BLOCK_SIZE, TILE, False, QUANTIZED, LARGEST, MATH,
        )  # fmt: skip
        blocks = next_blocks
    for tile_start in range(whole_tiles_end, end, TILE):  # across the diagonal
        next_blocks = load_blocks(table, tile_start + TILE, end, BLOCK_SIZE, TILE)
        maximum, total, output = attend_to_tile(
            maximum, total, output, query, row_positions, tile_start, end, blocks,
            k_cache, v_cache, k_scales, v_scales, kv_head, scale,
            KV_HEADS, HEAD_DIM, WIDTH, BLOCK_SIZE, TILE, True, QUANTIZED, LARGEST, MATH,
        )  # fmt: skip
        blocks = next_blocks

    dims = tl.arange(0, WIDTH)
    places = (first_token + queries).to(tl.int64) * HEADS + heads  # [ROWS]
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    result = whole_output(output, QUANTIZED) / (total * LARGEST)[:, None]  # [ROWS, WIDTH]
    tl.store(out + places[:, None] * HEAD_DIM + dims[None, :], result, mask=mask)


@triton.jit
def _find_sequence(cu_seqlens_q, num_seqs, query_tile, QUERIES: tl.constexpr):
    """The last sequence whose first tile is at or before this one, by binary search."""
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_q + middle) // QUERIES + middle <= query_tile:
            low = middle
        else:
            high = middle
    return low
