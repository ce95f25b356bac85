"""Lab 3: classic mistakes, each with the task that it must cost points; and unusual right ones."""

import inspect

from minipaged.attention import blockwise, reference

BEGINNING = ""


def changed(function, right: str, wrong: str) -> str:
    """The library's own function with one thing changed."""
    source = inspect.getsource(function)
    assert source.count(right) == 1, f"{function.__name__} has not one {right!r}"
    return "\n\n" + source.replace(right, wrong)


def gather(right: str, wrong: str) -> str:
    return changed(reference.gather, right, wrong)


def attend(right: str, wrong: str) -> str:
    return changed(reference.causal_attention, right, wrong)


def by_blocks(right: str, wrong: str) -> str:
    return changed(blockwise._attend_to_blocks, right, wrong)


WRONG = {
    "gathers_the_empty_slots_too": (1, gather("in_order[:seq_len]", "in_order")),
    "follows_the_whole_table": (1, gather("table[:num_blocks]", "table")),
    "one_block_too_many": (
        1,
        gather("-(-seq_len // cache.shape[2])", "seq_len // cache.shape[2] + 1"),
    ),
    "heads_and_slots_mixed_up": (
        1,
        gather("blocks.transpose(1, 2).flatten(0, 1)", "blocks.reshape(-1, *blocks.shape[1::2])"),
    ),
    "ignores_the_table": (1, gather("cache[table[:num_blocks].long()]", "cache[:num_blocks]")),
    "sees_one_ahead": (
        2,
        attend(
            "key_positions > query_positions[:, None]",
            "key_positions > 1 + query_positions[:, None]",
        ),
    ),
    "does_not_see_itself": (
        2,
        attend(
            "key_positions > query_positions[:, None]",
            "(key_positions >= query_positions[:, None]) & (key_positions > 0)",
        ),
    ),
    "forgets_the_context": (
        2,
        attend("context_len + torch.arange(q.shape[0]", "torch.arange(q.shape[0]"),
    ),
    "heads_interleaved": (
        2,
        attend(
            "keys.to(exact).repeat_interleave(group_size, dim=1)",
            "keys.to(exact).repeat(1, group_size, 1)",
        ),
    ),
    "the_first_key_head_for_all": (
        2,
        attend(
            "keys.to(exact).repeat_interleave(group_size, dim=1)",
            "keys.to(exact)[:, :1].expand(-1, q.shape[1], -1)",
        ),
    ),
    "no_scale": (2, attend("scale * torch.einsum", "torch.einsum")),
    "sums_in_half_precision": (
        2,
        attend("torch.promote_types(q.dtype, torch.float32)", "q.dtype"),
    ),
    "output_not_rescaled": (3, by_blocks("correction * output", "output")),
    "no_maximum": (
        3,
        by_blocks(
            "torch.maximum(maximum, scores.amax(dim=-1, keepdim=True))", "torch.zeros_like(maximum)"
        ),
    ),
    "a_maximum_that_begins_at_zero": (
        3,
        by_blocks(
            'new_full((heads, num_queries, 1), float("-inf"))', "new_zeros(heads, num_queries, 1)"
        ),
    ),
    "reads_the_empty_slots": (
        3,
        by_blocks(
            "filled = min(block_size, context_len + num_queries - first)", "filled = block_size"
        ).replace("positions[:, None]", "positions[:, None] + (num_queries == 1) * block_size"),
    ),
    "each_block_begins_at_position_0": (
        3,
        by_blocks("first + torch.arange(filled", "torch.arange(filled"),
    ),
    "logical_for_physical": (3, by_blocks("k_cache[physical,", "k_cache[logical,")),
    "heads_of_blocks_interleaved": (
        3,
        by_blocks(
            "v_cache[physical, :, :filled].to(exact).repeat_interleave(group_size, dim=0)",
            "v_cache[physical, :, :filled].to(exact).repeat(group_size, 1, 1)",
        ),
    ),
    "gathers_block_by_block": (
        3,
        """
def _attend_to_blocks(q, k_cache, v_cache, blocks, context_len, scale):
    seq_len = context_len + len(q)
    keys, values = (
        torch.cat([pool[block].transpose(0, 1) for block in blocks])[:seq_len]
        for pool in (k_cache, v_cache)
    )
    return causal_attention(q, keys, values, context_len, scale)
""",
    ),
    "gathers_after_all": (
        3,
        """
def _attend_to_blocks(q, k_cache, v_cache, blocks, context_len, scale):
    table, seq_len = torch.tensor(blocks), context_len + len(q)
    keys, values = gather(k_cache, table, seq_len), gather(v_cache, table, seq_len)
    return causal_attention(q, keys, values, context_len, scale)
""",
    ),
}

RIGHT = {
    "position_by_position_and_query_by_query": """
def gather(cache, table, seq_len):
    block_size = cache.shape[2]
    places = [(int(table[p // block_size]), p % block_size) for p in range(seq_len)]
    return torch.stack([cache[block, :, slot] for block, slot in places])


def causal_attention(q, keys, values, context_len, scale):
    group = q.shape[1] // keys.shape[1]
    out = torch.empty_like(q)
    for i in range(len(q)):
        end = context_len + i + 1
        for head in range(q.shape[1]):
            scores = keys[:end, head // group].float() @ q[i, head].float()
            weights = (scores * scale).softmax(dim=0)
            out[i, head] = (weights @ values[:end, head // group].float()).to(q.dtype)
    return out
""",
    "each_block_alone_and_merged_from_the_last": """
def _attend_to_blocks(q, k_cache, v_cache, blocks, context_len, scale):
    kv_heads, block_size = k_cache.shape[1:3]
    queries = scale * q.float().unflatten(1, (kv_heads, -1))  # [queries, kv_heads, group, dim]
    seen_to = context_len + torch.arange(len(q))
    logsum, output = torch.tensor(float("-inf")), torch.zeros(())
    for logical in reversed(range(len(blocks))):
        keys, values = k_cache[blocks[logical]].float(), v_cache[blocks[logical]].float()
        scores = torch.einsum("qhgd,hkd->qhgk", queries, keys)
        slots = logical * block_size + torch.arange(block_size)
        hidden = slots > seen_to[:, None]
        scores = scores.masked_fill(hidden[:, None, None], -1e30)  # of whole blocks, too
        one = scores.logsumexp(-1, keepdim=True)
        weights = (scores - one).exp().masked_fill(hidden[:, None, None], 0.0)
        part = torch.einsum("qhgk,hkd->qhgd", weights, values)
        both = torch.logaddexp(logsum, one)
        output = output * (logsum - both).exp() + part * (one - both).exp()
        logsum = both
    return output.flatten(1, 2).to(q.dtype)
""",
}
