"""Lab 6: the prefix cache and its eviction (chapter 8)."""

from minipaged.labs.lab import Lab, Task

LAB = Lab(
    number=6,
    name="prefix_cache",
    title="the prefix cache and its eviction",
    sources=("minipaged.memory.prefix_cache.PrefixCache",),
    parts={"prefix_cache": "PrefixCache"},
    tasks=(
        Task(
            1,
            "cache written blocks",
            25,
            holes=("PrefixCache._key", "PrefixCache.cache_blocks"),
            hints=(
                "Which blocks of the table are full and written, but not yet cached? Count with "
                + "`seq.num_computed_tokens` and `table.num_cached_blocks`.",
                "The key of a block consists of the block before it in `blocks` and its own "
                + "tokens. For the first block, the salt takes the place of the block before. A "
                + "cache that is not enabled caches nothing.",
                "To cache a block: the cache becomes one more owner (`self._allocator.share`), "
                + "records block and key in both dictionaries, counts a child for the first half "
                + "of the key, and advances `table.num_cached_blocks`. Leave a key that is "
                + "already cached for task 3.",
            ),
        ),
        Task(
            2,
            "find the longest prefix",
            20,
            holes=("PrefixCache.find",),
            hints=(
                "Start at the first block and stop at the first one that is not cached. A block "
                + "after a gap was computed with another prefix.",
                "`_key` needs the blocks before: those are the ones found so far. Only full "
                + "blocks can be found, but among all tokens of the sequence, computed or not. "
                + "Respect `_enabled` and `seq.reads_cache`.",
            ),
        ),
        Task(
            3,
            "be one owner among others",
            25,
            holes=(
                "PrefixCache.share",
                "PrefixCache.free",
                "PrefixCache.ref_count",
                "PrefixCache.share_cached",
            ),
            hints=(
                "The allocator below counts the cache as an owner of every block in `_keys`. "
                + "`ref_count` must report only the others.",
                "A cached block becomes idle when its last other owner frees it: it goes to the "
                + "end of `_idle`, and the cache remains its owner in the allocator. With a new "
                + "owner it is no longer idle. Freeing a block without owners is DoubleFree.",
                "`share_cached`: find the blocks, become an owner of each, and put them into a "
                + "table made by `_new_table`. All of its blocks are full and cached.",
                "Now finish `cache_blocks`: if another block with the same key is cached, put "
                + "that block into the table instead, share it, and free the table's own block. "
                + "Do not return it.",
            ),
        ),
        Task(
            4,
            "evict",
            20,
            holes=("PrefixCache.evict_candidate", "PrefixCache._evict"),
            hints=(
                "In which order do blocks enter `_idle`? A sequence frees its last block first. "
                + "Which one is the least recently used leaf?",
                "To evict a block, undo everything that `cache_blocks` has recorded, and free the "
                + "block in the allocator. If an entry remains in one of the two dictionaries, a "
                + "block with other content will be found.",
                "Its parent has one child fewer now. Remove a count that is 0, or the salts "
                + "accumulate.",
            ),
        ),
        Task(
            5,
            "serve a language model",
            10,
            hints=(
                "If the other tasks pass and this one does not, open the trace that the failing "
                + "test has written: minipaged trace view <file>.",
                "Different tokens the second time mean that a block with other content was found: "
                + "compare the cached blocks with the evicted ones.",
            ),
            seconds=120.0,
        ),
    ),
)
