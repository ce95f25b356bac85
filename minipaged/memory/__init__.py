"""Which sequence owns which block: pure Python, without torch.

Read it in this order: allocator (physical blocks), block_table (one sequence), prefix_cache (blocks
found by their content), interface (what a memory must do), block_manager (all sequences), checked
(a checker around the others). Then the baselines: contiguous, on buddy; and virtual, on regions and
pages. What both lack is in plain.
"""

from minipaged.memory.allocator import Allocator, BlockAllocator
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.block_table import BlockTable
from minipaged.memory.checked import CheckedAllocator, CheckedMemory
from minipaged.memory.interface import Admission, BlockPair, Memory, MemoryUsage, MemoryView
from minipaged.memory.prefix_cache import CacheKey, PrefixCache

__all__ = [
    "Admission",
    "Allocator",
    "BlockAllocator",
    "BlockManager",
    "BlockPair",
    "BlockTable",
    "CacheKey",
    "CheckedAllocator",
    "CheckedMemory",
    "Memory",
    "MemoryUsage",
    "MemoryView",
    "PrefixCache",
]
