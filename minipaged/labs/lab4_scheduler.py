"""Lab 4: the scheduler (chapters 6 and 9)."""

from minipaged.labs.lab import Lab, Task

LAB = Lab(
    number=4,
    name="scheduler",
    title="the scheduler: continuous batching, and whom to preempt",
    sources=("minipaged.scheduler.fcfs.youngest", "minipaged.scheduler.fcfs.FCFSScheduler"),
    swaps={"scheduler": "FCFSScheduler", "select_victim": "youngest"},
    tasks=(
        Task(
            1,
            "share out the tokens of a step",
            15,
            holes=("FCFSScheduler._share_out_tokens", "FCFSScheduler.commit"),
            hints=(
                "`plan.add(group)` gives a group what it can use of the tokens that are left. So "
                + "all that you decide is the order. Who must not wait?",
                "First the groups that are decoding, then the others, both in order of age. When "
                + "the step has run, each of its sequences has more computed tokens than before, "
                + "and the memory may let their full blocks be found: see Sequence.mark_computed "
                + "and Memory.cache_blocks.",
            ),
        ),
        Task(
            2,
            "let others join",
            30,
            holes=("FCFSScheduler._let_others_join", "FCFSScheduler._can_join"),
            hints=(
                "Look at the one who came first among the swapped and the waiting. If it joins, "
                + "look at the next. If it does not, who may join instead of it?",
                "It needs batch slots for all sequences that it has or will have "
                + "(`num_batch_slots`), at least one token (a whole prompt without chunked "
                + "prefill; one each if swapped), and blocks: ask `memory.can_admit`, which wants "
                + "to know whether anybody runs. A waiting prompt may be better off a step later: "
                + "`_finds_more_a_step_later`.",
                "A waiting group is admitted, a swapped one is swapped in and then gets slots for "
                + "its next tokens (`_append`). Each gives pairs for the plan. Then `_move` it, "
                + "add it to the plan, count its seats. The first that cannot join ends the loop; "
                + "unless it does not even fit the empty pool (`memory.fits`): then it ends, and "
                + "the next has its turn.",
            ),
        ),
        Task(
            3,
            "let them go",
            15,
            holes=("FCFSScheduler.finish", "FCFSScheduler.abort"),
            hints=(
                "One sequence has ended. Perhaps its group has others that go on.",
                "It leaves its group, from `sequences` or from `absent`, and its blocks return, if "
                + "it has any: a waiting one has none, and `memory.tables` tells. When nobody is "
                + "left in the group, the group is FINISHED: `_move` takes it off its queue.",
            ),
        ),
        Task(
            4,
            "preempt somebody",
            30,
            holes=(
                "youngest",
                "FCFSScheduler._reserve_for_running",
                "FCFSScheduler._make_room",
            ),
            hints=(
                "Serve the running in order of age. The oldest may take from everybody behind it, "
                + "the youngest from nobody.",
                "While there is no room for a group (`memory.can_append`), "
                + "`self._select_victim` chooses one of those who are younger and still run, and "
                + "`_preempt` takes its blocks. Ask again after each: perhaps it is enough.",
                "Nobody younger left? Then the group itself is preempted. And one that does not "
                + "fit even if all others went (`memory.fits`) ends; nobody need be preempted for "
                + "it. Mind that `running` becomes shorter while you go through it.",
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
