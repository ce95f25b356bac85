"""One sequence's block table: logical block i is physical block `blocks[i]` (section 4.2)."""


class BlockTable:
    """Maps logical to physical blocks, and records how many token slots are filled.

    Every logical block except the last is full:

        blocks  = [7, 1, 3], block_size = 4, num_tokens = 10
        logical block 0 -> physical 7: tokens 0 1 2 3
        logical block 1 -> physical 1: tokens 4 5 6 7
        logical block 2 -> physical 3: tokens 8 9 and two empty slots
    """

    def __init__(
        self, block_size: int, blocks: list[int], num_tokens: int, num_cached_blocks: int = 0
    ) -> None:
        self.block_size = block_size
        self.blocks = blocks
        self.num_tokens = num_tokens
        self.num_cached_blocks = num_cached_blocks  # leading blocks in the prefix cache

    def __len__(self) -> int:
        """Return the number of logical blocks."""
        return len(self.blocks)

    def slot(self, position: int) -> int:
        """Return the slot of the token at a position: physical block * block size + offset."""
        assert 0 <= position < self.num_tokens, f"position {position} has no slot yet"
        logical, offset = divmod(position, self.block_size)
        return self.blocks[logical] * self.block_size + offset

    def filled(self, logical: int) -> int:
        """Return how many slots of this logical block hold a token."""
        return min(self.block_size, self.num_tokens - logical * self.block_size)

    def beginning(self, num_tokens: int) -> "BlockTable":
        """Return a new table of the blocks of the first tokens, from which a fork starts."""
        blocks = self.blocks[: -(-num_tokens // self.block_size)]
        num_cached_blocks = min(self.num_cached_blocks, num_tokens // self.block_size)
        return type(self)(self.block_size, blocks, num_tokens, num_cached_blocks)

    def __repr__(self) -> str:
        return f"BlockTable({self.num_tokens} tokens in blocks {self.blocks})"
