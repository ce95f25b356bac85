"""Lab 4: what a scheduler must do, whatever data structure its queues use.

An engine without a model carries out its decisions, over the library's own memory, which is
recounted after every call. In the tests of one task, the bodies of later tasks are the library's.
"""

import random
from itertools import pairwise

import pytest

from minipaged.errors import PromptTooLong
from minipaged.evaluation.testing.engine_without_model import EngineWithoutModel, numbers, tokens_of
from minipaged.labs.lab4_scheduler import LAB
from minipaged.scheduler.fcfs import FCFSScheduler, youngest
from minipaged.sequence import Sequence, SequenceGroup, SequenceStatus

from schedulers import build_engine, with_library_bodies
from serving import serves_what_the_library_serves

essential = pytest.mark.essential


def task(number: int) -> pytest.MarkDecorator:
    return pytest.mark.lab(number=4, task=number)


@pytest.fixture
def build(part, request):
    """`build(8, 4, num_blocks=6)`: an engine in which prompts of 8 and of 4 tokens wait."""
    number = request.node.get_closest_marker("lab").kwargs["task"]
    scheduler = with_library_bodies(part("scheduler"), FCFSScheduler, LAB, number)
    usual = part("select_victim") if number >= 4 else youngest

    def engine(*prompts: int, victim=usual, **options) -> EngineWithoutModel:
        return build_engine(scheduler, victim, *prompts, **options)

    return engine


def oldest(candidates):
    """A choice of victims other than the default."""
    return candidates[0]


# ---- task 1: distribute the tokens of a step -----------------------------------------------------


@task(1)
def test_a_prompt_takes_what_decodes_leave_of_the_budget(build):
    engine = build(4, 13, max_num_batched_tokens=10)
    assert [tokens_of(engine.step()) for _ in range(3)] == [
        {0: 4, 1: 6},
        {0: 1, 1: 7},
        {0: 1, 1: 1},
    ]


@task(1)
@essential("every decoding sequence gets a token in every step (rule 2).")
def test_no_decode_waits_for_a_prompt_even_an_older_one(build):
    """Request 1 is preempted and computes all its tokens again, while 2, younger, decodes."""
    engine = build(
        victim=oldest, num_blocks=7, preemption="recompute", max_num_batched_tokens=8,
        enable_prefix_caching=False,
    )  # fmt: skip
    for prompt_len, num_tokens in ((5, 6), (14, 6), (2, 30)):
        engine.add(prompt_len, num_tokens)
    again = engine.groups[1]
    engine.step_until(lambda: again.num_preemptions and again.status is SequenceStatus.RUNNING)
    assert tokens_of(engine.step()) == {2: 1, 1: 7}, "request 2 decodes, and 1 gets the rest"


@task(1)
def test_computed_tokens_are_marked(build):
    engine = build(25, max_num_batched_tokens=10)
    [seq] = engine.groups[0].sequences
    computed = [(engine.step(), seq.num_computed_tokens)[1] for _ in range(4)]
    assert computed == [10, 20, 25, 26]


@task(1)
def test_full_blocks_are_cached_once_the_step_has_run(build):
    engine = build()
    engine.add(10, shared_prefix=True)
    engine.step()
    engine.add(10, shared_prefix=True)
    assert tokens_of(engine.step()) == {0: 1, 1: 2}, "two full blocks of four are cached already"


# ---- task 2: admit requests ----------------------------------------------------------------------


@task(2)
def test_requests_join_while_batch_slots_are_free(build):
    engine = build(4, 4, 4, 4, 4, max_num_seqs=3)
    assert tokens_of(engine.step()) == {0: 4, 1: 4, 2: 4}
    assert numbers(engine.scheduler.running) == [0, 1, 2]
    assert numbers(engine.scheduler.waiting) == [3, 4]


@task(2)
def test_a_free_batch_slot_is_taken_in_the_very_next_step(build):
    engine = build(max_num_seqs=2)
    for num_tokens in (9, 2, 2, 2):
        engine.add(4, num_tokens)
    steps = [set(tokens_of(engine.step())) for _ in range(6)]
    assert steps == [{0, 1}, {0, 1}, {0, 2}, {0, 2}, {0, 3}, {0, 3}]


@task(2)
def test_batch_slots_are_kept_for_samples_that_have_yet_to_fork(build):
    engine = build(max_num_seqs=4)
    engine.add(4, width=3)
    engine.add(4, width=2)
    engine.add(4)
    assert tokens_of(engine.step()) == {0: 4}


@task(2)
@essential("no request joins before an earlier one (rule 3).")
def test_the_first_request_that_does_not_fit_blocks_later_ones(build):
    engine = build(16, 12, 4, num_blocks=6)
    assert tokens_of(engine.step()) == {0: 16}, "request 2 would fit, but 1 came first"
    assert numbers(engine.scheduler.waiting) == [1, 2]


@task(2)
def test_without_chunking_a_prompt_runs_whole_or_waits(build):
    options = {"max_num_batched_tokens": 16, "max_model_len": 16}
    engine = build(10, 8, enable_chunked_prefill=False, **options)
    assert [tokens_of(engine.step()) for _ in range(2)] == [{0: 10}, {0: 1, 1: 8}]


@task(2)
def test_admission_leaves_the_watermark_free_if_any_request_runs(build):
    engine = build(8, 12, num_blocks=8, watermark=0.5)
    assert tokens_of(engine.step()) == {0: 8}, "admitting request 1 would leave 3 of 4 blocks free"
    assert tokens_of(build(14, num_blocks=4, watermark=0.5).step()) == {0: 14}, "no other runs"


@task(2)
def test_a_prompt_waits_for_the_block_that_another_is_just_computing(build):
    engine = build()
    engine.add(10, shared_prefix=True)
    engine.add(10, shared_prefix=True)
    assert [tokens_of(engine.step()) for _ in range(2)] == [{0: 10}, {0: 1, 1: 2}]


@task(2)
def test_a_swapped_request_continues_where_it_stopped(build):
    engine = build(num_blocks=4, preemption="swap", enable_prefix_caching=False)
    engine.add(8, num_tokens=4)
    victim = engine.add(8)
    engine.step_until(lambda: victim.status is SequenceStatus.SWAPPED)
    outputs = []
    while victim.status is SequenceStatus.SWAPPED:
        outputs.append(engine.step())
    assert tokens_of(outputs[-1])[1] == 1, "only its newest token is not computed"
    assert len(outputs[-1].swap_in) == 2, "two blocks were swapped out, and must come back"


@task(2)
def test_no_new_request_is_admitted_while_one_is_swapped(build):
    engine = build(8, 8, 8, num_tokens=12, num_blocks=6, preemption="swap")
    engine.step_until(lambda: engine.scheduler.swapped)
    new = engine.add(1)
    while engine.scheduler.swapped:
        engine.step()
        if engine.scheduler.swapped:
            assert new.status is SequenceStatus.WAITING


@task(2)
def test_the_earliest_request_joins_first_swapped_or_waiting(build):
    """With swap blocks for one, some are swapped and older ones recomputed."""
    engine = build(4, 4, 4, num_tokens=20, num_blocks=8, preemption="swap", num_swap_blocks=1)
    while engine.scheduler.has_unfinished():
        ran = sorted(tokens_of(engine.step()))
        assert all(b == a + 1 for a, b in pairwise(ran)), f"requests {ran} run: one was skipped"


@task(2)
def test_a_request_that_can_never_join_ends_and_the_next_joins(build):
    engine = build(num_blocks=6)
    engine.add(16, num_tokens=1, shared_prefix=True)
    engine.run()
    engine.add(12)  # it would fit
    engine.add(4, num_tokens=1)
    engine.memory.pin(Sequence(999, range(16)))  # and now four of the six blocks stay taken
    engine.step()
    assert engine.ended == [1]
    assert engine.finished == [0, 2]


@task(2)
def test_every_request_finishes(build):
    rng = random.Random(1)
    for _ in range(4):
        engine = build(num_blocks=40, max_num_batched_tokens=16, watermark=0.1)
        for _ in range(12):
            engine.add(rng.randint(1, 30), rng.randint(1, 12), rng.choice([1, 1, 1, 2, 4]))
        engine.run()
        assert sorted(engine.finished) == list(range(12))


# ---- task 3: finish and abort --------------------------------------------------------------------


@task(3)
@essential("a finished sequence must free its blocks in the same step (rule 5).")
def test_the_blocks_of_a_finished_sequence_are_freed_at_once(build):
    engine = build(num_blocks=10)
    engine.add(8, num_tokens=2)
    engine.add(4, num_tokens=9)
    engine.step()
    engine.step()
    assert engine.memory.num_free == 10 - 2, "request 1 has two blocks, and 0 has ended"


@task(3)
def test_a_request_whose_sequences_have_all_ended_is_finished(build):
    engine = build()
    group = engine.add(8, num_tokens=2, width=2)
    engine.step()
    engine.step()
    assert group.status is SequenceStatus.RUNNING, "one of its two samples continues"
    engine.step()
    assert group.status is SequenceStatus.FINISHED
    assert not group.sequences
    assert not engine.scheduler.has_unfinished()


@task(3)
def test_a_finished_sample_frees_its_batch_slot(build):
    engine = build(max_num_seqs=3)
    engine.add(4, num_tokens=2, width=3)  # its samples end one after the other
    engine.add(4)
    assert [1 in tokens_of(engine.step()) for _ in range(4)] == [False, False, True, True]


@task(3)
def test_an_aborted_request_leaves_any_queue(build):
    engine = build(8, 8, 8, 8, num_tokens=30, num_blocks=6, preemption="swap")
    engine.step_until(lambda: engine.scheduler.swapped)
    assert {group.status.name for group in engine.groups} == {"RUNNING", "SWAPPED", "WAITING"}
    for group in engine.groups:
        engine.scheduler.abort(group)
        assert group.status is SequenceStatus.FINISHED
    assert not engine.scheduler.has_unfinished()
    engine.check_that_all_came_back()


@task(3)
def test_an_aborted_request_leaves_with_sequences_awaiting_refork(build):
    engine = build(num_blocks=10, num_swap_blocks=0, enable_prefix_caching=False)
    engine.add(8, num_tokens=30)
    group = engine.add(9, num_tokens=7, width=3)
    engine.step_until(lambda: group.awaiting_refork)
    engine.scheduler.abort(group)
    assert group.status is SequenceStatus.FINISHED
    assert not group.awaiting_refork
    engine.run()


# ---- task 4: preempt -----------------------------------------------------------------------------


@task(4)
def test_the_latest_request_is_preempted_first(part):
    groups = [
        SequenceGroup(f"{number}", [Sequence(number, range(num_tokens))], arrival=number)
        for number, num_tokens in ((2, 9), (3, 1), (7, 4))
    ]
    assert part("select_victim")(groups) is groups[-1]
    assert part("select_victim")(groups[:1]) is groups[0]


@task(4)
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_the_youngest_is_preempted_first_and_comes_back(build, preemption):
    engine = build(8, 8, 8, num_tokens=6, num_blocks=6, preemption=preemption)
    outputs = engine.run()
    first = next(output for output in outputs if output.preempted)
    assert numbers(first.preempted) == [2]
    assert engine.groups[0].num_preemptions == 0, "the oldest is never preempted"
    assert engine.finished == [0, 1, 2]


@task(4)
def test_no_more_groups_are_preempted_than_necessary(build):
    engine = build(7, 7, 7, 7, num_tokens=9, num_blocks=8, preemption="recompute")
    engine.step()
    engine.step()
    output = engine.step()  # each of the four needs one more block, and all eight are in use
    assert numbers(output.preempted) == [3, 2], "3 frees blocks for 0 and 1; 2 is the youngest left"
    assert sorted(tokens_of(output)) == [0, 1]


@task(4)
def test_as_many_groups_are_preempted_as_necessary(build):
    engine = build(num_blocks=10, preemption="recompute", enable_prefix_caching=False)
    engine.add(16, num_tokens=9, width=4)  # four samples, which soon need a block each
    for _ in range(4):
        engine.add(3)
    engine.step()
    output = engine.step()  # two blocks are free
    assert numbers(output.preempted) == [4, 3]
    assert tokens_of(output) == {0: 4, 1: 1, 2: 1}


@task(4)
def test_select_victim_chooses_among_the_younger(build):
    offered = []

    def largest(candidates):
        offered.append(numbers(candidates))
        return max(candidates, key=lambda group: group.sequences[0].num_tokens)

    engine = build(8, 5, 12, 3, victim=largest, num_blocks=8, preemption="recompute")
    engine.step()
    output = engine.step()
    assert (offered[0], numbers(output.preempted)) == ([1, 2, 3], [2])


@task(4)
def test_a_request_that_outgrows_the_pool_ends_and_the_others_continue(build):
    engine = build(num_blocks=5)
    engine.add(4, num_tokens=300)
    engine.add(4, num_tokens=3)
    engine.run()
    assert (engine.ended, engine.finished) == ([0], [1])
    assert engine.samples[0][0].num_tokens == 5 * 4 + 1, "it fills the whole pool"


@task(4)
@essential("the oldest request must advance in every step, or it may starve (rule 4).")
@pytest.mark.parametrize("mode", ["auto", "recompute", "swap"])
def test_the_oldest_request_advances_in_every_step_and_all_finish(build, mode):
    rng = random.Random(2)
    for _ in range(4):
        engine = build(
            num_blocks=11, preemption=mode, max_num_batched_tokens=16,
            num_swap_blocks=rng.choice([1, 5, 100]),
        )  # fmt: skip
        refused = 0
        for _ in range(8):
            try:
                engine.add(rng.randint(1, 25), rng.randint(1, 15), rng.choice([1, 1, 2, 3]))
            except PromptTooLong:
                refused += 1
        while engine.scheduler.has_unfinished():
            first = engine.scheduler.running[:1]
            output = engine.step()
            served = [*(part.group for part in output.sequences), *output.ended]
            assert all(group in served for group in first), f"{first} is the oldest, but waits"
        engine.check_that_all_came_back()
        assert len(engine.finished) + len(engine.ended) == 8 - refused


# ---- task 5: serve a language model --------------------------------------------------------------


@task(5)
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_the_model_generates_the_same_with_the_scheduler_of_the_library(observed, preemption):
    serves_what_the_library_serves(observed, num_blocks=16, preemption=preemption)


@task(5)
def test_prompts_in_pieces_and_three_samples_of_each(observed):
    serves_what_the_library_serves(
        observed, num_blocks=70, block_size=4, samples=3, max_num_batched_tokens=32,
        max_num_seqs=8,
    )  # fmt: skip
