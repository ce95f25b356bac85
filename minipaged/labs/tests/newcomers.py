"""Sequences that use a memory or a cache, grow, and end: for the labs without a model."""

import random

from minipaged.evaluation.testing.admission import admit
from minipaged.memory import (
    BlockAllocator,
    BlockManager,
    BlockTable,
    CheckedAllocator,
    CheckedMemory,
)
from minipaged.sequence import Sequence, SequenceGroup


class Story:
    """Sequences that are admitted to a memory and grow in it."""

    def __init__(self, memory) -> None:
        self.memory = memory
        self.num_sequences = 0

    def comes(self, *lengths: int) -> SequenceGroup:
        """A group with a sequence of each of these lengths."""
        first = self.num_sequences
        self.num_sequences += len(lengths)
        sequences = [
            Sequence(first + number, range(length)) for number, length in enumerate(lengths)
        ]
        group = SequenceGroup(str(first), sequences)
        admit(self.memory, group)
        return group

    def samples(self, seq: Sequence, num_tokens: int = 1) -> None:
        """Mark all tokens as computed, as a step does, and append more."""
        seq.mark_computed(seq.num_uncomputed_tokens)
        for _ in range(num_tokens):
            seq.append(0)

    def grows(self, seq: Sequence, num_tokens: int = 1) -> list:
        self.samples(seq, num_tokens)
        return self.memory.append(seq)

    def table(self, seq: Sequence):
        return self.memory.tables[seq.seq_id]


class Users:
    """Sequences that write blocks of 4 and cache them."""

    def __init__(self, cache) -> None:
        self.cache = cache
        self.num_sequences = 0

    def sequence(self, tokens, **options) -> Sequence:
        self.num_sequences += 1
        return Sequence(self.num_sequences, tokens, **options)

    def writes(self, tokens, num_computed=None, **options) -> tuple[Sequence, BlockTable]:
        """A sequence without cached blocks, so that all its blocks are new."""
        seq = self.sequence(tokens, **options)
        blocks = [self.cache.allocate() for _ in range(-(-seq.num_tokens // 4))]
        seq.mark_computed(seq.num_tokens if num_computed is None else num_computed)
        return seq, BlockTable(4, blocks, seq.num_tokens)

    def caches(self, tokens, num_computed=None, **options) -> BlockTable:
        seq, table = self.writes(tokens, num_computed, **options)
        self.cache.cache_blocks(seq, table)
        return table

    def finds(self, tokens, **options) -> list[int]:
        return self.cache.find(self.sequence(tokens, **options))

    def frees(self, table: BlockTable) -> None:
        for block in reversed(table.blocks):  # as sequences do
            self.cache.free(block)


def serve_in_any_order(prefix_cache, seed: int) -> None:
    """Every cached block that is found must have the right content. Raises AssertionError."""
    rng = random.Random(seed)
    memory = CheckedMemory(  # recounts all owners after every call
        BlockManager(
            num_blocks=12,
            block_size=4,
            allocator=lambda num_blocks: CheckedAllocator(BlockAllocator(num_blocks)),
            enable_prefix_caching=True,
            prefix_cache=prefix_cache,
        )
    )
    holds: dict[int, tuple] = {}  # by block: the salt and all tokens up to its end, when written
    running: list[Sequence] = []
    num_cached = 0
    for number in range(250):
        kinds = [rng.randrange(2) for _ in range(rng.randrange(1, 4))]  # of block
        tokens = [kind for kind in kinds for _ in range(4)] + [7]
        seq = Sequence(number, tokens, cache_salt=rng.choice([None, "ann"]))
        group = SequenceGroup(str(number), [seq])
        while running and (len(running) > 3 or not memory.can_admit(group, alone=False)):
            memory.free(running.pop(rng.randrange(len(running))))
        admit(memory, group)
        blocks = memory.tables[number].blocks
        content = [(seq.cache_salt, *tokens[: 4 * i + 4]) for i in range(len(blocks))]
        for logical in range(seq.num_computed_tokens // 4):
            assert holds[blocks[logical]] == content[logical], "found a block with other content"
            num_cached += 1
        holds |= dict(zip(blocks, content, strict=True))
        seq.mark_computed(seq.num_uncomputed_tokens)
        memory.cache_blocks(seq)
        running.append(seq)
    for seq in running:
        memory.free(seq)
    assert memory.num_free == 12
    assert num_cached > 100, f"only {num_cached} cached blocks were found"
