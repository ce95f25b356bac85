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
                + "can use: you only decide the order. Which groups must not wait?",
                "First the groups that are decoding, then the others, both in order of age. When "
                + "the step has run, each of its sequences has more computed tokens than before, "
                + "and the memory may cache their full blocks: see Sequence.mark_computed and "
                + "Memory.cache_blocks.",
            ),
        ),
        Task(
            2,
            "let requests join",
            30,
            holes=("FCFSScheduler._let_others_join", "FCFSScheduler._can_join"),
            hints=(
                "Look at the earliest of the swapped and the waiting groups. If it joins, look at "
                + "the next. If it does not, may another one join instead?",
                "It needs batch slots for all sequences that it has or will have "
                + "(`num_batch_slots`), at least one token (a whole prompt without chunked "
                + "prefill; one each if swapped), and blocks: ask `memory.can_admit`, which needs "
                + "to know whether any group is running. A waiting prompt may do better a step "
                + "later: `should_wait` tells, if both the option and the sequence use the cache.",
                "A waiting group is admitted (`_admit`), a swapped one is swapped in and then gets "
                + "slots for its next tokens (`memory.append`). Both calls return pairs for the "
                + "draft. Then `_move` it, give it tokens (`_take_tokens`), count its batch slots. "
                + "The first that cannot join ends the loop, unless it does not even fit in the "
                + "empty pool (`memory.fits`): then it ends, and the next has its turn.",
            ),
        ),
        Task(
            3,
            "finish and abort",
            15,
            holes=("FCFSScheduler.finish", "FCFSScheduler.abort"),
            hints=(
                "One sequence has ended. Perhaps its group has others that continue.",
                "It leaves its group, from `sequences` or from `awaiting_refork`, and its blocks "
                + "are freed, if it has any: a waiting one has none (see `memory.tables`). When "
                + "no sequence is left in the group, the group is FINISHED: `_move` takes it off "
                + "its queue.",
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
                "Serve the running groups in order of age. The oldest may preempt all later ones, "
                + "the youngest none.",
                "While there is no room for a group (`memory.can_append`), `self._select_victim` "
                + "chooses one of the younger groups that are still running, and `_preempt` takes "
                + "its blocks. Ask again after each: perhaps it is enough.",
                "No younger group left? Then the group itself is preempted. And one that does not "
                + "fit even in an empty pool (`memory.fits`) ends; no group need be preempted for "
                + "it. Note that `running` becomes shorter while you iterate over it.",
            ),
        ),
        Task(
            5,
            "serve a language model",
            10,
            hints=(
                "If the other tasks pass and this one does not, watch the trace that the failing "
                + "test has left: minipaged trace view <file>.",
            ),
            seconds=120.0,
        ),
    ),
)
