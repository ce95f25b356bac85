"""A model of the tensors that a block manager describes: contents and owners, in plain Python.

Each slot stores a hash of everything that its keys and values depend on: the salt and all tokens up
to that position. The manager's copies are carried out. A wrong slot, a missing copy, a lost block,
or a block found under the wrong prefix then shows as a sequence that reads another sequence's
content.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from minipaged.evaluation.soak.run import Mismatch
from minipaged.memory import BlockPair, Memory
from minipaged.memory.checked import recount
from minipaged.sequence import Sequence

EMPTY = 0


class Blocks:
    """The model of the pool or of the swap pool: contents and owners."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.slots = [EMPTY] * (num_blocks * block_size)
        self.owners = [0] * num_blocks
        self.num_free = num_blocks

    def own(self, block: int) -> None:
        """Record one more block table with this block."""
        self.num_free -= self.owners[block] == 0
        self.owners[block] += 1

    def disown(self, block: int) -> None:
        """Record that a block table no longer has this block."""
        self.owners[block] -= 1
        self.num_free += self.owners[block] == 0

    def read(self, block: int, count: int) -> list[int]:
        """The contents of the first slots of a block."""
        start = block * self.block_size
        return self.slots[start : start + count]

    def copy(self, pairs: Iterable[BlockPair], source: "Blocks") -> None:
        """Copy blocks of `source` into these."""
        size = self.block_size
        for old, new in pairs:
            self.slots[new * size : (new + 1) * size] = source.read(old, size)


@dataclass(eq=False)
class Held:
    """The model of one sequence."""

    contents: list[int]  # the salt, then the expected content of each token's slot
    home: Blocks
    blocks: list[int] = field(default_factory=list[int])  # its table after the last operation
    num_readable: int = 0  # number of leading tokens whose content is written


class TensorModel:
    """The expected content of pool and swap pool, and the owners of blocks.

    `settle` compares what one operation changed, in time that does not grow with the pool.
    `recount` compares everything.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.pool = Blocks(memory.num_blocks, memory.block_size)
        self.swap_pool = Blocks(memory.num_swap_blocks, memory.block_size)
        self.held: dict[int, Held] = {}  # by sequence id
        self._salts: list[str | None] = []

    def add(self, seq: Sequence, num_readable: int = 0) -> None:
        """Add a sequence without blocks."""
        if seq.cache_salt not in self._salts:
            self._salts.append(seq.cache_salt)
        held = Held([self._salts.index(seq.cache_salt)], self.pool, num_readable=num_readable)
        self.held[seq.seq_id] = held
        self.extend(seq)

    def extend(self, seq: Sequence) -> None:
        """The sequence has more tokens."""
        contents = self.held[seq.seq_id].contents
        for token in seq.token_ids[len(contents) - 1 :]:
            contents.append(hash((contents[-1], token)))

    def write(self, seq: Sequence, stop: int) -> None:
        """Compute the tokens up to `stop`. Raises Mismatch if another sequence would change."""
        held, table = self.held[seq.seq_id], self.memory.tables[seq.seq_id]
        for position in range(seq.num_computed_tokens, stop):
            slot, content = table.slot(position), held.contents[position + 1]
            if self.pool.slots[slot] != content:
                block = slot // self.memory.block_size
                if self.pool.owners[block] != 1 or block in self.memory.cached:
                    raise Mismatch(f"{seq} writes to block {block}, which is shared")
                self.pool.slots[slot] = content
        held.num_readable = stop

    def settle(self, sequences: Iterable[Sequence], home: Blocks | None = None) -> None:
        """Compare what the last operation changed with the model. Raises Mismatch."""
        touched: list[tuple[Blocks, int]] = []
        for seq in sequences:
            held = self.held[seq.seq_id]
            table = self.memory.tables.get(seq.seq_id)
            new, new_home = [] if table is None else table.blocks, home or held.home
            if new == held.blocks and new_home is held.home:
                continue
            old, old_home, held.blocks, held.home = held.blocks, held.home, list(new), new_home
            for block in old:
                old_home.disown(block)
            for block in new:
                new_home.own(block)
            touched += [(old_home, block) for block in old]
            for logical, block in enumerate(new):
                if old_home is not new_home or block not in old[logical : logical + 1]:
                    touched.append((new_home, block))
                    self._check_content(seq.seq_id, held, logical)
        for blocks, block in touched:
            is_pool = blocks is self.pool
            count = (self.memory.ref_count if is_pool else self.memory.swap_ref_count)(block)
            if count != blocks.owners[block]:
                where = "block" if is_pool else "swap block"
                raise Mismatch(
                    f"ref_count of {where} {block} is {count}, but {blocks.owners[block]} own it"
                )
        free = self.memory.num_free, self.memory.num_free_swap_blocks
        if free != (self.pool.num_free, self.swap_pool.num_free):
            counted = self.pool.num_free, self.swap_pool.num_free
            raise Mismatch(f"{free} blocks and swap blocks are free, but {counted} were counted")

    def _check_content(self, seq_id: int, held: Held, logical: int) -> None:
        start = logical * self.memory.block_size
        stop = min(start + self.memory.block_size, held.num_readable)
        wanted = held.contents[start + 1 : stop + 1]
        if held.home.read(held.blocks[logical], len(wanted)) != wanted:
            raise Mismatch(
                f"sequence {seq_id} reads foreign content in block {held.blocks[logical]}"
            )

    def recount(self) -> None:
        """Compare everything with the model. Raises Mismatch or CheckFailed."""
        recount(self.memory, "unknown")
        self.settle([])
        for seq_id, table in self.memory.tables.items():
            if self.held[seq_id].blocks != table.blocks:
                raise Mismatch(f"the table of sequence {seq_id} changed without an operation on it")
        for seq_id, held in self.held.items():
            for logical in range(len(held.blocks)):
                self._check_content(seq_id, held, logical)
        if self.memory.usage().total != len(self.pool.slots):
            raise Mismatch("the categories of usage() do not add up to the pool")
