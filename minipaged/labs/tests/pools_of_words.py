"""A memory whose blocks hold words instead of keys and values, so that tests can compare them."""

from itertools import count
from typing import Any

from minipaged.evaluation.testing.admission import admit
from minipaged.memory import BlockAllocator, BlockPair, CheckedAllocator, CheckedMemory
from minipaged.sequence import Sequence, SequenceGroup


class Pools:
    """A checked memory, and the content of its blocks."""

    def __init__(
        self, memory_class: Any, num_blocks: int = 20, num_swap_blocks: int = 20,
        caching: bool = False,
    ) -> None:  # fmt: skip
        self.memory: Any = CheckedMemory(
            memory_class(
                num_blocks=num_blocks,
                num_swap_blocks=num_swap_blocks,
                block_size=4,
                allocator=lambda number: CheckedAllocator(BlockAllocator(number)),
                enable_prefix_caching=caching,
            )
        )
        self.words = dict.fromkeys(range(num_blocks), "")
        self.swapped_words = dict.fromkeys(range(num_swap_blocks), "")
        self.ids = count()

    def group(self, num_tokens: int, width: int = 1, first: int = 0) -> SequenceGroup:
        """A request that has computed its prompt, forked and generated a few tokens."""
        seq = Sequence(next(self.ids), range(first, first + num_tokens))
        group = SequenceGroup(f"{seq.seq_id}", [seq], width=width)
        self.copy(admit(self.memory, group))
        self.compute(group)
        for _ in range(1, width):
            child = seq.fork(next(self.ids))
            self.memory.fork(seq, child)
            group.sequences.append(child)
        if width > 1:
            self.grow(group, 3)
        return group

    def grow(self, group: SequenceGroup, num_tokens: int) -> None:
        for seq in group.sequences:
            for _ in range(num_tokens):
                seq.append(10**6 + seq.seq_id)  # each sample has its own tokens
                self.copy(self.memory.append(seq))
                seq.mark_computed(1)
                self.write(seq, seq.num_tokens - 1)
            self.memory.cache_blocks(seq)

    def compute(self, group: SequenceGroup) -> None:
        for seq in group.sequences:
            for position in range(seq.num_computed_tokens, seq.num_tokens):
                self.write(seq, position)
            seq.mark_computed(seq.num_uncomputed_tokens)
            self.memory.cache_blocks(seq)

    def write(self, seq: Sequence, position: int) -> None:
        block = self.memory.tables[seq.seq_id].blocks[position // 4]
        before = self.words[block].split()[: position % 4]
        self.words[block] = " ".join([*before, f"{seq.token_ids[position]}"])

    def copy(self, pairs: list[BlockPair]) -> None:
        for source, target in pairs:
            self.words[target] = self.words[source]

    def reads(self, group: SequenceGroup) -> list[list[str]]:
        """The words that each sequence reads, block by block."""
        content: list[list[str]] = []
        for seq in group.sequences:
            swapped = self.memory.is_swapped(seq.seq_id)
            words = self.swapped_words if swapped else self.words
            blocks = self.memory.tables[seq.seq_id].blocks
            assert set(blocks) <= set(words), f"sequence {seq.seq_id} lists blocks {blocks}"
            content.append([words[block] for block in blocks])
        return content

    def check(self, group: SequenceGroup, before: list[list[str]]) -> None:
        """Raises AssertionError unless each sequence has the content that it had before."""
        for seq, now, then in zip(group.sequences, self.reads(group), before, strict=True):
            assert len(now) == len(then), f"number of blocks of sequence {seq.seq_id}"
            for logical, (word, old) in enumerate(zip(now, then, strict=True)):
                assert word == old, f"in logical block {logical} of sequence {seq.seq_id}"

    def swap_out(self, group: SequenceGroup) -> int:
        """Returns the number of copied blocks."""
        pairs = self.memory.swap_out(group)
        self._move(pairs, self.words, self.swapped_words)
        for source, _ in pairs:
            if not self.memory.ref_count(source) and source not in self.memory.cached:
                self.words[source] = "overwritten"
        return len(pairs)

    def swap_in(self, group: SequenceGroup) -> int:
        """Returns the number of copied blocks."""
        pairs = self.memory.swap_in(group)
        self._move(pairs, self.swapped_words, self.words)
        self.swapped_words |= {source: "overwritten" for source, _ in pairs}
        return len(pairs)

    def _move(self, pairs: list[BlockPair], source: dict[int, str], target: dict[int, str]) -> None:
        for old, new in pairs:
            sides = old in source, new in target
            assert all(sides), f"the pools have no blocks for the pair {(old, new)}"
            target[new] = source[old]

    def free(self, *groups: SequenceGroup) -> None:
        for seq in [seq for group in groups for seq in group.sequences]:
            self.memory.free(seq)

    @property
    def num_free(self) -> tuple[int, int]:
        return self.memory.num_free, self.memory.num_free_swap_blocks
