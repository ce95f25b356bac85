"""Keys and values in virtual memory: a slot a sequence, in one piece (see `memory/virtual.py`).

    in memory  [layers, 2, slots, length, kv_heads, head_dim]    2: keys, values
    sliced     [2, slots, length, layers, kv_heads, head_dim]    vAttention's tensor slicing
    layers[i]  (k, v): each [slots, kv_heads, length, head_dim], strided views of either

They have the shape of paged memory's layers, with a slot where that has a block. But only those
bytes may be touched that are mapped. So attention takes `k[slot, :, :seq_len]`, without a copy.
"""

from collections.abc import Sequence as Many
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from minipaged.attention.kv_cache import KVPair
from minipaged.attention.virtual_cuda import CudaPages
from minipaged.config import ModelConfig
from minipaged.memory import BlockPair
from minipaged.memory.baselines.pages import MappedPages
from minipaged.memory.baselines.slots import Pages, RegionLayout


class CountedPages(Pages, Protocol):
    """Pages that know how many groups of a slot are mapped."""

    def num_mapped(self, slot: int) -> int: ...


class VirtualKVCache:
    """What model and runner ask of a `KVCache`, over slots of virtual memory.

    Args:
        memory: all bytes of the layout, [num_bytes]; most of them without memory behind them.
        pages: maps and unmaps that memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: RegionLayout,
        dtype: torch.dtype,
        memory: Tensor,
        pages: CountedPages,
    ) -> None:
        self.block_size = layout.region_len
        self.device = memory.device
        self.layout = layout
        self.pages = pages
        # One of `outer` and `inner` is the number of layers, and the other one 1.
        outer = layout.num_buffers // 2
        inner = config.num_layers // outer
        shape = (outer, 2, layout.num_slots, layout.region_len)
        numbers = memory.view(dtype).view(*shape, inner, config.num_kv_heads, config.head_dim)
        by_layer = numbers.movedim(4, 1).flatten(0, 1)  # [layers, 2, slots, length, ...]: a view
        assert by_layer.data_ptr() == memory.data_ptr(), "copied, where a view was meant"
        self._pool = by_layer
        self.layers: list[KVPair] = [
            (keys.transpose(1, 2), values.transpose(1, 2)) for keys, values in by_layer
        ]
        self.swap_layers: list[KVPair] = []

    @classmethod
    def on_cpu(
        cls, config: ModelConfig, layout: RegionLayout, dtype: torch.dtype
    ) -> "VirtualKVCache":
        """A cache in the memory of this process. Raises InvalidOption if it cannot be had."""
        pages = MappedPages(layout)
        # By way of NumPy: its array holds the mapping, which torch.frombuffer alone does not.
        memory = torch.from_numpy(np.frombuffer(pages.view(), dtype=np.uint8))
        return cls(config, layout, dtype, memory, pages)

    @classmethod
    def on_gpu(
        cls,
        config: ModelConfig,
        layout: RegionLayout,
        dtype: torch.dtype,
        budget: int,
        device: torch.device,
    ) -> "VirtualKVCache":
        """A cache in a GPU's memory: `budget` page groups. Raises InvalidOption."""
        pages = CudaPages(layout, budget, device)
        return cls(config, layout, dtype, pages.tensor(), pages)

    def copy(self, pairs: Many[BlockPair]) -> None:
        """Copy what is mapped of slots to others: a fork's first write."""
        for source, target in pairs:
            mapped = min(self.pages.num_mapped(source), self.pages.num_mapped(target))
            tokens = slice(min(self.layout.tokens_in(mapped), self.layout.region_len))
            self._pool[:, :, target, tokens] = self._pool[:, :, source, tokens]

    def swap_out(self, pairs: Many[BlockPair]) -> None:
        """Nothing: this memory swaps nobody."""
        assert not pairs, "virtual memory has no swap pool"

    def swap_in(self, pairs: Many[BlockPair]) -> None:
        """Nothing: this memory swaps nobody."""
        assert not pairs, "virtual memory has no swap pool"
