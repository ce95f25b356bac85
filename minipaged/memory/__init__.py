"""Who owns which block. Pure Python: nothing in this package imports torch.

Read it in this order: allocator (physical blocks), block_table (one sequence), prefix_cache (blocks
found again by their content), roles (what a memory must do), block_manager (all sequences), checked
(a second opinion wrapped round the others). The rivals of paging stand beside it: contiguous, on
buddy; and virtual, on slots and pages. What both lack is in plain, and all names are in kinds.
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
