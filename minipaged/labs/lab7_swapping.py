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
                "Keep a dictionary from old block to new block. When a block first occurs, "
                + "allocate a new one and record a pair; each later sequence with this block "
                + "becomes one more owner of the new one. Each sequence frees its old blocks, the "
                + "last first.",
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
                "It is the same move in the other direction, but not every block needs a copy: "
                + "what did the prefix cache do with the blocks when the group freed them?",
                "`_still_cached` maps swap blocks to cached blocks with the same content. Pass it "
                + "to `_move`, which shares these blocks and makes no pair for them. They count "
                + "in `num_cached_blocks`, since they are in the prefix cache.",
                "A cached block without owners is evicted when another is allocated. Therefore "
                + "become an owner of all of them before you move, and free them afterwards.",
            ),
        ),
        Task(
            3,
            "recompute, or choose",
            25,
            holes=("FCFSScheduler._preempt",),
            hints=(
                "The docstring states the rule for which of the two. For recomputation, "
                + "everything must be as if nothing had been computed; only the tokens remain.",
                "Swapped: put the pairs into the draft, and the group into the queue of swapped "
                + "groups. Recomputed: free each sequence and reset what was computed; the group "
                + "waits again. Count both, and record them in `draft.preempted`.",
                "A group of several sequences waits with its first sequence only. The others "
                + "await refork, in their order, before those that already awaited it.",
            ),
        ),
        Task(
            4,
            "serve a language model",
            15,
            hints=(
                "If the other tasks pass and this one does not, open the trace that the failing "
                + "test has written: minipaged trace view <file>.",
            ),
            seconds=120.0,
        ),
    ),
)
