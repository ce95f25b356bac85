"""Lab 7: swapping and recomputation (chapter 9)."""

from minipaged.labs.lab import Lab, Task

LAB = Lab(
    number=7,
    name="swapping",
    title="swapping and recomputation",
    sources=(
        "minipaged.memory.block_manager.BlockManager",
        "minipaged.scheduler.fcfs.FCFSScheduler",
    ),
    parts={"memory": "BlockManager", "scheduler": "FCFSScheduler"},
    tasks=(
        Task(
            1,
            "swap out",
            35,
            holes=("BlockManager.can_swap_out", "BlockManager.swap_out", "BlockManager._move"),
            hints=(
                "Three samples share two blocks. How many blocks must the swap pool have, and how "
                + "many copies are made?",
                "Keep a dictionary from old block to new block. For the first sequence with a "
                + "block, allocate a new one and record a pair; each later sequence becomes one "
                + "more owner of the new one. Each sequence frees its old ones, the last first.",
                "In the end no table lists a block of the pool, `is_swapped` is true for every "
                + "sequence of the group, and none of the new blocks is in the prefix cache "
                + "(`num_cached_blocks`).",
            ),
        ),
        Task(
            2,
            "swap in",
            25,
            holes=("BlockManager.swap_in",),
            hints=(
                "It is the same move the other way round. But not everything need be copied: what "
                + "did the prefix cache do with the blocks when the group freed them?",
                "`_still_cached` maps swap blocks to cached blocks with the same content. They go "
                + "to `_move`, which shares them and makes no pair for them. They count in "
                + "`num_cached_blocks`, since they are in the prefix cache.",
                "A cached block without owners is evicted when another is allocated. So become an "
                + "owner of all of them while you move, and free them afterwards.",
            ),
        ),
        Task(
            3,
            "recompute, or choose",
            25,
            holes=("FCFSScheduler._preempt",),
            hints=(
                "The docstring has the rule for which of the two. To recompute, everything must be "
                + "as if it had never been computed; only the tokens stay.",
                "Swapped: the pairs go into the draft, the group to the queue of the swapped. "
                + "Recomputed: each sequence is freed and forgets what was computed, and the group "
                + "waits again. Both are counted, and recorded in `draft.preempted`.",
                "A group of several waits with its first sequence only. The others await refork, "
                + "in their order, before those that awaited it already.",
            ),
        ),
        Task(
            4,
            "serve a language model",
            15,
            hints=(
                "If the other tasks pass and this one does not, watch the trace that the failing "
                + "test has left: minipaged trace view <file>.",
            ),
            seconds=120.0,
        ),
    ),
)
