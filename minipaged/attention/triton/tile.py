# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
"""The step that both fast kernels repeat: rows of queries attend to one tile of keys and values.

It is Equation 4 of the paper (section 4.1) as in `attention/blockwise.py`, with three differences:

    tile, not block      hardware multiplies tiles of 32 to 128 positions efficiently, while blocks
                         of 16 waste little memory. A tile gathers its positions through the block
                         table, so the two sizes are independent.
    rows, not a query    all query heads that share a KV head (and in prefill several tokens) are
                         rows of one matrix: keys are read once for all of them, and the tensor
                         cores, which need at least 16 rows, are better used.
    exp2, not exp        scores are multiplied by log2(e), because a GPU has an instruction for 2^x.

8-bit elements are converted to the type of the queries, for the tensor cores (see `unpack`), but
not multiplied by their scale. A key's scale is the same for all its elements, so it is applied to
the score instead, and a value's scale to its weight: once instead of head_dim times:

    q . (scale * k) = scale * (q . k)        sum of w * (scale * v) = sum of (w * scale) * v

A weight times a value's scale may be too small for half precision. Weights are therefore multiplied
by the scale times the largest storable number, which has the magnitude of the value itself, and the
final result is divided by that number.
"""

import triton
import triton.language as tl

import minipaged.attention.triton.launch  # noqa: F401 - settles how kernels run
from minipaged.attention.triton.unpack import join_pairs, split_pairs, unit, unpack


@triton.jit
def attend_to_tile(
    # running values of the rows, returned updated; see attention/blockwise.py
    maximum,  # [ROWS] float32, in base 2
    total,  # [ROWS] float32
    output,  # [ROWS, WIDTH] float32, in one part or two: see `begin_output`
    query,  # [ROWS, WIDTH] in as many parts
    row_positions,  # [ROWS]: keys up to and including a row's position are visible to it
    start,  # the tile holds positions [start, start + TILE)
    end,  # positions from here on must not be read; it cuts off a tile only where the sequence ends
    blocks,  # [TILE]: the physical block of each position, from `load_blocks`
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    kv_head,
    scale,  # of scores, times log2(e)
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # HEAD_DIM, or the next power of two
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,  # False if every position of the tile is visible to every row
    QUANTIZED: tl.constexpr,
    LARGEST: tl.constexpr,  # largest number that the pool can store; 1 for a pool of floats
    MATH: tl.constexpr,  # the type in which tiles are multiplied
):
    """Update maximum, total and output of the rows with this tile's keys and values."""
    positions = start + tl.arange(0, TILE)
    readable = positions < end
    CELLS: tl.constexpr = KV_HEADS * BLOCK_SIZE  # noqa: N806 - in a block, of all heads
    offsets = _from_block_of(start, BLOCK_SIZE, TILE) % BLOCK_SIZE
    in_block = kv_head * BLOCK_SIZE + offsets  # [TILE]: the cell, counted from its block's first

    keys = _load_rows(
        k_cache, blocks, in_block, readable, CELLS, HEAD_DIM, WIDTH, MASKED, QUANTIZED, MATH
    )
    # tf32x3 affects only float32: three products of shorter numbers give full precision.
    scores = tl.dot(query[0], tl.trans(keys[0]), input_precision="tf32x3")  # [ROWS, TILE]
    if QUANTIZED:
        scores = tl.dot(query[1], tl.trans(keys[1]), scores, input_precision="tf32x3")
        scales = _load_scales(k_scales, blocks, in_block, readable, CELLS, MASKED)
        scores *= (scales * (scale * unit(k_cache.dtype.element_ty, MATH)))[None, :]
    else:
        scores *= scale
    if MASKED:
        scores = tl.where(positions[None, :] <= row_positions[:, None], scores, float("-inf"))

    # At least one position of a row's first tile is visible to it. After that tile the maximum is
    # finite, so -inf minus -inf cannot occur.
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    correction = tl.exp2(maximum - new_maximum)  # 0 at the first tile
    weights = tl.exp2(scores - new_maximum[:, None])  # [ROWS, TILE]
    total = total * correction + tl.sum(weights, axis=1)

    values = _load_rows(
        v_cache, blocks, in_block, readable, CELLS, HEAD_DIM, WIDTH, MASKED, QUANTIZED, MATH
    )
    if QUANTIZED:
        scales = _load_scales(v_scales, blocks, in_block, readable, CELLS, MASKED)
        weights *= (scales * (LARGEST * unit(v_cache.dtype.element_ty, MATH)))[None, :]
    weights = weights.to(MATH)
    correction = correction[:, None]
    first = tl.dot(weights, values[0], output[0] * correction, input_precision="tf32x3")
    if QUANTIZED:
        second = tl.dot(weights, values[1], output[1] * correction, input_precision="tf32x3")
        return new_maximum, total, (first, second)
    else:
        return new_maximum, total, (first,)


@triton.jit
def load_blocks(table, start, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Load the block numbers of a tile's positions, [TILE], from a sequence's block table.

    A kernel loads them one tile ahead. The addresses of keys and values are then known when an
    iteration begins, so the compiler can have several tiles in flight: it copies the next ones to
    shared memory while it multiplies this one. If an iteration loaded its own block numbers, each
    copy would wait for them, and every tile for its copy.
    """
    positions = start + tl.arange(0, TILE)
    logical = start // BLOCK_SIZE + _from_block_of(start, BLOCK_SIZE, TILE) // BLOCK_SIZE
    return tl.load(table + logical, mask=positions < end, other=0)


@triton.jit
def _from_block_of(start, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The tile's positions, [TILE], counted from the first of the block that contains `start`.

    A tile starts at a multiple of TILE. If that is always the first position of a block, the result
    is the same for all tiles, and all that depends on it is computed before the loop.
    """
    if TILE % BLOCK_SIZE == 0:
        return tl.arange(0, TILE)
    return start % BLOCK_SIZE + tl.arange(0, TILE)


@triton.jit
def _load_rows(
    cache,
    blocks,  # [TILE]
    in_block,  # [TILE]
    readable,  # [TILE]
    CELLS: tl.constexpr,  # in a block
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    MATH: tl.constexpr,
):
    """Load the keys (or values) of these cells: [TILE, WIDTH], in one part or two."""
    if QUANTIZED:
        tl.static_assert(HEAD_DIM % 2 == 0, "elements of 8 bits are read in pairs")
        pairs = _load(
            cache.to(tl.pointer_type(tl.int16), bitcast=True),
            blocks, in_block, readable, CELLS, HEAD_DIM // 2, WIDTH // 2, MASKED,
        )  # fmt: skip
        return unpack(pairs, cache.dtype.element_ty, MATH)
    else:
        rows = _load(cache, blocks, in_block, readable, CELLS, HEAD_DIM, WIDTH, MASKED)
        return (rows.to(MATH),)


@triton.jit
def _load(
    cache,
    blocks,
    in_block,
    readable,
    CELLS: tl.constexpr,
    LENGTH: tl.constexpr,  # elements in a cell
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load the elements of these cells; masked cells are zero, since 0 x NaN is NaN."""
    dims = tl.arange(0, WIDTH)
    pointers = cache + (in_block[:, None] * LENGTH + dims[None, :])
    pointers += blocks[:, None].to(tl.int64) * (CELLS * LENGTH)
    if MASKED:
        return tl.load(pointers, mask=readable[:, None] & (dims < LENGTH)[None, :], other=0.0)
    if WIDTH != LENGTH:
        return tl.load(pointers, mask=(dims < LENGTH)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _load_scales(scales, blocks, in_block, readable, CELLS: tl.constexpr, MASKED: tl.constexpr):
    """Load the scale of each of these cells: [TILE] float32."""
    pointers = scales + in_block + blocks.to(tl.int64) * CELLS
    if MASKED:
        return tl.load(pointers, mask=readable, other=0.0)
    return tl.load(pointers)


@triton.jit
def load_query(
    q,  # pointer to the tokens' queries
    tokens,  # [ROWS]
    heads,  # [ROWS]
    is_row,  # [ROWS]: padding is False
    token_stride,
    head_stride,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    MATH: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """Load queries as the rows of a matrix, with zeros for padding: [ROWS, WIDTH], in parts."""
    dims = tl.arange(0, WIDTH)
    offsets = tokens.to(tl.int64) * token_stride + heads * head_stride
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    query = tl.load(q + offsets[:, None] + dims[None, :], mask=mask, other=0.0).to(MATH)
    if QUANTIZED:
        return split_pairs(query)
    else:
        return (query,)


@triton.jit
def begin_output(ROWS: tl.constexpr, WIDTH: tl.constexpr, QUANTIZED: tl.constexpr):
    """Zeros, [ROWS, WIDTH]. For an 8-bit pool, in two parts: the even and the odd elements."""
    if QUANTIZED:
        even = tl.full([ROWS, WIDTH // 2], 0.0, tl.float32)
        return even, even
    else:
        return (tl.full([ROWS, WIDTH], 0.0, tl.float32),)


@triton.jit
def whole_output(output, QUANTIZED: tl.constexpr):
    """The parts of the output as one matrix, [ROWS, WIDTH]."""
    if QUANTIZED:
        return join_pairs(output[0], output[1])
    else:
        return output[0]
