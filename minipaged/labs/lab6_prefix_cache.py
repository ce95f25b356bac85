"""Lab 6: blocks that are found again, and given up (chapter 8)."""

from minipaged.labs.lab import Lab, Task

LAB = Lab(
    number=6,
    name="prefix_cache",
    title="the prefix cache, and who is given up",
    sources=("minipaged.memory.prefix_cache.PrefixCache",),
    swaps={"prefix_cache": "PrefixCache"},
    tasks=(
        Task(
            1,
            "let written blocks be found",
            25,
            holes=("PrefixCache._key", "PrefixCache.cache_blocks"),
            hints=(
                "Which blocks of the table are full, and written, and not known yet? Count with "
                + "`seq.num_computed_tokens` and `table.num_cached_blocks`.",
                "The key of a block is the block before it in `blocks`, and its own tokens. In "
                + "front of the first one stands the salt. A cache that is not enabled publishes "
                + "nothing.",
                "A block that nobody has published: the cache becomes one more owner "
                + "(`self._allocator.share`), notes block and key in both dictionaries, counts a "
                + "child for what stands first in the key, and moves `table.num_cached_blocks` on. "
                + "Leave a key that is known already for task 3.",
            ),
        ),
        Task(
            2,
            "find the longest beginning",
            20,
            holes=("PrefixCache.find",),
            hints=(
                "Go from the first block on and stop at the first that is not known. What comes "
                + "behind a gap was computed behind something else.",
                "`_key` wants to know the blocks in front: those are the ones found so far. Only "
                + "full blocks can be found, of the whole sequence, whatever is computed of it. "
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
                "The allocator below counts the cache as an owner of every block in `_keys`. Those "
                + "who ask `ref_count` want to hear of the others only.",
                "A known block whose last other owner lets go becomes idle: it goes to the end of "
                + "`_idle`, and stays with the cache in the allocator. With a new owner it is idle "
                + "no more. To free an idle block is DoubleFree: nobody owns it.",
                "`share_cached`: find, become an owner of each, and put them into a table that "
                + "`_new_table` makes. All of its blocks are full, and all are published.",
                "Now finish `cache_blocks`: if the key is known for another block, the table takes "
                + "that one, shares it, and frees its own. It is not among those returned.",
            ),
        ),
        Task(
            4,
            "give up what nobody uses",
            20,
            holes=("PrefixCache.evict_candidate", "PrefixCache._evict"),
            hints=(
                "In which order do blocks come into `_idle`? A sequence lets go of its last block "
                + "first. Which one is the leaf that nobody has used for longest?",
                "To evict a block is to undo all that `cache_blocks` has noted, and to let go of "
                + "it in the allocator. Whatever forgets only one of the two dictionaries finds a "
                + "block that holds something else by now.",
                "Do not forget that its parent has a child less; and a count that is 0 can go, or "
                + "the salts pile up.",
            ),
        ),
        Task(
            5,
            "serve a language model",
            10,
            hints=(
                "If the other tasks pass and this one does not, watch the trace that the failing "
                + "test has left: minipaged trace view <file>.",
                "Other tokens the second time mean that a block was found which holds something "
                + "else: compare what was published with what was evicted.",
            ),
            seconds=120.0,
        ),
    ),
)
