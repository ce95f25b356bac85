"""Full blocks, found again by their content: automatic prefix caching.

Keys and values of a token depend on all tokens before it, so a block can serve another request only
if everything up to its end is the same. Cached blocks therefore form trees. The key of a block
consists of the preceding block and its own tokens:

    (salt, "Once upon a") -> 7      the first block of a prompt; the salt keeps users apart
    (7, "time there ")    -> 2      two prompts that diverge after the first block
    (7, "day a frog ")    -> 5

This is exact: a lookup compares the block's tokens, and its parent represents all tokens before. No
hash can collide. A parent is evicted only after its children, so its number keeps its meaning for
as long as a child refers to it.

The cache is one more owner of every cached block, so a block stays when the last sequence frees it.
Such a block is idle: it counts as free, and is evicted when no empty block is left, least recently
used first. A sequence frees its last block first, so children become idle before their parents and
are evicted before them. To evict in another order, derive a class and override `evict_candidate`:
`LLM(parts=Parts(prefix_cache=MyCache))`.

If two sequences write the same block at the same time, both continue with one of the two.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping
from types import MappingProxyType

from minipaged.errors import DoubleFree
from minipaged.memory.allocator import Allocator
from minipaged.memory.block_table import BlockTable
from minipaged.sequence import Sequence

CacheKey = tuple[int | str | None, tuple[int, ...]]
"""The preceding block (for a first block: the salt), and the block's tokens."""


class PrefixCache:
    """Adds an index of full blocks to an allocator.

    To its users it is an ordinary allocator: an idle block is free and has no owners. Every
    operation is O(1) per block. If it is not enabled, no block is ever cached.
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
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._num_children = Counter[int | str | None]()  # by block or salt

    # ---- an allocator ----------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        return self._allocator.num_blocks

    @property
    def num_free(self) -> int:
        return self._allocator.num_free + len(self._idle)

    def allocate(self) -> int:
        """Take a free block, preferably an empty one. Raises OutOfBlocks."""
        if self._allocator.num_free == 0 and self._idle:
            self._evict()
        return self._allocator.allocate()

    def share(self, block: int) -> None:
        """Add an owner; an idle block gets its first one. Raises DoubleFree for an empty block."""
        self._allocator.share(block)
        self._idle.pop(block, None)

    def free(self, block: int) -> None:
        """Remove one owner. Without owners, a cached block becomes idle, any other one empty."""
        if block in self._idle:
            raise DoubleFree(f"block {block} has no owner, so it cannot be freed again.")
        self._allocator.free(block)
        if block in self._keys and self.ref_count(block) == 0:
            self._idle[block] = None

    def ref_count(self, block: int) -> int:
        """Return how many owners the block has besides the cache."""
        return self._allocator.ref_count(block) - (block in self._keys)

    # ---- the index -------------------------------------------------------------------------------

    @property
    def cached(self) -> Mapping[int, CacheKey]:
        """The key of each cached block; read-only."""
        return MappingProxyType(self._keys)

    def find(self, seq: Sequence) -> list[int]:
        """Return the blocks of the longest cached prefix of a sequence."""
        found: list[int] = []
        if self._enabled and seq.reads_cache:
            for logical in range(seq.num_tokens // self._block_size):
                block = self._blocks.get(self._key(seq, found, logical))
                if block is None:
                    break
                found.append(block)
        return found

    def share_cached(self, seq: Sequence) -> BlockTable:
        """Return a block table that shares all cached blocks of a sequence."""
        found = self.find(seq)
        for block in found:
            self.share(block)
        size = self._block_size
        return self._new_table(size, found, len(found) * size, num_cached_blocks=len(found))

    def cache_blocks(self, seq: Sequence, table: BlockTable) -> list[int]:
        """Cache all full blocks of a sequence whose keys and values have been written.

        Returns the newly cached ones. If another block with the same content is already cached, the
        sequence shares that one from now on and frees its own.
        """
        newly_cached: list[int] = []
        num_written = seq.num_computed_tokens // self._block_size if self._enabled else 0
        for logical in range(table.num_cached_blocks, num_written):
            block, key = table.blocks[logical], self._key(seq, table.blocks, logical)
            if key not in self._blocks:
                self._allocator.share(block)  # the cache is one more owner
                self._blocks[key] = block
                self._keys[block] = key
                self._num_children[key[0]] += 1
                newly_cached.append(block)
            elif self._blocks[key] != block:
                # Another sequence computed the same block in the meantime; one of them is enough.
                table.blocks[logical] = self._blocks[key]
                self.share(table.blocks[logical])
                self.free(block)
            table.num_cached_blocks = logical + 1
        return newly_cached

    def _key(self, seq: Sequence, blocks: list[int], logical: int) -> CacheKey:
        """Return the block before this one (or the salt) and the tokens of this one."""
        start = logical * self._block_size
        parent = blocks[logical - 1] if logical else seq.cache_salt
        return parent, tuple(seq.token_ids[start : start + self._block_size])

    # ---- eviction --------------------------------------------------------------------------------

    @property
    def idle(self) -> Collection[int]:
        """The cached blocks without owners, least recently used first; read-only."""
        return self._idle.keys()

    def is_leaf(self, block: int) -> bool:
        """Return whether no cached block has this one as its parent, so that it may be evicted."""
        return self._num_children[block] == 0

    def evict_candidate(self) -> int:
        """Return the idle block to evict, which must be a leaf. Override it for another policy."""
        return next(iter(self._idle))

    def _evict(self) -> None:
        """Remove one idle block from the index and return it to the allocator."""
        block = self.evict_candidate()
        assert block in self._idle, f"block {block} cannot be evicted, because it is not idle"
        assert self.is_leaf(block), f"block {block} cannot be evicted before its children"
        del self._idle[block]
        key = self._keys.pop(block)
        del self._blocks[key]
        self._num_children[key[0]] -= 1
        if not self._num_children[key[0]]:
            del self._num_children[key[0]]  # or salts would accumulate
        self._allocator.free(block)
