"""Lab 2: classic mistakes, each with the task that it must cost points; and unusual right ones."""

BEGINNING = """
from minipaged.memory.block_manager import BlockManager as LibraryManager
from minipaged.memory.block_table import BlockTable as LibraryTable
"""

WRONG = {
    "a_slot_in_the_logical_block": (
        1,
        """
class BlockTable(LibraryTable):
    def slot(self, position):
        assert 0 <= position < self.num_tokens
        return position
""",
    ),
    "a_slot_for_a_token_that_is_not_there": (
        1,
        """
class BlockTable(LibraryTable):
    def slot(self, position):
        logical, offset = divmod(position, self.block_size)
        return self.blocks[logical] * self.block_size + offset
""",
    ),
    "a_full_last_block_looks_empty": (
        1,
        """
class BlockTable(LibraryTable):
    def filled(self, logical):
        if logical == len(self.blocks) - 1:
            return self.num_tokens % self.block_size
        return self.block_size
""",
    ),
    "shares_the_list_itself": (
        2,
        """
class BlockTable(LibraryTable):
    def beginning(self, num_tokens):
        right = super().beginning(num_tokens)
        if right.blocks == self.blocks:
            right.blocks = self.blocks
        return right
""",
    ),
    "a_beginning_without_its_last_block": (
        2,
        """
class BlockTable(LibraryTable):
    def beginning(self, num_tokens):
        full = num_tokens // self.block_size
        return type(self)(self.block_size, self.blocks[:full], num_tokens, full)
""",
    ),
    "publishes_a_block_that_is_not_full": (
        2,
        """
class BlockTable(LibraryTable):
    def beginning(self, num_tokens):
        blocks = self.blocks[: -(-num_tokens // self.block_size)]
        return type(self)(self.block_size, blocks, num_tokens, self.num_cached_blocks)
""",
    ),
    "a_block_too_early": (
        3,
        """
class BlockManager(LibraryManager):
    def _blocks_for(self, num_tokens):
        return num_tokens // self.block_size + 1
""",
    ),
    "a_block_too_late": (
        3,
        """
class BlockManager(LibraryManager):
    def _blocks_for(self, num_tokens):
        return num_tokens // self.block_size
""",
    ),
    "never_updates_num_tokens": (
        3,
        """
class BlockManager(LibraryManager):
    def append(self, seq):
        table = self._tables[seq.seq_id]
        before = table.num_tokens
        pairs = super().append(seq)
        table.num_tokens = before
        return pairs
""",
    ),
    "one_block_a_call": (
        3,
        """
class BlockManager(LibraryManager):
    def append(self, seq):
        table = self._tables[seq.seq_id]
        if self._blocks_for(seq.num_tokens) > len(table.blocks):
            table.blocks.append(self._pool.allocate())
        table.num_tokens = seq.num_tokens
        return []
""",
    ),
    "always_says_yes": (
        4,
        """
class BlockManager(LibraryManager):
    def can_append(self, group):
        return True
""",
    ),
    "wants_a_block_for_every_token": (
        4,
        """
class BlockManager(LibraryManager):
    def can_append(self, group):
        return self.num_free >= sum(seq.num_uncomputed_tokens for seq in group.sequences)
""",
    ),
    "asks_for_one_sequence_only": (
        4,
        """
class BlockManager(LibraryManager):
    def can_append(self, group):
        table = self._tables[group.sequences[0].seq_id]
        missing = self._blocks_for(group.sequences[0].num_tokens) - len(table)
        return self.num_free >= missing
""",
    ),
    "forgets_the_table_but_not_the_blocks": (
        4,
        """
class BlockManager(LibraryManager):
    def free(self, seq):
        del self._tables[seq.seq_id]
""",
    ),
    "frees_the_blocks_but_keeps_the_table": (
        4,
        """
class BlockManager(LibraryManager):
    def free(self, seq):
        for block in reversed(self._tables[seq.seq_id].blocks):
            self._pool_of(seq).free(block)
""",
    ),
    "takes_all_blocks_for_the_pools": (
        4,
        """
class BlockManager(LibraryManager):
    def free(self, seq):
        for block in reversed(self._tables.pop(seq.seq_id).blocks):
            self._pool.free(block)
        self._swapped.discard(seq.seq_id)
        self._pinned.discard(seq.seq_id)
""",
    ),
    "still_swapped_when_it_is_gone": (
        4,
        """
class BlockManager(LibraryManager):
    def free(self, seq):
        for block in reversed(self._tables.pop(seq.seq_id).blocks):
            self._pool_of(seq).free(block)
""",
    ),
    "lets_go_of_the_first_block_first": (
        4,
        """
class BlockManager(LibraryManager):
    def free(self, seq):
        self._tables[seq.seq_id].blocks.reverse()
        super().free(seq)
""",
    ),
}

RIGHT = {
    "counts_otherwise_and_never_copies": """
class BlockTable:
    def __init__(self, block_size, blocks, num_tokens, num_cached_blocks=0):
        self.block_size = block_size
        self.blocks = blocks
        self.num_tokens = num_tokens
        self.num_cached_blocks = num_cached_blocks

    def __len__(self):
        return len(self.blocks)

    def slot(self, position):
        if position not in range(self.num_tokens):
            raise IndexError(position)
        every = [b * self.block_size + i for b in self.blocks for i in range(self.block_size)]
        return every[position]

    def filled(self, logical):
        first = logical * self.block_size
        return len(range(first, self.num_tokens)[: self.block_size])

    def beginning(self, num_tokens):
        blocks = [b for i, b in enumerate(self.blocks) if i * self.block_size < num_tokens]
        full = sum((i + 1) * self.block_size <= num_tokens for i in range(self.num_cached_blocks))
        return BlockTable(self.block_size, blocks, num_tokens, full)


class BlockManager(LibraryManager):
    def append(self, seq):
        table = self._tables[seq.seq_id]
        while len(table.blocks) * self.block_size < seq.num_tokens:
            table.blocks.append(self._pool.allocate())
        table.num_tokens = seq.num_tokens
        return []

    def can_append(self, group):
        slots = {s.seq_id: len(self._tables[s.seq_id]) * self.block_size for s in group.sequences}
        missing = [max(0, s.num_tokens - slots[s.seq_id]) for s in group.sequences]
        return sum((n + self.block_size - 1) // self.block_size for n in missing) <= self.num_free

    def free(self, seq):
        table = self._tables[seq.seq_id]
        pool = self._pool_of(seq)
        while table.blocks:
            pool.free(table.blocks.pop())
        del self._tables[seq.seq_id]
        self._swapped -= {seq.seq_id}
        self._pinned -= {seq.seq_id}
""",
    "takes_blocks_by_the_last_offset": """
class BlockManager(LibraryManager):
    def append(self, seq):
        table = self._tables[seq.seq_id]
        for position in range(table.num_tokens, seq.num_tokens):
            if position % self.block_size == 0:
                table.blocks += [self._pool.allocate()]
        table.num_tokens = seq.num_tokens
        return []
""",
}
