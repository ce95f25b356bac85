"""Lab 4: the scheduler (chapters 6 and 9)."""

from minipaged.labs.lab import Lab, Task

LAB = Lab(
    number=4,
    name="scheduler",
    title="the scheduler: continuous batching and preemption",
    sources=("minipaged.scheduler.fcfs.youngest", "minipaged.scheduler.fcfs.FCFSScheduler"),
    parts={"scheduler": "FCFSScheduler", "select_victim": "youngest"},
    tasks=(
        Task(
            1,
            "distribute the tokens of a step",
            15,
            holes=("FCFSScheduler._share_out_tokens", "FCFSScheduler.commit"),
            hints=(
                "`_take_tokens(group, draft)` gives a group as many of the remaining tokens as it "
                + "can use: you only choose the order. Which groups must not wait?",
                "First the groups that are decoding, then the others, both in order of arrival. "
                + "When the step has run, each of its sequences has more computed tokens than "
                + "before, and the memory may cache their full blocks: see Sequence.mark_computed "
                + "and Memory.cache_blocks.",
            ),
        ),
        Task(
            2,
            "let requests join",
            30,
            holes=("FCFSScheduler._let_others_join", "FCFSScheduler._can_join"),
            hints=(
                "Take the earliest of the swapped and the waiting groups. If it is admitted, try "
                + "the next. If it is not, may a later one be admitted instead?",
                "It needs three things. Batch slots for all sequences that it has or will have "
                + "(`num_batch_slots`). Tokens: at least one (a whole prompt without chunked "
                + "prefill; one per sequence if swapped). Blocks: call `memory.can_admit`, whose "
                + "result depends on whether any group is running. It may be better for a waiting "
                + "prompt to wait one more step: `should_wait` decides that, if both the option "
                + "and the sequence use the cache.",
                "A waiting group is admitted (`_admit`); a swapped one is swapped in and then "
                + "gets slots for its next tokens (`memory.append`). Both calls return pairs for "
                + "the draft. Then `_move` the group, give it tokens (`_take_tokens`), and count "
                + "its batch slots. The first group that cannot be admitted ends the loop, unless "
                + "it would not fit even in an empty pool (`memory.fits`): then end that group, "
                + "and try the next.",
            ),
        ),
        Task(
            3,
            "finish and abort",
            15,
            holes=("FCFSScheduler.finish", "FCFSScheduler.abort"),
            hints=(
                "One sequence has ended. Its group may have others that continue.",
                "Remove it from its group, from `sequences` or from `awaiting_refork`, and free "
                + "its blocks, if it has any: a waiting one has none (see `memory.tables`). When "
                + "the group has no sequence left, it is FINISHED: `_move` removes it from its "
                + "queue.",
            ),
        ),
        Task(
            4,
            "preempt",
            30,
            holes=(
                "youngest",
                "FCFSScheduler._reserve_for_running",
                "FCFSScheduler._make_room",
            ),
            hints=(
                "Serve the running groups in order of arrival. The oldest may preempt all later "
                + "ones, the youngest none.",
                "While there is no room for a group (`memory.can_append`), `self._select_victim` "
                + "chooses one of the younger groups that are still running, and `_preempt` takes "
                + "its blocks. Check again after each: one may be enough.",
                "If no younger group is left, the group itself is preempted. A group that would "
                + "not fit even in an empty pool (`memory.fits`) ends; do not preempt others for "
                + "it. Note that `running` becomes shorter while you iterate over it.",
            ),
        ),
        Task(
            5,
            "serve a language model",
            10,
            hints=(
                "If the other tasks pass and this one does not, open the trace that the failing "
                + "test has written: minipaged trace view <file>.",
            ),
            seconds=120.0,
        ),
    ),
)
