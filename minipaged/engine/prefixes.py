"""Pinned prefixes, which stay in the cache until they are released (section 4.4, shared prefix)."""

from minipaged.engine.outputs import CachedPrefix
from minipaged.errors import InvalidRequest
from minipaged.memory import Memory
from minipaged.sequence import Sequence
from minipaged.utils.options import shown


class PinnedPrefixes:
    """The pinned prefixes, each as a sequence that never runs."""

    def __init__(self) -> None:
        self.lost: list[Sequence] = []
        """Prefixes that lost their blocks because the memory was rebuilt. They are pinned again
        after a request has computed them."""
        self._sequences: dict[CachedPrefix, Sequence] = {}

    @property
    def pinned(self) -> list[CachedPrefix]:
        """All pinned prefixes, including those whose handle an interrupted call did not return."""
        return list(self._sequences)

    def pin(self, seq: Sequence, memory: Memory) -> CachedPrefix | None:
        """Pin the blocks of a prefix; None unless all of it is in the cache."""
        if not _pin(seq, memory):
            return None
        prefix = CachedPrefix(seq.num_tokens, len(memory.tables[seq.seq_id]))
        self._sequences[prefix] = seq
        return prefix

    def release(self, prefix: CachedPrefix, memory: Memory) -> None:
        """Release a prefix. Raises InvalidRequest if it is not pinned here."""
        if not isinstance(prefix, CachedPrefix):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequest(
                f"{shown(prefix)} is not a cached prefix: give the result of cache_prefix."
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
        """Mark all prefixes as lost, after the memory was replaced."""
        self.lost = list(self._sequences.values())

    def pin_again(self, memory: Memory) -> None:
        """Pin lost prefixes that are in the cache again."""
        self.lost = [seq for seq in self.lost if not _pin(seq, memory)]


def _pin(seq: Sequence, memory: Memory) -> bool:
    if memory.pin(seq) == seq.num_tokens:
        return True
    memory.free(seq)
    return False
