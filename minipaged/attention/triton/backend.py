"""Implements the common attention interface, `AttentionBackend`, with the kernels."""

import torch
from torch import Tensor

from minipaged.attention.batch import Batch
from minipaged.attention.quantized_cache import KVPool
from minipaged.attention.triton.decode import decode
from minipaged.attention.triton.launch import check_rows
from minipaged.attention.triton.prefill import prefill


def triton_paged_attention(
    q: Tensor,
    k_cache: KVPool,
    v_cache: KVPool,
    batch: Batch,
    scale: float,
    fixed_split_size: int | None = None,
) -> Tensor:
    """Attention of the whole batch, with any mixture: [tokens, heads, head_dim], like q.

    There are two kernels, not one with two branches: the compiler allocates registers and overlaps
    loads for the worse branch, and IBM measured such a kernel at half the speed (arXiv 2511.11581).
    Each kernel is launched over all sequences and skips those of the other.
    """
    check_rows(q=q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if batch.has_decodes:
        decode(q, k_cache, v_cache, batch, scale, out, fixed_split_size=fixed_split_size)
    if batch.has_prefills:
        prefill(q, k_cache, v_cache, batch, scale, out)
    return out
