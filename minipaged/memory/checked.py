"""Checkers: wrappers that recount after every call and name the call that broke a count.

They wrap the library's parts or a student's:

    LLM(parts=Parts(allocator=lambda n: CheckedAllocator(MyAllocator(n))))
    CheckedMemory(BlockManager(num_blocks=8, block_size=16))
"""

from collections import Counter
from typing import Any

from minipaged.errors import CheckFailed
from minipaged.memory.allocator import Allocator
from minipaged.memory.interface import Memory, MemoryView
from minipaged.utils.counts import counted


class CheckedAllocator:
    """Counts an allocator's owners separately and compares after every call."""

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator
        self._owners = Counter[int]()
        self.num_blocks = allocator.num_blocks
        self._check("__init__()")

    @property
    def num_free(self) -> int:
        return self._allocator.num_free

    def ref_count(self, block: int) -> int:
        return self._allocator.ref_count(block)

    def allocate(self) -> int:
        block = self._allocator.allocate()
        if not 0 <= block < self.num_blocks:
            raise CheckFailed(f"allocate() gave block {block}, outside 0 to {self.num_blocks - 1}.")
        if self._owners[block]:
            raise CheckFailed(f"allocate() gave block {block}, which has an owner.")
        self._owners[block] = 1
        self._check("allocate()", block)
        return block

    def share(self, block: int) -> None:
        self._allocator.share(block)  # raises for a block without an owner
        if not self._owners[block]:
            raise CheckFailed(f"share({block}) was accepted, but block {block} has no owner.")
        self._owners[block] += 1
        self._check(f"share({block})", block)

    def free(self, block: int) -> None:
        self._allocator.free(block)  # raises for a block without an owner
        if not self._owners[block]:
            raise CheckFailed(f"free({block}) was accepted, but block {block} has no owner.")
        self._owners[block] -= 1
        self._check(f"free({block})", block)

    def _check(self, call: str, block: int | None = None) -> None:
        free = self.num_blocks - sum(1 for owners in self._owners.values() if owners)
        if self.num_free != free:
            raise CheckFailed(
                f"num_free is {self.num_free}, but "
                f"{counted(free, 'block has', 'blocks have')} no owner (last call: {call})."
            )
        if block is not None and self.ref_count(block) != self._owners[block]:
            raise CheckFailed(
                f"ref_count({block}) is {self.ref_count(block)}, but {self._owners[block]} own it "
                f"(last call: {call})."
            )


class CheckedMemory:
    """Recounts the owners of every block after every call that may change one. See `recount`."""

    _MOVERS = frozenset(
        {"admit", "append", "fork", "cache_blocks", "pin", "free", "swap_out", "swap_in"}
    )

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._memory, name)
        if name not in self._MOVERS:
            return value

        def call_and_recount(*args: Any, **options: Any) -> Any:
            result = value(*args, **options)
            recount(self._memory, f"{name}({', '.join(map(repr, (*args, *options.values())))})")
            return result

        return call_and_recount


def recount(memory: MemoryView, call: str) -> None:
    """Count the owners of every block in the block tables. Raises CheckFailed.

    Invariants: a block has as many owners as tables contain it; blocks in no table are free; no
    table contains a block twice; a table has exactly the blocks that its tokens need (a memory that
    reserves may have more); the parent of a cached block is cached.

    Args:
        call: the last call to the memory, which the error names.
    """
    owners, swap_owners = Counter[int](), Counter[int]()
    for seq_id, table in memory.tables.items():
        (swap_owners if memory.is_swapped(seq_id) else owners).update(table.blocks)
        distinct, needed = len(set(table.blocks)), -(-table.num_tokens // table.block_size)
        _expect(distinct, len(table), f"distinct blocks of sequence {seq_id}", call)
        if not memory.reserves or len(table) < needed:
            _expect(len(table), needed, f"blocks of sequence {seq_id}", call)
    for block in range(memory.num_blocks):
        _expect(memory.ref_count(block), owners[block], f"ref_count({block})", call)
    for block in range(memory.num_swap_blocks):
        name = f"swap_ref_count({block})"
        _expect(memory.swap_ref_count(block), swap_owners[block], name, call)
    ownerless = memory.num_blocks - len(+owners)
    if not memory.reserves or memory.num_free > ownerless:
        _expect(memory.num_free, ownerless, "num_free", call)
    for block, (parent, _) in memory.cached.items():
        if isinstance(parent, int) and parent not in memory.cached:
            raise CheckFailed(
                f"block {block} is cached, but its parent {parent} is not (last call: {call})."
            )
    free_to_swap = memory.num_swap_blocks - len(+swap_owners)
    _expect(memory.num_free_swap_blocks, free_to_swap, "num_free_swap_blocks", call)


def _expect(found: int, counted: int, what: str, call: str) -> None:
    if found != counted:
        raise CheckFailed(f"{what} is {found}, but counting gives {counted} (last call: {call}).")
