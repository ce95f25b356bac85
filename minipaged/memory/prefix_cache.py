"""Full blocks, found again by their content: automatic prefix caching.

Keys and values of a token depend on all tokens before it, so a block can serve another request only
if everything up to its end is the same. Cached blocks therefore form trees. A block is known by the
block before it and by its own tokens:

    (salt, "Once upon a") -> 7      the first block of a prompt; the salt keeps users apart
    (7, "time there ")    -> 2      two prompts that part after the first block
    (7, "day a frog ")    -> 5

This is exact: to look a block up compares its tokens, and its parent stands for all that came
before. There is no hash that could collide. And as a parent is forgotten only after its children,
its number means the same as long as a child refers to it.

The cache is one more owner of every block that it knows, so a block stays when the last sequence
lets go of it. Such a block is idle: it counts as free, and is given up when no other block is left,
the one unused for longest first. A sequence lets go of its last block first, so children are always
idle before their parents, and are given up before them. To give up blocks in another order, derive
a class and override `evict_candidate`: `LLM(parts=Parts(prefix_cache=MyCache))`.

If two sequences write the same block at the same time, both go on with one of the two.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping
from types import MappingProxyType

from minipaged.errors import DoubleFree
from minipaged.memory.allocator import Allocator
from minipaged.memory.block_table import BlockTable
from minipaged.sequence import Sequence

CacheKey = tuple[int | str | None, tuple[int, ...]]
"""The block before it (for a first block: the salt), and its tokens."""


class PrefixCache:
    """An allocator that remembers: any allocator, with an index over its full blocks.

    To those who use it, it is an allocator like another: an idle block is free, and has no owners.
    Every operation is O(1) a block. Not enabled, nothing is ever published, and so nothing found.
    """

    def __init__(
        self,
        allocator: Allocator,
        block_size: int,
        enabled: bool = True,
        block_table: type[BlockTable] = BlockTable,
    ) -> None:
        self._allocator = allocator
        self._new_table = block_table
        self._block_size = block_size
        self._enabled = enabled
        self._blocks: dict[CacheKey, int] = {}
        self._keys: dict[int, CacheKey] = {}  # the same, by block
        self._idle: OrderedDict[int, None] = OrderedDict()  # unused for longest first
        self._num_children = Counter[int | str | None]()  # how many are known by a block or salt

    # ---- an allocator ----------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        return self._allocator.num_blocks

    @property
    def num_free(self) -> int:
        return self._allocator.num_free + len(self._idle)

    def allocate(self) -> int:
        """Take a block that nobody owns, an empty one if there is one. Raises OutOfBlocks."""
        if self._allocator.num_free == 0 and self._idle:
            self._evict()
        return self._allocator.allocate()

    def share(self, block: int) -> None:
        """Add an owner; an idle block gets its first one. Raises DoubleFree for an empty block."""
        self._allocator.share(block)
        self._idle.pop(block, None)

    def free(self, block: int) -> None:
        """Drop one owner. Without owners, a block that is known becomes idle, another one empty."""
        if block in self._idle:
            raise DoubleFree(f"block {block} has no owner, so it cannot be freed again.")
        self._allocator.free(block)
        if block in self._keys and self.ref_count(block) == 0:
            self._idle[block] = None

    def ref_count(self, block: int) -> int:
        """How many owners the block has besides the cache."""
        return self._allocator.ref_count(block) - (block in self._keys)

    # ---- the index -------------------------------------------------------------------------------

    @property
    def cached(self) -> Mapping[int, CacheKey]:
        """What each cached block is known by; to be read only."""
        return MappingProxyType(self._keys)

    def find(self, seq: Sequence) -> list[int]:
        """The blocks that hold the longest known beginning of a sequence, full block by block."""
        found: list[int] = []
        if self._enabled and seq.reads_cache:
            for logical in range(seq.num_tokens // self._block_size):
                block = self._blocks.get(self._key(seq, found, logical))
                if block is None:
                    break
                found.append(block)
        return found

    def share_cached(self, seq: Sequence) -> BlockTable:
        """A block table that shares all that is found of a sequence."""
        found = self.find(seq)
        for block in found:
            self.share(block)
        size = self._block_size
        return self._new_table(size, found, len(found) * size, num_cached_blocks=len(found))

    def cache_blocks(self, seq: Sequence, table: BlockTable) -> list[int]:
        """Let all full blocks of a sequence be found whose keys and values have been written.

        Returns those that could not be found before. If another block with the same content is
        known, the sequence shares that one from now on, and lets go of its own.
        """
        published: list[int] = []
        num_written = seq.num_computed_tokens // self._block_size if self._enabled else 0
        for logical in range(table.num_cached_blocks, num_written):
            block, key = table.blocks[logical], self._key(seq, table.blocks, logical)
            if key not in self._blocks:
                self._allocator.share(block)  # the cache owns it too
                self._blocks[key] = block
                self._keys[block] = key
                self._num_children[key[0]] += 1
                published.append(block)
            elif self._blocks[key] != block:
                # Another sequence has computed the same in the meantime. One of the two is enough.
                table.blocks[logical] = self._blocks[key]
                self.share(table.blocks[logical])
                self.free(block)
            table.num_cached_blocks = logical + 1
        return published

    def _key(self, seq: Sequence, blocks: list[int], logical: int) -> CacheKey:
        start = logical * self._block_size
        parent = blocks[logical - 1] if logical else seq.cache_salt
        return parent, tuple(seq.token_ids[start : start + self._block_size])

    # ---- eviction --------------------------------------------------------------------------------

    @property
    def idle(self) -> Collection[int]:
        """The known blocks without owners, the one unused for longest first; to be read only."""
        return self._idle.keys()

    def is_leaf(self, block: int) -> bool:
        """Whether no other block is known by this one, so that it may be given up."""
        return self._num_children[block] == 0

    def evict_candidate(self) -> int:
        """Which of the idle blocks to give up: the policy. It must be a leaf."""
        return next(iter(self._idle))

    def _evict(self) -> None:
        block = self.evict_candidate()
        assert block in self._idle, f"block {block} is to be evicted, but it is not idle"
        assert self.is_leaf(block), f"block {block} is to be evicted before those known by it"
        del self._idle[block]
        key = self._keys.pop(block)
        del self._blocks[key]
        self._num_children[key[0]] -= 1
        if not self._num_children[key[0]]:
            del self._num_children[key[0]]  # salts would pile up
        self._allocator.free(block)
