"""The launches of all kernels, intercepted: what `minipaged bench compile` compiles.

There is no list of types and constants, which could diverge from the launchers. The launchers
themselves run, on tensors without memory.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton import JITFunction

from minipaged.attention.batch import Batch
from minipaged.attention.kv_cache import choose_kv_dtype
from minipaged.attention.quantized_cache import LARGEST, KVPool, QuantizedPool
from minipaged.attention.triton.add_rms_norm import add_rms_norm
from minipaged.attention.triton.copy_blocks import copy_blocks
from minipaged.attention.triton.decode import decode
from minipaged.attention.triton.launch import pool_constants
from minipaged.attention.triton.naive_decode import naive_paged_attention
from minipaged.attention.triton.prefill import prefill
from minipaged.attention.triton.shapes import TileShape, TileShapes, choose_tile, choose_tiles
from minipaged.attention.triton.silu_and_mul import silu_and_mul
from minipaged.attention.triton.store_kv import rope_and_store_kv, triton_store_kv

# Only shapes and types matter. As in a real step, a table's width is not a multiple of 16.
_BLOCK_SIZE, _NUM_BLOCKS, _TABLE_WIDTH, _TOKENS, _NUM_SPLITS = 16, 64, 101, 64, 8
_INNER = 14336  # of Llama 3 8B's feed-forward


@dataclass(frozen=True)
class Setting:
    """The parameters of a compilation, besides the GPU."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype  # of queries, and of new keys and values
    kv_dtype: str  # of the pool, as `LLM(kv_cache_dtype=...)` names it


LLAMA_3_8B, OPT_13B, GPT_2 = (32, 8, 128), (40, 40, 128), (12, 12, 64)
PADDED = (8, 8, 80)  # a head whose width is not a power of two
SETTINGS = (
    *(Setting(*LLAMA_3_8B, torch.float16, kv_dtype) for kv_dtype in ("auto", "int8")),
    *(Setting(*LLAMA_3_8B, torch.bfloat16, kv_dtype) for kv_dtype in ("auto", "int8", "fp8")),
    Setting(*OPT_13B, torch.float16, "auto"),
    Setting(*GPT_2, torch.float16, "auto"),
)
MORE_SETTINGS = (
    *(Setting(*PADDED, torch.float16, kv_dtype) for kv_dtype in ("auto", "int8", "fp8")),
    Setting(*LLAMA_3_8B, torch.float32, "auto"),
)


@dataclass(frozen=True)
class Launch:
    """An intercepted launch."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def catch_launches() -> Generator[list[Launch], None, None]:
    """Inside, launches are recorded instead of executed."""
    caught: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        caught.append(Launch(self, args, kwargs))

    launch: Callable[..., Any] = JITFunction.run
    JITFunction.run = run
    try:
        yield caught
    finally:
        JITFunction.run = launch


def launch_everything(
    setting: Setting,
    sm: int = 90,
    tile: TileShape | None = None,
    tiles: TileShapes | None = None,
) -> None:
    """Call every launcher, on tensors of PyTorch's "meta" device, which have no memory."""
    heads, kv_heads, head_dim = setting.heads, setting.kv_heads, setting.head_dim
    kv_dtype = choose_kv_dtype(setting.kv_dtype, setting.dtype)
    k_cache, v_cache = (_pool(kv_heads, head_dim, kv_dtype) for _ in range(2))
    q = _empty(_TOKENS, heads, head_dim, dtype=setting.dtype)
    out = _empty(_TOKENS, heads, head_dim, dtype=setting.dtype)
    new = _empty(_TOKENS, kv_heads, head_dim, dtype=setting.dtype)  # keys, or values
    angles = _empty(_TOKENS, 1, head_dim // 2, dtype=setting.dtype)
    blocks = (2, 2, _NUM_BLOCKS, kv_heads, _BLOCK_SIZE)  # of two layers
    copied_as = torch.int8 if kv_dtype in LARGEST else kv_dtype
    copied = [_empty(*blocks, head_dim, dtype=copied_as)]
    if kv_dtype in LARGEST:
        copied.append(_empty(*blocks, dtype=torch.float32))  # the scales
    decodes, prompts = _batch(tokens_each=1), _batch(tokens_each=8)
    scale = head_dim**-0.5
    width, large_sms = pool_constants(k_cache)["WIDTH"], sm // 10 in (9, 10)
    bytes_each = q.itemsize, kv_dtype.itemsize
    tile = tile or choose_tile(heads // kv_heads, width, *bytes_each, large_sms)
    tiles = tiles or choose_tiles(width, q.itemsize, large_sms)

    decode(q, k_cache, v_cache, decodes, scale, out, 1, tile)
    decode(q, k_cache, v_cache, decodes, scale, out, _NUM_SPLITS, tile)
    prefill(q, k_cache, v_cache, prompts, scale, out, tiles)
    naive_paged_attention(q, k_cache, v_cache, prompts, scale)
    triton_store_kv(new, new, k_cache, v_cache, prompts)
    rope_and_store_kv(q, new, new, angles, angles, k_cache, v_cache, prompts)
    for tensor in copied:
        copy_blocks(tensor, tensor, _empty(4, 2, dtype=torch.int64))
    hidden = q.flatten(1)  # [tokens, heads * head_dim]
    add_rms_norm(hidden, hidden, hidden[0], 1e-5)
    gate, up = _empty(_TOKENS, 2 * _INNER, dtype=setting.dtype).split(_INNER, dim=-1)
    silu_and_mul(gate, up)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _pool(kv_heads: int, head_dim: int, kv_dtype: torch.dtype) -> KVPool:
    numbers = _empty(_NUM_BLOCKS, kv_heads, _BLOCK_SIZE, head_dim, dtype=kv_dtype)
    if kv_dtype not in LARGEST:
        return numbers
    scales = _empty(_NUM_BLOCKS, kv_heads, _BLOCK_SIZE, dtype=torch.float32)
    return QuantizedPool(numbers, scales)


def _batch(tokens_each: int) -> Batch:
    """Make sequences with `tokens_each` query tokens each, after a context."""
    num_seqs = _TOKENS // tokens_each
    return Batch(
        token_ids=_empty(_TOKENS, dtype=torch.int64),
        positions=_empty(_TOKENS, dtype=torch.int64),
        slot_mapping=_empty(_TOKENS, dtype=torch.int64),
        cu_seqlens_q=_empty(num_seqs + 1, dtype=torch.int32),
        context_lens=_empty(num_seqs, dtype=torch.int32),
        block_tables=_empty(num_seqs, _TABLE_WIDTH, dtype=torch.int32),
        logit_rows=_empty(num_seqs, dtype=torch.int64),
        query_lens=np.full(num_seqs, tokens_each),
        seq_lens=np.full(num_seqs, 1000 + tokens_each),
    )
