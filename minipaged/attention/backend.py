"""The implementations of paged attention: one contract, chosen by name.

    reference     gather, then plain attention: the specification
    blockwise     the paper's Equation 4, block by block, never gathering
    torch         fast, in pure PyTorch: the default on a CPU
    triton        Triton kernels: the default on a GPU
    triton-naive  the simplest kernel: one block at a time, as in the paper's Figure 5
    unpaged       attention over contiguous sequences, only with memory="virtual"

Every implementation has the signature of `PagedAttention`. Query i of a sequence is at position
`context_len + i` and sees the keys of positions 0 up to and including its own. Query heads are
grouped: with 8 heads and 2 kv_heads, heads 0 to 3 read kv_head 0. That one function covers
prefill, chunked prefill, prefill after a cached prefix, and decode, mixed in one batch.

Only a sequence's own keys and values affect its result:

    another sequence's block, or a free one  may hold anything, even NaN: never read it
    an empty slot of its last block          holds finite numbers: do not read it, or give it the
                                             weight zero
    a table entry after the last block       is not a block number: never read through it

A weight of zero is enough for an empty slot because a block is cleared before a sequence writes its
first slot (see `begun_blocks`). Otherwise it could hold a NaN of an earlier owner, and zero times
NaN is NaN.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minipaged.attention.batch import Batch
from minipaged.attention.blockwise import blockwise_paged_attention
from minipaged.attention.kv_cache import CopyBlocks, copy_blocks
from minipaged.attention.quantized_cache import KVPool
from minipaged.attention.reference import reference_paged_attention, store_kv
from minipaged.attention.torch_paged import prepare_torch, torch_paged_attention, torch_store_kv
from minipaged.attention.triton.machine import is_interpreted, why_no_triton
from minipaged.attention.unpaged import prepare_unpaged, unpaged_attention, unpaged_store_kv
from minipaged.errors import InvalidOption

Prepare = Callable[[Batch, KVPool, int, torch.dtype], Batch]
# `Any` is the batch as the backend's own `prepare` returns it: `Batch`, or a class derived from it.
PagedAttention = Callable[[Tensor, KVPool, KVPool, Any, float], Tensor]
StoreKV = Callable[[Tensor, Tensor, KVPool, KVPool, Any], None]
RopeAndStoreKV = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, KVPool, KVPool, Any], Tensor]
AddRMSNorm = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
SiluAndMul = Callable[[Tensor, Tensor], Tensor]


def no_preparation(batch: Batch, k_cache: KVPool, num_heads: int, dtype: torch.dtype) -> Batch:
    """The `prepare` of a backend whose layers share only the batch itself."""
    return batch


@dataclass(frozen=True)
class AttentionBackend:
    """The functions through which a model and its cache use the pool: section 5.1 names the same.

    prepare(batch, k_cache, num_heads, dtype) -> batch
        called once per step, before the first layer: the batch with whatever all layers share
        (block numbers converted to rows, masks), as an instance of a class derived from `Batch`.
        `k_cache` is any layer's, for its shape; queries have `num_heads` heads and that dtype.
        The functions below receive its result
    paged_attention(q, k_cache, v_cache, batch, scale) -> out
        q and out [tokens, heads, head_dim];
        k_cache and v_cache [num_blocks, kv_heads, block_size, head_dim]
    store_kv(k, v, k_cache, v_cache, batch)
        k and v [tokens, kv_heads, head_dim], written to the slots `batch.slot_mapping`
    copy_blocks(source, target, pairs)
        source and target [layers, 2, num_blocks, ...], pairs [pairs, 2] from and to
    rope_and_store_kv(q, k, v, cos, sin, k_cache, v_cache, batch) -> q
        optional, for a backend that can fuse them: rotate queries and keys (see
        `models/rope.py`), then store keys and values
    add_rms_norm(x, delta, weight, eps) -> x + delta, norm
        optional, the same: add two tensors, [tokens, hidden], and normalise the sum
    silu_and_mul(gate, up) -> silu(gate) * up
        optional, the same: the gate of a feed-forward, [tokens, inner] each
    """

    name: str
    paged_attention: PagedAttention
    store_kv: StoreKV
    copy_blocks: CopyBlocks = copy_blocks
    rope_and_store_kv: RopeAndStoreKV | None = None
    add_rms_norm: AddRMSNorm | None = None
    silu_and_mul: SiluAndMul | None = None
    prepare: Prepare = no_preparation
    # A CUDA graph can record it: it uses the batch's Python numbers only as bounds, and
    # it prepares nothing.
    cuda_graph_safe: bool = False


BACKENDS: dict[str, AttentionBackend] = {
    "reference": AttentionBackend("reference", reference_paged_attention, store_kv),
    "blockwise": AttentionBackend("blockwise", blockwise_paged_attention, store_kv),
    "torch": AttentionBackend(
        "torch", torch_paged_attention, torch_store_kv, prepare=prepare_torch
    ),
}
TRITON_BACKENDS = ("triton", "triton-naive")
# Kept apart: it supports only block tables with one entry, and the others read unmapped memory.
UNPAGED = AttentionBackend("unpaged", unpaged_attention, unpaged_store_kv, prepare=prepare_unpaged)


def choose_backend(
    name: str,
    device: torch.device | str = "cpu",
    head_dim: int = 64,
    kv_cache_dtype: str = "auto",
    fixed_split_size: int | None = None,
) -> AttentionBackend:
    """Return the backend with this name; "auto" is the fastest that this device can run.

    Args:
        device: where the model runs.
        head_dim: elements per head.
        kv_cache_dtype: storage type of keys and values, with the names that `LLM` accepts.
        fixed_split_size: tokens per split, for the backend "triton" only.

    Raises:
        InvalidOption: there is no such backend, or it cannot run on this device.
    """
    device = torch.device(device)
    if name == "auto":
        reason = why_no_triton(device, head_dim, kv_cache_dtype) if device.type == "cuda" else None
        name = "torch" if device.type != "cuda" or reason else "triton"
        if reason:
            warnings.warn(f"attention runs in PyTorch: {reason}.", stacklevel=3)
    if name in TRITON_BACKENDS:
        if reason := why_no_triton(device, head_dim, kv_cache_dtype):
            raise InvalidOption(
                f'attention_backend="{name}" cannot run: {reason}. Choose "auto" or "torch".'
            )
        return _triton_backend(name, device, fixed_split_size)
    if name not in BACKENDS:
        names = ", ".join(["auto", *BACKENDS, *TRITON_BACKENDS])
        raise InvalidOption(f"there is no attention backend {name!r}: choose one of {names}.")
    return BACKENDS[name]


def _triton_backend(
    name: str, device: torch.device, fixed_split_size: int | None
) -> AttentionBackend:
    # A late import: Triton takes a second to import, and may not be installed.
    from minipaged.attention.triton.add_rms_norm import add_rms_norm
    from minipaged.attention.triton.backend import triton_paged_attention
    from minipaged.attention.triton.copy_blocks import copy_blocks
    from minipaged.attention.triton.naive_decode import naive_paged_attention
    from minipaged.attention.triton.silu_and_mul import silu_and_mul
    from minipaged.attention.triton.store_kv import rope_and_store_kv, triton_store_kv

    if device.type != "cuda":
        warnings.warn(
            "no GPU: the Triton kernels run in Triton's interpreter, which shows that they are "
            'right and is very slow. For speed choose attention_backend="torch".',
            stacklevel=4,
        )
    naive = name == "triton-naive"
    fast = partial(triton_paged_attention, fixed_split_size=fixed_split_size)
    return AttentionBackend(
        name,
        naive_paged_attention if naive else fast,
        triton_store_kv,
        copy_blocks,
        rope_and_store_kv=None if naive else rope_and_store_kv,
        add_rms_norm=None if naive else add_rms_norm,
        silu_and_mul=None if naive else silu_and_mul,
        # Interpreted on a GPU's tensors, kernels copy them to the host and back.
        cuda_graph_safe=device.type != "cuda" or not is_interpreted(),
    )
