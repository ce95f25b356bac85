"""Allocates the tensors of a pool: on a GPU, in pinned memory, or as pages of the system."""

import mmap
from math import prod

import torch
from torch import Tensor

from minipaged.attention.quantized_cache import LARGEST, KVPool, QuantizedPool
from minipaged.config import ModelConfig
from minipaged.errors import InvalidOption
from minipaged.utils.device import GIB

KVPair = tuple[KVPool, KVPool]


def new_pool(
    config: ModelConfig,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    pin: bool = False,
) -> list[Tensor]:
    """Allocate the elements and, for 8-bit types, their scales."""
    # torch.zeros, not torch.empty: attention multiplies unwritten slots by a weight of zero, and
    # zero times an accidental NaN would be NaN.
    shape = (config.num_layers, 2, num_blocks, config.num_kv_heads, block_size)
    if dtype not in LARGEST:
        return [_zeros((*shape, config.head_dim), dtype, device, pin)]
    # Of any 8-bit type, blocks are copied as int8: PyTorch cannot index float8.
    numbers = _zeros((*shape, config.head_dim), torch.int8, device, pin)
    return [numbers, _zeros(shape, torch.float32, device, pin)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, pin: bool) -> Tensor:
    num_bytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or pin or num_bytes == 0:
        return torch.zeros(shape, dtype=dtype, device=device, pin_memory=pin)
    # torch.zeros writes every zero, which takes a second per GiB. A new page from the operating
    # system is already zero, and uses no memory until it is written. The mapping is private, so
    # that a forked process does not share its parent's cache.
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise InvalidOption(
            f"the system cannot allocate {num_bytes / GIB:.1f} GiB for keys and values ({error}): "
            "lower num_blocks or num_swap_blocks."
        ) from error
    return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(shape)


def by_layer(pool: list[Tensor], dtype: torch.dtype) -> list[KVPair]:
    """Return views of the keys and values of each layer."""

    def part(layer: int, kv: int) -> KVPool:
        if len(pool) == 1:
            return pool[0][layer, kv]
        numbers, scales = pool
        return QuantizedPool(numbers[layer, kv].view(dtype), scales[layer, kv])

    return [(part(layer, 0), part(layer, 1)) for layer in range(len(pool[0]))]
