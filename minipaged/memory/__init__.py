"""Maps sequences to blocks: pure Python, without torch.

Reading order: allocator (physical blocks), block_table (one sequence), prefix_cache (blocks by
content), interface (the role `memory`), block_manager (all sequences), checked (a checker around
the others). Then the baselines: contiguous, on buddy; and virtual, on regions and pages. `plain`
has the features that both lack.
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
