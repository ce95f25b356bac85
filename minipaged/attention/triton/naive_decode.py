# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
"""The simplest kernel: paged attention as in the paper's Figure 5.

What it computes   one query of one head against all keys of its sequence, one block at a time,
                   found through the block table (section 4.1, Equation 4).
Grid               (tokens, heads): one program per query token and head, so prefill works too.

                       token 0   token 1   token 2
               head 0     []        []        []      each [] walks the blocks of its sequence,
               head 1     []        []        []      table[0], table[1], ... up to its position

Bytes              all keys and values of a sequence once for *every query token and head*: with 32
                   heads over 8 KV heads, a decode reads four times as many as needed.
Operations         4 * head_dim per key and query head, as in all kernels, but as sums of products,
                   not on the tensor cores: those need at least 16 rows, and here there is one.

Of the paper's kernels (section 5.1) it is "fused block read and attention". `decode` reads the same
table and adds four things: it reads each KV head once for all its query heads, cuts long sequences
into splits, uses tensor cores, and starts loads before their data is needed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipaged.attention.batch import Batch
from minipaged.attention.quantized_cache import KVPool
from minipaged.attention.reference import heads_per_kv_head
from minipaged.attention.triton.launch import (
    LOG2_E,
    check_rows,
    on_its_gpu,
    pointers,
    pool_constants,
)


@on_its_gpu
def naive_paged_attention(
    q: Tensor, k_cache: KVPool, v_cache: KVPool, batch: Batch, scale: float
) -> Tensor:
    """Attention of every query token of the batch: [tokens, heads, head_dim], like q."""
    check_rows(q=q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_tokens, heads, _ = q.shape
    naive_kernel[(num_tokens, heads)](
        out,
        q,
        *pointers(k_cache, v_cache),
        batch.cu_seqlens_q,
        batch.context_lens,
        batch.block_tables,
        batch.num_seqs,
        scale * LOG2_E,
        q.stride(0),
        q.stride(1),
        batch.block_tables.stride(0),
        HEADS=heads,
        GROUP=heads_per_kv_head(q, k_cache, v_cache),
        SLOTS=triton.next_power_of_2(k_cache.shape[2]),
        **pool_constants(k_cache),
    )
    return out


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def naive_kernel(
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
    scale,  # of scores, times log2(e), because a GPU has an instruction for 2^x
    q_token_stride,
    q_head_stride,
    table_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads that share a KV head
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # HEAD_DIM, or the next power of two, as tile sizes must be
    BLOCK_SIZE: tl.constexpr,
    SLOTS: tl.constexpr,  # BLOCK_SIZE, or the next power of two
    QUANTIZED: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Attention of one query token and head over all keys visible to it."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // GROUP

    # Which sequence does the token belong to, and what is its position?
    seq = 0
    while (seq < num_seqs - 1) & (tl.load(cu_seqlens_q + seq + 1) <= token):
        seq += 1
    if token >= tl.load(cu_seqlens_q + seq + 1):
        return  # padding after the last sequence
    position = tl.load(context_lens + seq) + token - tl.load(cu_seqlens_q + seq)

    dims = tl.arange(0, WIDTH)
    in_head = dims < HEAD_DIM
    start = token.to(tl.int64) * q_token_stride + head * q_head_stride
    query = tl.load(q + start + dims, mask=in_head, other=0.0).to(tl.float32)  # [WIDTH]

    maximum = float("-inf")
    total = 0.0
    output = tl.full([WIDTH], 0.0, tl.float32)
    for logical in range(position // BLOCK_SIZE + 1):
        physical = tl.load(block_tables + seq * table_stride + logical).to(tl.int64)
        offsets = tl.arange(0, SLOTS)
        visible = (offsets < BLOCK_SIZE) & (logical * BLOCK_SIZE + offsets <= position)  # [SLOTS]
        cells = (physical * KV_HEADS + kv_head) * BLOCK_SIZE + offsets  # [SLOTS]
        numbers = cells[:, None] * HEAD_DIM + dims[None, :]  # [SLOTS, WIDTH]
        mask = visible[:, None] & in_head[None, :]
        keys = tl.load(k_cache + numbers, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(v_cache + numbers, mask=mask, other=0.0).to(tl.float32)
        if QUANTIZED:
            keys *= tl.load(k_scales + cells, mask=visible, other=0.0)[:, None]
            values *= tl.load(v_scales + cells, mask=visible, other=0.0)[:, None]

        scores = tl.sum(query[None, :] * keys, axis=1) * scale  # [SLOTS]
        scores = tl.where(visible, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        correction = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(scores - new_maximum)  # [SLOTS]
        total = total * correction + tl.sum(weights, axis=0)
        output = output * correction + tl.sum(weights[:, None] * values, axis=0)
        maximum = new_maximum

    place = (token.to(tl.int64) * HEADS + head) * HEAD_DIM
    tl.store(out + place + dims, output / total, mask=in_head)
