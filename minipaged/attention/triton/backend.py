"""The kernels with the interface of every other attention: `AttentionBackend`."""

import torch
from torch import Tensor

from minipaged.attention.batch import Batch
from minipaged.attention.quantized_cache import KVPool
from minipaged.attention.triton.decode import decode
from minipaged.attention.triton.launch import check_rows
from minipaged.attention.triton.prefill import prefill


def triton_paged_attention(
    q: Tensor, k_cache: KVPool, v_cache: KVPool, batch: Batch, scale: float
) -> Tensor:
    """The whole batch, whatever mixture it is: [tokens, heads, head_dim], like q.

    Two kernels, not one with two branches: the compiler lays out registers and overlaps loads for
    the worse of the two, and IBM measured such a kernel at half the speed (arXiv 2511.11581). Each
    is launched over all sequences and passes over those of the other.
    """
    check_rows(q=q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if batch.has_decodes:
        decode(q, k_cache, v_cache, batch, scale, out)
    if batch.has_prefills:
        prefill(q, k_cache, v_cache, batch, scale, out)
    return out
