"""Paged attention, several times over: one contract, chosen by name.

    reference   gather, then plain attention: the specification
    blockwise   the paper's Equation 4, block by block, never gathering
    torch       the fast one in pure PyTorch: the default on a CPU

Every implementation has the signature of `PagedAttention`. Query i of a sequence stands at position
`context_len + i` and sees the keys of positions 0 up to and including its own. Query heads are
grouped: with 8 heads and 2 kv_heads, heads 0 to 3 read kv_head 0. That one function covers
prefill, chunked prefill, prefill behind a cached prefix, and decode, mixed in one batch.

What lies in the pool beyond a sequence's own keys must never show in its result:

    another's block, or nobody's         may hold anything, even NaN: never read it
    a slot behind the sequence's end     holds a stale number: its weight must be zero
    a table entry behind the last block  is no block number: never read through it
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from minipaged.attention.blockwise import blockwise_paged_attention
from minipaged.attention.reference import reference_paged_attention, store_kv
from minipaged.attention.torch_paged import torch_paged_attention
from minipaged.batch import Batch
from minipaged.errors import InvalidOption

PagedAttention = Callable[[Tensor, Tensor, Tensor, Batch, float], Tensor]
StoreKV = Callable[[Tensor, Tensor, Tensor, Tensor, Batch], None]


@dataclass(frozen=True)
class AttentionBackend:
    """The two functions through which a model uses the cache.

    paged_attention(q, k_cache, v_cache, batch, scale) -> out
        q and out [tokens, heads, head_dim];
        k_cache and v_cache [num_blocks, kv_heads, block_size, head_dim]
    store_kv(k, v, k_cache, v_cache, batch)
        k and v [tokens, kv_heads, head_dim], written to the slots `batch.slots`
    """

    name: str
    paged_attention: PagedAttention
    store_kv: StoreKV


BACKENDS: dict[str, AttentionBackend] = {
    "reference": AttentionBackend("reference", reference_paged_attention, store_kv),
    "blockwise": AttentionBackend("blockwise", blockwise_paged_attention, store_kv),
    "torch": AttentionBackend("torch", torch_paged_attention, store_kv),
}


def choose_backend(name: str) -> AttentionBackend:
    """The backend of this name; "auto" is the fastest for the machine. Raises InvalidOption."""
    if name == "auto":
        name = "torch"
    if name not in BACKENDS:
        names = ", ".join(["auto", *BACKENDS])
        raise InvalidOption(f"there is no attention backend {name!r}: choose one of {names}.")
    return BACKENDS[name]
