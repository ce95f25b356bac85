"""Who owns which block. Pure Python: nothing in this package imports torch.

Read it in this order: allocator (physical blocks), block_table (one sequence), block_manager (all
sequences), checked (a second opinion wrapped round the others).
"""

from minipaged.memory.allocator import Allocator, BlockAllocator
from minipaged.memory.block_manager import BlockManager, BlockPair, Memory, MemoryUsage
from minipaged.memory.block_table import BlockTable
from minipaged.memory.checked import CheckedAllocator, CheckedMemory

__all__ = [
    "Allocator",
    "BlockAllocator",
    "BlockManager",
    "BlockPair",
    "BlockTable",
    "CheckedAllocator",
    "CheckedMemory",
    "Memory",
    "MemoryUsage",
]
