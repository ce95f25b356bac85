# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
"""The step that both fast kernels repeat: some rows of queries meet one tile of keys and values.

It is Equation 4 of the paper (section 4.1) as in `attention/blockwise.py`, with three differences:

    tile, not block      a tile of 32 to 128 positions is what the hardware likes to multiply, a
                         block of 16 is what wastes little memory. A tile gathers its positions
                         through the block table, so that either has the size that suits it.
    rows, not a query    all query heads that share a KV head (and in prefill several tokens) are
                         rows of one matrix: keys are read once for all of them, and the tensor
                         cores, which multiply 16 rows at least, have something to do.
    exp2, not exp        scores come multiplied by log2(e): a GPU has an instruction for 2^x.

8-bit numbers are converted to the type of the queries, for the tensor cores, but not multiplied by
their scale. It is the same for all numbers of a key, so it can be applied to the score instead, and
a value's to its weight, once instead of head_dim times:

    q . (scale * k) = scale * (q . k)        sum of w * (scale * v) = sum of (w * scale) * v

A value's scale may be too small for a weight in half precision. So weights are multiplied by the
scale times the largest stored number, which is the size of the value itself, and the end result is
divided by that number.
"""

import triton
import triton.language as tl

import minipaged.attention.triton.launch  # noqa: F401 - settles how kernels run


@triton.jit
def attend_to_tile(
    # what is known of the rows so far, and returned anew; see attention/blockwise.py
    maximum,  # [ROWS] float32, in base 2
    total,  # [ROWS] float32
    output,  # [ROWS, WIDTH] float32
    query,  # [ROWS, WIDTH]
    row_positions,  # [ROWS]: a row sees the keys up to and including its own position
    start,  # the tile holds positions [start, start + TILE)
    end,  # no position from here on may be read; where it cuts off a tile, the sequence ends
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    table,  # pointer to the sequence's row of the block tables
    kv_head,
    scale,  # of scores, times log2(e)
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # HEAD_DIM, or the next power of two
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,  # False promises: every row sees every position of the tile
    QUANTIZED: tl.constexpr,
    LARGEST: tl.constexpr,  # number that the pool can store; 1 for a pool of floats
    MATH: tl.constexpr,  # the type in which tiles are multiplied
):
    """Maximum, total and output of the rows, with this tile's keys and values taken in."""
    positions = start + tl.arange(0, TILE)
    readable = positions < end
    if MASKED:
        blocks = tl.load(table + positions // BLOCK_SIZE, mask=readable, other=0)
    else:
        blocks = tl.load(table + positions // BLOCK_SIZE)
    cells = (blocks.to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE + positions % BLOCK_SIZE

    keys = _load_rows(k_cache, cells, readable, HEAD_DIM, WIDTH, MASKED)  # [TILE, WIDTH]
    # tf32x3 matters to float32 alone: three products of shorter numbers, for its full precision.
    scores = tl.dot(query, tl.trans(keys.to(MATH)), input_precision="tf32x3")  # [ROWS, TILE]
    scores *= scale
    if QUANTIZED:
        scores *= _load_scales(k_scales, cells, readable, MASKED)[None, :]
    if MASKED:
        scores = tl.where(positions[None, :] <= row_positions[:, None], scores, float("-inf"))

    # Every row sees some position of the first tile that it meets, so from there on the maximum is
    # a number, and -inf minus -inf cannot happen.
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    correction = tl.exp2(maximum - new_maximum)  # 0 at the first tile
    weights = tl.exp2(scores - new_maximum[:, None])  # [ROWS, TILE]
    total = total * correction + tl.sum(weights, axis=1)

    values = _load_rows(v_cache, cells, readable, HEAD_DIM, WIDTH, MASKED)  # [TILE, WIDTH]
    if QUANTIZED:
        weights *= (_load_scales(v_scales, cells, readable, MASKED) * LARGEST)[None, :]
    output = tl.dot(
        weights.to(MATH), values.to(MATH), output * correction[:, None], input_precision="tf32x3"
    )
    return new_maximum, total, output


@triton.jit
def _load_rows(
    cache,
    cells,  # [TILE]
    readable,  # [TILE]
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The keys (or values) in these cells. What must not be read is zero: 0 x NaN would be NaN."""
    dims = tl.arange(0, WIDTH)
    pointers = cache + cells[:, None] * HEAD_DIM + dims[None, :]
    if MASKED:
        return tl.load(pointers, mask=readable[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if WIDTH != HEAD_DIM:
        return tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _load_scales(scales, cells, readable, MASKED: tl.constexpr):
    """What the numbers of each of these cells are to be multiplied by: [TILE] float32."""
    if MASKED:
        return tl.load(scales + cells, mask=readable, other=0.0)
    return tl.load(scales + cells)


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
):
    """Queries as the rows of a matrix, zeros where there are none: [ROWS, WIDTH]."""
    dims = tl.arange(0, WIDTH)
    offsets = tokens.to(tl.int64) * token_stride + heads * head_stride
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(q + offsets[:, None] + dims[None, :], mask=mask, other=0.0).to(MATH)
