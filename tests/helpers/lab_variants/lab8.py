"""Lab 8: classic mistakes, each with the task that it must cost points; and unusual right ones."""

from minipaged.labs.lab8_triton_decode import LAB
from minipaged.labs.starter import library_text

BEGINNING = ""

_KERNEL = "@triton.jit" + library_text(LAB).partition("@triton.jit")[2]


def kernel(*changes: tuple[str, str]) -> str:
    """The library's kernel once more, with these things changed."""
    text = _KERNEL
    for right, wrong in changes:
        assert text.count(right) == 1, f"the kernel has not one {right!r}"
        text = text.replace(right, wrong)
    return "\n\n" + text


SEARCH = """\
    seq = 0
    while (seq < num_seqs - 1) & (tl.load(cu_seqlens_q + seq + 1) <= token):
        seq += 1
"""

WRONG = {
    "empty_slots_not_masked": (
        1,
        kernel((" & (logical * BLOCK_SIZE + offsets <= position)", "")),
    ),
    "empty_slots_loaded_as_zero_and_not_hidden": (
        1,
        kernel(('scores = tl.where(visible, scores, float("-inf"))', "scores = scores")),
    ),
    "sees_one_ahead": (1, kernel(("offsets <= position", "offsets <= position + 1"))),
    "block_stride_for_slots": (
        1,
        kernel(("cells[:, None] * HEAD_DIM", "cells[:, None] * HEAD_DIM * BLOCK_SIZE")),
    ),
    "a_tile_wider_than_the_head": (1, kernel(("dims < HEAD_DIM", "dims < WIDTH"))),
    "no_maximum": (
        1,
        kernel(("tl.maximum(maximum, tl.max(scores, axis=0))", "tl.maximum(0.0, 0.0)")),
    ),
    "ignores_the_table": (
        1,
        kernel(("tl.load(block_tables + seq * table_stride + logical).to(tl.int64)", "logical")),
    ),
    "output_not_rescaled": (2, kernel(("output * correction", "output"))),
    "the_first_block_again_and_again": (
        2,
        kernel(("seq * table_stride + logical", "seq * table_stride")),
    ),
    "every_block_begins_at_position_0": (
        2,
        kernel(("logical * BLOCK_SIZE + offsets <= position", "offsets <= position")),
    ),
    "the_first_table_for_all": (3, kernel((" + seq * table_stride", ""))),
    "interleaved_heads": (3, kernel(("head // GROUP", "head % KV_HEADS"))),
    "kv_heads_after_slots": (
        3,
        kernel(
            (
                "(physical * KV_HEADS + kv_head) * BLOCK_SIZE + offsets",
                "(physical * BLOCK_SIZE + offsets) * KV_HEADS + kv_head",
            )
        ),
    ),
    "decodes_only": (3, kernel((SEARCH, "    seq = token\n"))),
    "forgets_where_the_sequence_begins": (
        3,
        kernel((" + token - tl.load(cu_seqlens_q + seq)", " + token")),
    ),
    "queries_without_gaps": (
        3,
        kernel(
            (
                "token.to(tl.int64) * q_token_stride + head * q_head_stride",
                "(token.to(tl.int64) * HEADS + head) * HEAD_DIM",
            )
        ),
    ),
}

RIGHT = {
    "twice_over_the_keys_with_strides_and_exp": """
def naive_paged_attention(q, k_cache, v_cache, batch, scale):
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tokens, heads, head_dim = q.shape
    kv_heads, block_size = k_cache.shape[1:3]
    twice_kernel[(heads, tokens)](
        out, q, k_cache, v_cache, batch.cu_seqlens_q, batch.context_lens, batch.block_tables,
        batch.num_seqs, scale, *q.stride()[:2], *k_cache.stride()[:3], batch.block_tables.stride(0),
        heads, heads // kv_heads, block_size, head_dim,
        SEQS=triton.next_power_of_2(batch.num_seqs), SLOTS=triton.next_power_of_2(block_size),
        WIDTH=triton.next_power_of_2(head_dim),
    )
    return out


@triton.jit
def twice_kernel(
    out, q, k_cache, v_cache, cu_seqlens_q, context_lens, block_tables, num_seqs, scale,
    token_stride, head_stride, block_stride, kv_head_stride, slot_stride, table_stride,
    heads, group, block_size, head_dim,
    SEQS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):
    head, token = tl.program_id(0), tl.program_id(1)
    seqs = tl.arange(0, SEQS)
    ends = tl.load(cu_seqlens_q + 1 + seqs, mask=seqs < num_seqs, other=2**30)
    seq = tl.sum((ends <= token).to(tl.int32), axis=0)
    length = tl.load(context_lens + seq) + token - tl.load(cu_seqlens_q + seq) + 1
    slots, dims = tl.arange(0, SLOTS), tl.arange(0, WIDTH)
    row = q + token * token_stride + head * head_stride
    query = tl.load(row + dims, mask=dims < head_dim, other=0.0)
    tile = (head // group) * kv_head_stride + slots[:, None] * slot_stride + dims[None, :]

    best = float("-inf")
    for logical in range(tl.cdiv(length, block_size)):
        block = tl.load(block_tables + seq * table_stride + logical).to(tl.int64) * block_stride
        seen = (slots < block_size) & (logical * block_size + slots < length)
        mask = seen[:, None] & (dims < head_dim)[None, :]
        keys = tl.load(k_cache + block + tile, mask=mask, other=0.0)
        scores = tl.where(seen, tl.sum(query[None, :] * keys, axis=1) * scale, float("-inf"))
        best = tl.maximum(best, tl.max(scores, axis=0))
    total, output = 0.0, tl.zeros([WIDTH], tl.float32)
    for logical in range(tl.cdiv(length, block_size)):
        block = tl.load(block_tables + seq * table_stride + logical).to(tl.int64) * block_stride
        seen = (slots < block_size) & (logical * block_size + slots < length)
        mask = seen[:, None] & (dims < head_dim)[None, :]
        keys = tl.load(k_cache + block + tile, mask=mask, other=0.0)
        values = tl.load(v_cache + block + tile, mask=mask, other=0.0)
        scores = tl.where(seen, tl.sum(query[None, :] * keys, axis=1) * scale, float("-inf"))
        weights = tl.exp(scores - best)
        total += tl.sum(weights, axis=0)
        output += tl.sum(weights[:, None] * values, axis=0)
    place = out + (token * heads + head) * head_dim + dims
    tl.store(place, output / total, mask=dims < head_dim)
""",
}
