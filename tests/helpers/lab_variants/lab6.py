"""Lab 6: classic mistakes, each with the task that it must cost points; and unusual right ones."""

BEGINNING = """
from types import MappingProxyType
from minipaged.errors import DoubleFree
from minipaged.memory.prefix_cache import PrefixCache as Library
"""

WRONG = {
    "a_key_without_the_parent": (
        1,
        """
class PrefixCache(Library):
    def _key(self, seq, blocks, logical):
        return seq.cache_salt, super()._key(seq, blocks, logical)[1]
""",
    ),
    "a_key_by_place_without_the_parent": (
        1,
        """
class PrefixCache(Library):
    def _key(self, seq, blocks, logical):
        return f"{seq.cache_salt} {logical}", super()._key(seq, blocks, logical)[1]
""",
    ),
    "ignores_the_salt": (
        1,
        """
class PrefixCache(Library):
    def _key(self, seq, blocks, logical):
        parent, tokens = super()._key(seq, blocks, logical)
        return None if logical == 0 else parent, tokens
""",
    ),
    "publishes_a_block_that_is_not_full": (
        1,
        """
class PrefixCache(Library):
    def cache_blocks(self, seq, table):
        computed = seq.num_computed_tokens
        seq.num_computed_tokens = -(-computed // self._block_size) * self._block_size
        published = super().cache_blocks(seq, table)
        seq.num_computed_tokens = computed
        return published
""",
    ),
    "publishes_what_is_not_written": (
        1,
        """
class PrefixCache(Library):
    def cache_blocks(self, seq, table):
        computed, seq.num_computed_tokens = seq.num_computed_tokens, seq.num_tokens
        published = super().cache_blocks(seq, table)
        seq.num_computed_tokens = computed
        return published
""",
    ),
    "looks_past_a_gap": (
        2,
        """
class PrefixCache(Library):
    def find(self, seq):
        found = []
        for start in range(0, seq.num_tokens, self._block_size):
            parent = found[-1] if found else seq.cache_salt
            key = parent, tuple(seq.token_ids[start : start + self._block_size])
            if key in self._blocks:
                found.append(self._blocks[key])
        return found if self._enabled and seq.reads_cache else []
""",
    ),
    "never_finds_the_last_block": (
        2,
        """
class PrefixCache(Library):
    def find(self, seq):
        return super().find(seq)[: (seq.num_tokens - 1) // self._block_size]
""",
    ),
    "finds_for_those_who_do_not_read": (
        2,
        """
class PrefixCache(Library):
    def find(self, seq):
        reads, seq.reads_cache = seq.reads_cache, True
        found = super().find(seq)
        seq.reads_cache = reads
        return found
""",
    ),
    "finds_without_sharing": (
        3,
        """
class PrefixCache(Library):
    def share_cached(self, seq):
        found = self.find(seq)
        size = self._block_size
        return self._new_table(size, found, len(found) * size, num_cached_blocks=len(found))
""",
    ),
    "a_found_block_stays_idle": (
        3,
        """
class PrefixCache(Library):
    def share(self, block):
        self._allocator.share(block)
""",
    ),
    "counts_itself": (
        3,
        """
class PrefixCache(Library):
    def ref_count(self, block):
        return self._allocator.ref_count(block)
""",
    ),
    "never_idle": (
        3,
        """
class PrefixCache(Library):
    def free(self, block):
        self._allocator.free(block)
""",
    ),
    "keeps_two_equal_blocks": (
        3,
        """
class PrefixCache(Library):
    def cache_blocks(self, seq, table):
        published = []
        for logical in range(table.num_cached_blocks, seq.num_computed_tokens // self._block_size):
            if not self._enabled:
                break
            block, key = table.blocks[logical], self._key(seq, table.blocks, logical)
            if key not in self._blocks:
                self._allocator.share(block)
                self._blocks[key] = block
                self._keys[block] = key
                self._num_children[key[0]] += 1
                published.append(block)
            table.num_cached_blocks = logical + 1
        return published
""",
    ),
    "finds_what_it_gave_up": (
        4,
        """
class PrefixCache(Library):
    def _evict(self):
        before = dict(self._blocks)
        super()._evict()
        self._blocks = before
""",
    ),
    "the_newest_goes_first": (
        4,
        """
class PrefixCache(Library):
    def evict_candidate(self):
        return [block for block in self._idle if self.is_leaf(block)][-1]
""",
    ),
    "parents_before_their_children": (
        4,
        """
class PrefixCache(Library):
    def _evict(self):
        block, _ = self._idle.popitem()
        del self._blocks[self._keys.pop(block)]
        self._allocator.free(block)
""",
    ),
    "forgets_a_block_and_does_not_free_it": (
        4,
        """
class PrefixCache(Library):
    def _evict(self):
        block = self.evict_candidate()
        del self._idle[block]
        key = self._keys.pop(block)
        del self._blocks[key]
        self._num_children[key[0]] -= 1
""",
    ),
}

RIGHT = {
    "a_tree_of_nodes_and_a_clock": """
class Node:
    def __init__(self, block, parent, tokens):
        self.block, self.parent, self.tokens = block, parent, tokens
        self.children = {}
        self.left_at = None  # the time at which its last owner let go


class PrefixCache:
    def __init__(self, allocator, block_size, enabled=True, block_table=None):
        self.below, self.size, self.enabled = allocator, block_size, enabled
        self.new_table = block_table or Library(allocator, block_size)._new_table
        self.roots, self.nodes, self.clock = {}, {}, 0

    num_blocks = property(lambda self: self.below.num_blocks)
    num_free = property(lambda self: self.below.num_free + len(self.idle))

    @property
    def cached(self):
        names = {b: (n.parent.block, n.tokens) for b, n in self.nodes.items()}
        return MappingProxyType(names)

    @property
    def idle(self):
        idle = [node for node in self.nodes.values() if node.left_at is not None]
        return [node.block for node in sorted(idle, key=lambda node: node.left_at)]

    def is_leaf(self, block):
        return not self.nodes[block].children

    def evict_candidate(self):
        return next(block for block in self.idle if self.is_leaf(block))

    def allocate(self):
        if not self.below.num_free and self.idle:
            node = self.nodes.pop(self.evict_candidate())
            del node.parent.children[node.tokens]
            self.below.free(node.block)
        return self.below.allocate()

    def share(self, block):
        self.below.share(block)
        if block in self.nodes:
            self.nodes[block].left_at = None

    def free(self, block):
        node = self.nodes.get(block)
        if node is not None and node.left_at is not None:
            raise DoubleFree("idle")
        self.below.free(block)
        if node is not None and self.below.ref_count(block) == 1:
            self.clock += 1
            node.left_at = self.clock

    def ref_count(self, block):
        return self.below.ref_count(block) - (block in self.nodes)

    def tokens(self, seq, logical):
        return tuple(seq.token_ids[logical * self.size : (logical + 1) * self.size])

    def root(self, seq):
        return self.roots.setdefault(seq.cache_salt, Node(seq.cache_salt, None, ()))

    def find(self, seq):
        node, found = self.root(seq), []
        for logical in range(seq.num_tokens // self.size):
            node = node.children.get(self.tokens(seq, logical))
            if node is None or not self.enabled or not seq.reads_cache:
                break
            found.append(node.block)
        return found

    def share_cached(self, seq):
        found = self.find(seq)
        for block in found:
            self.share(block)
        return self.new_table(self.size, found, len(found) * self.size, len(found))

    def cache_blocks(self, seq, table):
        node, published = self.root(seq), []
        for logical in range(seq.num_computed_tokens // self.size if self.enabled else 0):
            tokens, block = self.tokens(seq, logical), table.blocks[logical]
            if tokens not in node.children:
                self.below.share(block)
                node.children[tokens] = self.nodes[block] = Node(block, node, tokens)
                published.append(block)
            node = node.children[tokens]
            if node.block != block:
                self.share(node.block)
                table.blocks[logical] = node.block
                self.free(block)
            table.num_cached_blocks = max(table.num_cached_blocks, logical + 1)
        return published
""",
    "looks_at_all_leaves": """
class PrefixCache(Library):
    def evict_candidate(self):
        order = list(self.idle)
        return min((b for b in order if self.is_leaf(b)), key=order.index)

    def find(self, seq):
        def following(before, rest):
            block = self._blocks.get((before, tuple(rest[: self._block_size])))
            if block is None or len(rest) < self._block_size:
                return []
            return [block, *following(block, rest[self._block_size :])]

        readable = self._enabled and seq.reads_cache
        return following(seq.cache_salt, seq.token_ids) if readable else []
""",
}
