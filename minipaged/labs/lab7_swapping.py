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
    swaps={"memory": "BlockManager", "scheduler": "FCFSScheduler"},
    tasks=(
        Task(
            1,
            "swap out",
            35,
            holes=("BlockManager.can_swap_out", "BlockManager.swap_out", "BlockManager._move"),
            hints=(
                "Three samples share two blocks. How many blocks must the swap pool have, and how "
                + "many copies are made?",
                "Keep a dictionary from old block to new block. The first sequence that comes to a "
                + "block allocates a new one and notes a pair; whoever comes to it later is one "
                + "more owner of the new one. Each sequence frees its old ones, the last first.",
                "In the end no table names a block of the pool, `is_swapped` says so of every "
                + "sequence of the group, and the prefix cache knows none of the new blocks "
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
                + "did the prefix cache do with the blocks when the group let go of them?",
                "`_still_known` tells which blocks of the pool hold the same as a swap block. They "
                + "go to `_move`, which shares them and makes no pair for them. They count as "
                + "published, for the cache knows them.",
                "A known block without owners is given up when another is allocated. So be an "
                + "owner of all of them while you move, and let go of them afterwards.",
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
                "Swapped: the pairs go into the plan, the group to the queue of the swapped. "
                + "Recomputed: each sequence is freed and forgets what was computed, and the group "
                + "waits again. Both are counted, and told in `plan.preempted`.",
                "A group of several waits with its first sequence only. The others become absent, "
                + "in their order, before those who were absent already.",
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
