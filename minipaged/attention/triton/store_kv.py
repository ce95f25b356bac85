# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
"""Store: writes the step's new keys and values to their slots, in one launch.

What it computes   k_cache[block, :, offset] = k[token] and the same for v, where
                   `slot_mapping[token]` is block * block_size + offset; in an 8-bit pool, the
                   scales too.
Grid               (tokens,): one program per token, for its keys and values of all heads.
Bytes              4 * kv_heads * head_dim elements per token: each is read once and written once.
                   In a decode step that is 2 / seq_len of what attention reads, so the saving is
                   in launches: one instead of six.
Operations         None; in an 8-bit pool one maximum per key and one division per element.

Of the paper's kernels (section 5.1) it is "fused reshape and block write". The second kernel of
this file also applies RoPE to queries and keys, in one pass; PyTorch needs fourteen small
operations and as many passes over q and k.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipaged.attention.batch import Batch
from minipaged.attention.quantized_cache import SMALLEST_SCALE, KVPool
from minipaged.attention.triton.launch import check_rows, on_its_gpu, pointers, pool_constants


@on_its_gpu
def triton_store_kv(k: Tensor, v: Tensor, k_cache: KVPool, v_cache: KVPool, batch: Batch) -> None:
    """Write the new keys and values, [tokens, kv_heads, head_dim] each, to `batch.slot_mapping`."""
    _check_new(k, v, k_cache, batch)
    store_kernel[(len(batch.slot_mapping),)](
        k,
        v,
        *pointers(k_cache, v_cache),
        batch.slot_mapping,
        batch.cu_seqlens_q,
        batch.num_seqs,
        *k.stride()[:2],
        *v.stride()[:2],
        SMALLEST=SMALLEST_SCALE,
        HEADS_WIDTH=triton.next_power_of_2(k.shape[1]),
        **pool_constants(k_cache),
    )


@on_its_gpu
def rope_and_store_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: KVPool,
    v_cache: KVPool,
    batch: Batch,
) -> Tensor:
    """Apply RoPE to queries and keys (see `models/rope.py`), store keys and values, return queries.

    Args:
        q: [tokens, heads, head_dim].
        k: [tokens, kv_heads, head_dim].
        v: the same.
        cos: [tokens, 1, head_dim / 2], the cosine of each pair's rotation angle.
        sin: the same for the sine.
    """
    _check_new(k, v, k_cache, batch)
    check_rows(queries=q)
    num_tokens, _, head_dim = k.shape
    assert head_dim % 2 == 0, f"head_dim is {head_dim}, which cannot be split into pairs"
    assert q.shape[::2] == k.shape[::2], f"{q.shape} of queries, {k.shape} of keys"
    assert cos.shape == sin.shape == (num_tokens, 1, head_dim // 2), f"angles are {cos.shape}"
    turned = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    constants = pool_constants(k_cache)
    rope_and_store_kernel[(len(batch.slot_mapping),)](
        turned,
        q,
        k,
        v,
        cos.contiguous(),
        sin.contiguous(),
        *pointers(k_cache, v_cache),
        batch.slot_mapping,
        batch.cu_seqlens_q,
        batch.num_seqs,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        SMALLEST=SMALLEST_SCALE,
        HEADS=q.shape[1],
        Q_HEADS_WIDTH=triton.next_power_of_2(q.shape[1]),
        HEADS_WIDTH=triton.next_power_of_2(k.shape[1]),
        HALF_WIDTH=constants["WIDTH"] // 2,
        **constants,
    )
    return turned


def _check_new(k: Tensor, v: Tensor, k_cache: KVPool, batch: Batch) -> None:
    _, kv_heads, _, head_dim = k_cache.shape
    expected = (len(batch.slot_mapping), kv_heads, head_dim)
    check_rows(keys=k, values=v)
    for name, new in (("keys", k), ("values", v)):
        assert new.shape == expected, (
            f"the new {name} have shape {tuple(new.shape)}, the cache expects {expected}"
        )


@triton.jit(do_not_specialize=["num_seqs"])
def store_kernel(
    k,  # [tokens, kv_heads, head_dim]
    v,  # [tokens, kv_heads, head_dim]
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    slot_mapping,
    cu_seqlens_q,
    num_seqs,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    HEADS_WIDTH: tl.constexpr,  # KV_HEADS, or the next power of two
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """Store the keys and values of one token."""
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(cu_seqlens_q + num_seqs):
        return  # padding after the last sequence has no slot
    heads = tl.arange(0, HEADS_WIDTH)
    cells = _cells_of(tl.load(slot_mapping + token), heads, KV_HEADS, BLOCK_SIZE)
    _store_rows(
        k + token * k_token_stride, k_head_stride, k_cache, k_scales, cells, heads,
        LARGEST, SMALLEST, KV_HEADS, HEAD_DIM, WIDTH, QUANTIZED,
    )  # fmt: skip
    _store_rows(
        v + token * v_token_stride, v_head_stride, v_cache, v_scales, cells, heads,
        LARGEST, SMALLEST, KV_HEADS, HEAD_DIM, WIDTH, QUANTIZED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_seqs"])
def rope_and_store_kernel(
    turned,  # [tokens, heads, head_dim]
    q,  # [tokens, heads, head_dim]
    k,  # [tokens, kv_heads, head_dim]
    v,  # [tokens, kv_heads, head_dim]
    cos,  # [tokens, head_dim / 2]
    sin,  # [tokens, head_dim / 2]
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    slot_mapping,
    cu_seqlens_q,
    num_seqs,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    HEADS: tl.constexpr,
    Q_HEADS_WIDTH: tl.constexpr,
    HEADS_WIDTH: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """Rotate the queries and keys of one token, and store its keys and values."""
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(cu_seqlens_q + num_seqs):
        return
    HALF: tl.constexpr = HEAD_DIM // 2  # noqa: N806
    half = tl.arange(0, HALF_WIDTH)[None, :]
    c = tl.load(cos + token * HALF + half, mask=half < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + token * HALF + half, mask=half < HALF, other=0.0).to(tl.float32)

    q_heads = tl.arange(0, Q_HEADS_WIDTH)[:, None]
    mask = (q_heads < HEADS) & (half < HALF)
    first, second = _turn(
        q + token * q_token_stride + q_heads * q_head_stride, half, mask, c, s, HALF
    )
    places = (token * HEADS + q_heads) * HEAD_DIM + half
    tl.store(turned + places, first, mask=mask)
    tl.store(turned + places + HALF, second, mask=mask)

    heads = tl.arange(0, HEADS_WIDTH)
    is_head = heads < KV_HEADS
    cells = _cells_of(tl.load(slot_mapping + token), heads, KV_HEADS, BLOCK_SIZE)
    mask = is_head[:, None] & (half < HALF)
    start = k + token * k_token_stride + heads[:, None] * k_head_stride
    first, second = _turn(start, half, mask, c, s, HALF)
    if QUANTIZED:
        scale = _choose_scale(tl.maximum(tl.abs(first), tl.abs(second)), LARGEST, SMALLEST)
        tl.store(k_scales + cells, scale, mask=is_head)
        first = _to_steps(first, scale, LARGEST)
        second = _to_steps(second, scale, LARGEST)
    numbers = cells[:, None] * HEAD_DIM + half
    tl.store(k_cache + numbers, first.to(k_cache.dtype.element_ty), mask=mask)
    tl.store(k_cache + numbers + HALF, second.to(k_cache.dtype.element_ty), mask=mask)

    _store_rows(
        v + token * v_token_stride, v_head_stride, v_cache, v_scales, cells, heads,
        LARGEST, SMALLEST, KV_HEADS, HEAD_DIM, WIDTH, QUANTIZED,
    )  # fmt: skip


@triton.jit
def _store_rows(
    rows,  # pointer to one token's keys, or to its values
    head_stride,
    cache,
    scales,
    cells,  # [heads]
    heads,  # [heads]
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """Write the keys (or values) of all heads to their cells."""
    is_head = heads < KV_HEADS
    dims = tl.arange(0, WIDTH)[None, :]
    mask = is_head[:, None] & (dims < HEAD_DIM)
    numbers = tl.load(rows + heads[:, None] * head_stride + dims, mask=mask, other=0.0)
    if QUANTIZED:
        numbers = numbers.to(tl.float32)
        scale = _choose_scale(tl.abs(numbers), LARGEST, SMALLEST)
        tl.store(scales + cells, scale, mask=is_head)
        numbers = _to_steps(numbers, scale, LARGEST)
    places = cells[:, None] * HEAD_DIM + dims
    tl.store(cache + places, numbers.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def _cells_of(slot, heads, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The cell of each head's key for the token in this slot: [heads], 64 bits like the slot."""
    return (slot // BLOCK_SIZE * KV_HEADS + heads) * BLOCK_SIZE + slot % BLOCK_SIZE


@triton.jit
def _turn(rows, half, mask, cos, sin, HALF: tl.constexpr):
    """Both halves of these heads after the rotation; element i is paired with i + HALF."""
    first = tl.load(rows + half, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(rows + half + HALF, mask=mask, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _choose_scale(magnitudes, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    """The scale of each row; see `minipaged/attention/quantized_cache.py`."""
    return tl.maximum(tl.div_rn(tl.max(magnitudes, axis=1), LARGEST), SMALLEST)


@triton.jit
def _to_steps(numbers, scale, LARGEST: tl.constexpr):
    """Divide each row by its scale."""
    steps = tl.div_rn(numbers, scale[:, None])
    if LARGEST == 127:  # int8 rounds to whole steps here; float8 rounds when it is stored
        steps = tl.floor(steps + 0.5)
    return tl.minimum(tl.maximum(steps, -LARGEST), LARGEST)
