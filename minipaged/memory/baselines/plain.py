"""The common part of contiguous and virtual memory: no prefix cache, no swapping."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from minipaged.errors import InvalidRequest
from minipaged.memory.block_table import BlockTable
from minipaged.memory.interface import BlockPair
from minipaged.memory.prefix_cache import CacheKey
from minipaged.sequence import Sequence, SequenceGroup


class PlainMemory(ABC):
    """The methods of the interface `Memory` that both baselines implement alike."""

    reserves = True  # takes blocks before there are tokens for them
    num_swap_blocks = 0
    num_free_swap_blocks = 0

    def __init__(self) -> None:
        self._tables: dict[int, BlockTable] = {}  # by sequence id
        self.tables: Mapping[int, BlockTable] = self._tables  # for others, to be read only

    @abstractmethod
    def ref_count(self, block: int) -> int:
        """The number of sequences that own this block."""

    # ---- no prefix cache -----------------------------------------------------------------------

    @property
    def cached(self) -> Mapping[int, CacheKey]:
        return {}

    def num_cached_tokens(self, seq: Sequence) -> int:
        return 0

    def cache_blocks(self, seq: Sequence) -> list[int]:
        return []

    def pin(self, seq: Sequence) -> int:
        """Raises InvalidRequest: there is no prefix cache."""
        raise InvalidRequest("only paged memory keeps prefixes: choose memory='paged'.")

    # ---- no swapping: preempted requests are recomputed ----------------------------------------

    def can_swap_out(self, group: SequenceGroup) -> bool:
        return False

    def swap_out(self, group: SequenceGroup) -> list[BlockPair]:
        raise AssertionError("there is no swap pool: ask can_swap_out first")

    def swap_in(self, group: SequenceGroup) -> list[BlockPair]:
        raise AssertionError("there is no swap pool")

    def is_swapped(self, seq_id: int) -> bool:
        return False

    def swap_ref_count(self, block: int) -> int:
        raise AssertionError("there is no swap pool")

    # ---- tables --------------------------------------------------------------------------------

    def num_distinct_blocks(self, group: SequenceGroup) -> int:
        """The number of blocks of the group; a shared block counts once."""
        return len({b for s in group.sequences for b in self._tables[s.seq_id].blocks})
