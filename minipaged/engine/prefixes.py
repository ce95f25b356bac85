"""Prefixes that stay in the cache until they are released (section 4.4, shared prefix)."""

from minipaged.engine.outputs import CachedPrefix
from minipaged.errors import InvalidRequest
from minipaged.memory import Memory
from minipaged.sequence import Sequence
from minipaged.utils.options import shown


class PinnedPrefixes:
    """The prefixes that are pinned, each as a sequence that never runs."""

    def __init__(self) -> None:
        self.lost: list[Sequence] = []
        """Those whose blocks are gone, because the memory was built anew. They are pinned again
        once a request has computed them."""
        self._sequences: dict[CachedPrefix, Sequence] = {}

    @property
    def pinned(self) -> list[CachedPrefix]:
        """Also those whose handle an interrupted caller did not get."""
        return list(self._sequences)

    def pin(self, seq: Sequence, memory: Memory) -> CachedPrefix | None:
        """Keep the blocks of a prefix; None unless all of it is in the cache."""
        if not _pin(seq, memory):
            return None
        prefix = CachedPrefix(seq.num_tokens, len(memory.tables[seq.seq_id]))
        self._sequences[prefix] = seq
        return prefix

    def release(self, prefix: CachedPrefix, memory: Memory) -> None:
        """Let go of a prefix. Raises InvalidRequest if it is not pinned here."""
        if not isinstance(prefix, CachedPrefix):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequest(
                f"{shown(prefix)} is no cached prefix: give what cache_prefix returned."
            )
        seq = self._sequences.get(prefix)
        if seq is None:
            raise InvalidRequest(f"{prefix} is not pinned here: was it released before?")
        if seq in self.lost:
            self.lost.remove(seq)
        else:
            memory.free(seq)
        del self._sequences[prefix]

    def lose_all(self) -> None:
        """The memory that kept them is no longer used."""
        self.lost = list(self._sequences.values())

    def pin_again(self, memory: Memory) -> None:
        """Pin the lost prefixes that are in the cache by now."""
        self.lost = [seq for seq in self.lost if not _pin(seq, memory)]


def _pin(seq: Sequence, memory: Memory) -> bool:
    if memory.pin(seq) == seq.num_tokens:
        return True
    memory.free(seq)
    return False
