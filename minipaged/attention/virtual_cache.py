"""Keys and values in virtual memory, one contiguous region per sequence (see `VirtualMemory`).

    in memory  [layers, 2, regions, length, kv_heads, head_dim]    2: keys, values
    sliced     [2, regions, length, layers, kv_heads, head_dim]    vAttention's tensor slicing
    layers[i]  (k, v): each [regions, kv_heads, length, head_dim], strided views of either

The layers have the shape of paged memory's, with regions in the place of blocks. Only mapped bytes
may be touched, so attention reads `k[region, :, :seq_len]`, a view.
"""

from collections.abc import Sequence as Many

import numpy as np
import torch

from minipaged.attention.kv_cache import KVPair
from minipaged.config import ModelConfig
from minipaged.memory import BlockPair
from minipaged.memory.baselines.pages import MappedPages
from minipaged.memory.baselines.regions import RegionLayout


class VirtualKVCache:
    """Implements the interface of `KVCache` with regions in the virtual memory of this process.

    Raises:
        InvalidOption: the system does not have such pages, or refuses the addresses.
    """

    def __init__(self, config: ModelConfig, layout: RegionLayout, dtype: torch.dtype) -> None:
        self.block_size = layout.region_len
        self.device = torch.device("cpu")
        self.layout = layout
        self.pages = MappedPages(layout)
        # Via NumPy, because its array keeps the mapping alive; torch.frombuffer does not.
        memory = torch.from_numpy(np.frombuffer(self.pages.view(), dtype=np.uint8))
        # One of `outer` and `inner` is the number of layers, and the other one is 1.
        outer = layout.num_buffers // 2
        inner = config.num_layers // outer
        shape = (outer, 2, layout.num_regions, layout.region_len)
        elements = memory.view(dtype).view(*shape, inner, config.num_kv_heads, config.head_dim)
        by_layer = elements.movedim(4, 1).flatten(0, 1)  # [layers, 2, regions, length, ...]: a view
        assert by_layer.data_ptr() == memory.data_ptr(), "a copy instead of a view"
        self._pool = by_layer
        self.layers: list[KVPair] = [
            (keys.transpose(1, 2), values.transpose(1, 2)) for keys, values in by_layer
        ]

    def clear(self, blocks: Many[int]) -> None:
        """Does nothing: memory after a sequence's end is never read, and may not be mapped."""

    def copy(self, pairs: Many[BlockPair]) -> None:
        """Copy the mapped tokens of regions to other regions, before a fork's first write."""
        for source, target in pairs:
            mapped = min(self.pages.num_mapped(source), self.pages.num_mapped(target))
            tokens = slice(min(self.layout.tokens_in(mapped), self.layout.region_len))
            self._pool[:, :, target, tokens] = self._pool[:, :, source, tokens]

    def swap_out(self, pairs: Many[BlockPair]) -> None:
        """Does nothing: virtual memory has no swap pool."""
        assert not pairs, "virtual memory has no swap pool"

    def swap_in(self, pairs: Many[BlockPair]) -> None:
        """Does nothing: virtual memory has no swap pool."""
        assert not pairs, "virtual memory has no swap pool"
