"""What runs next: admission, the order of service, preemption; and all requests finish."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduling import CONFIG, build_engine

from minipaged.engine.parts import Parts
from minipaged.errors import InvalidOption, InvalidRequest, PromptTooLong
from minipaged.evaluation.testing.admission import admit
from minipaged.evaluation.testing.engine_without_model import numbers, tokens_of
from minipaged.scheduler.fcfs import youngest
from minipaged.scheduler.output import Draft
from minipaged.sequence import Sequence, SequenceGroup, SequenceStatus

# ---- admission and the token budget --------------------------------------------------------------


def test_prompts_are_chunked_to_the_budget_and_decodes_come_first():
    engine = build_engine(max_num_batched_tokens=10, max_num_seqs=4)
    engine.add(4)
    engine.add(13)
    assert tokens_of(engine.step()) == {0: 4, 1: 6}
    assert tokens_of(engine.step()) == {0: 1, 1: 7}
    assert tokens_of(engine.step()) == {0: 1, 1: 1}


def test_without_chunking_a_prompt_runs_whole_or_waits():
    engine = build_engine(
        max_num_batched_tokens=16,
        max_num_seqs=4,
        max_model_len=16,
        enable_chunked_prefill=False,
    )
    engine.add(10)
    engine.add(8)
    assert tokens_of(engine.step()) == {0: 10}
    assert tokens_of(engine.step()) == {0: 1, 1: 8}


def test_the_first_request_that_does_not_fit_blocks_later_ones():
    engine = build_engine(num_blocks=6)
    engine.add(16)
    engine.add(12)
    engine.add(4)
    assert tokens_of(engine.step()) == {0: 16}
    assert numbers(engine.scheduler.waiting) == [1, 2]


def test_no_more_sequences_run_than_max_num_seqs_allows():
    engine = build_engine(max_num_seqs=3)
    for _ in range(8):
        engine.add(5)
    assert max(len(decision.sequences) for decision in engine.run()) == 3


def test_a_lone_prompt_may_use_the_watermark():
    engine = build_engine(num_blocks=4, watermark=0.5)
    engine.add(14, num_tokens=2)
    engine.run()
    assert engine.finished == [0]


# ---- what can never run --------------------------------------------------------------------------


def test_a_prompt_larger_than_the_pool_is_refused_with_what_to_change():
    scheduler = build_engine(num_blocks=24, block_size=16, max_model_len=1000).scheduler
    group = SequenceGroup("0", [Sequence(0, range(592))])
    with pytest.raises(PromptTooLong) as error:
        scheduler.add(group)
    assert str(error.value) == (
        "the prompt needs 37 blocks of 16 tokens, the pool has 24. "
        "Raise num_blocks to 37 or shorten the prompt by 208 tokens."
    )
    assert not scheduler.has_unfinished()


def test_a_prompt_that_fills_the_whole_context_is_refused():
    with pytest.raises(PromptTooLong, match=r"400 tokens.*400 \(max_model_len\).*by 1 token,"):
        build_engine().scheduler.add(SequenceGroup("0", [Sequence(0, range(400))]))


def test_a_request_of_more_sequences_than_batch_slots_is_refused():
    with pytest.raises(InvalidRequest, match=r"asks for 5 sequences at once .* max_num_seqs is 4"):
        build_engine(max_num_seqs=4).scheduler.add(SequenceGroup("0", [Sequence(0, [1])], width=5))


def test_a_sequence_that_outgrows_the_pool_ends_and_others_continue():
    engine = build_engine(num_blocks=5)
    engine.add(4, num_tokens=300)
    engine.add(4, num_tokens=3)
    engine.run()
    assert engine.ended == [0]
    assert engine.finished == [1]
    assert engine.samples[0][0].num_tokens == 5 * 4 + 1
    assert engine.groups[0].status is SequenceStatus.FINISHED


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"block_size": 0}, "block_size is 0"),
        ({"num_swap_blocks": -1}, "num_swap_blocks is -1"),
        ({"watermark": 1.0}, "watermark is 1.0: give a number from 0.0 to 0.99"),
        ({"preemption": "sometimes"}, "preemption is 'sometimes'"),
        ({"preemption": "swap", "num_swap_blocks": 0}, "needs a swap pool"),
        ({"max_num_batched_tokens": 8, "max_num_seqs": 9}, "below max_num_seqs"),
        (
            {
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": 100,
                "max_model_len": 101,
            },
            "without chunked prefill",
        ),
    ],
)
def test_an_option_that_cannot_work_is_refused(options, sentence):
    with pytest.raises(InvalidOption, match=sentence):
        replace(CONFIG, **options)


# ---- preemption ----------------------------------------------------------------------------------


def test_the_youngest_is_preempted_first_and_comes_back():
    engine = build_engine(num_blocks=6, preemption="recompute")
    for _ in range(3):
        engine.add(8, num_tokens=6)
    decisions = engine.run()
    first = next(decision for decision in decisions if decision.preempted)
    assert numbers(first.preempted) == [2]
    assert engine.finished == [0, 1, 2]


def test_a_recomputed_request_starts_over_at_the_front_of_the_queue():
    engine = build_engine(num_blocks=4, preemption="recompute")
    engine.add(8)
    victim = engine.add(8)
    engine.add(4)
    engine.step()
    decision = engine.step()
    assert decision.preempted == (victim,)
    assert victim.status is SequenceStatus.WAITING
    assert victim.sequences[0].num_computed_tokens == 0
    assert engine.scheduler.waiting[0] is victim


def test_swapping_keeps_what_was_computed():
    engine = build_engine(num_blocks=4, preemption="swap")
    engine.add(8)
    victim = engine.add(8)
    engine.step()
    decision = engine.step()
    assert victim.status is SequenceStatus.SWAPPED
    assert victim.sequences[0].num_computed_tokens == 8
    assert len(decision.swap_out) == 2


def test_no_request_is_admitted_while_one_is_swapped():
    engine = build_engine(num_blocks=6, preemption="swap")
    for _ in range(3):
        engine.add(8, num_tokens=12)
    while not engine.scheduler.swapped:
        engine.step()
    engine.add(1)
    while engine.scheduler.swapped:
        waiting = list(engine.scheduler.waiting)
        engine.step()
        if engine.scheduler.swapped:
            assert engine.scheduler.waiting == waiting


def test_swapping_in_and_out_never_share_a_step():
    engine = build_engine(num_blocks=9, preemption="swap")
    for _ in range(6):
        engine.add(8, num_tokens=20)
    decisions = engine.run()
    assert any(decision.swap_in for decision in decisions)
    assert not any(decision.swap_in and decision.swap_out for decision in decisions)


def test_auto_recomputes_single_sequences_and_swaps_groups_of_several():
    engine = build_engine(num_blocks=12, preemption="auto")
    engine.add(8, num_tokens=40)
    engine.add(8, num_tokens=20, width=3)
    engine.add(8, num_tokens=20)
    decisions = engine.run()
    how = {
        int(g.request_id): "swap" if decision.swap_out else "recompute"
        for decision in decisions
        for g in decision.preempted
        if len(decision.preempted) == 1
    }
    assert how == {1: "swap", 2: "recompute"}


def test_a_full_swap_pool_falls_back_to_recomputation():
    engine = build_engine(num_blocks=6, num_swap_blocks=1, preemption="swap")
    for _ in range(3):
        engine.add(8, num_tokens=6)
    decisions = engine.run()
    assert any(decision.preempted for decision in decisions)
    assert not any(decision.swap_out for decision in decisions)
    assert engine.finished == [0, 1, 2]


def test_the_custom_part_chooses_the_victim():
    oldest = build_engine(Parts(select_victim=lambda groups: groups[0]), num_blocks=6)
    for _ in range(3):
        oldest.add(8, num_tokens=6)
    first = next(decision for decision in oldest.run() if decision.preempted)
    assert numbers(first.preempted) == [1]
    assert youngest(oldest.groups) is oldest.groups[2]


def test_an_aborted_group_returns_its_blocks_from_any_queue():
    engine = build_engine(num_blocks=6, preemption="swap")
    groups = [engine.add(8, num_tokens=30) for _ in range(4)]
    while not engine.scheduler.swapped:
        engine.step()
    statuses = {g.status for g in groups}
    assert statuses == {
        SequenceStatus.RUNNING,
        SequenceStatus.SWAPPED,
        SequenceStatus.WAITING,
    }
    for group in groups:
        engine.scheduler.abort(group)
    assert not engine.scheduler.has_unfinished()
    assert engine.scheduler.memory.num_free == 6
    assert engine.scheduler.memory.num_free_swap_blocks == 100


def test_a_fork_copies_on_its_first_write_even_after_a_swap():
    for num_blocks in (4, 100):
        engine = build_engine(num_blocks=num_blocks, preemption="swap")
        engine.add(4, num_tokens=2)
        engine.add(10, width=2)
        decisions = [engine.step() for _ in range(3)]
        [[(source, target)]] = [decision.copies for decision in decisions if decision.copies]
        assert source != target
        if num_blocks == 4:
            assert decisions[1].swap_out
            assert source in [block for _, block in decisions[2].swap_in]


def test_admission_leaves_the_watermark_free_for_running_groups():
    engine = build_engine(num_blocks=8, watermark=0.5)
    engine.add(8)
    engine.add(12)
    assert tokens_of(engine.step()) == {0: 8}


def test_a_swapped_group_comes_back_only_above_the_watermark():
    engine = build_engine(num_blocks=8, watermark=0.375, preemption="swap")
    engine.add(8, num_tokens=11)
    engine.add(8, num_tokens=7)
    late = engine.add(4, num_tokens=8)
    while late.status is not SequenceStatus.SWAPPED:
        engine.step()
    while late.status is SequenceStatus.SWAPPED:
        still_running = list(engine.scheduler.running)
        engine.step()
    assert not still_running, "it took the blocks that others will need"


def test_batch_slots_are_reserved_for_future_forks():
    engine = build_engine(max_num_seqs=4)
    engine.add(4, width=3)
    engine.add(4, width=2)
    assert tokens_of(engine.step()) == {0: 4}


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_every_preemption_is_counted_once(preemption):
    engine = build_engine(num_blocks=6, preemption=preemption)
    for _ in range(3):
        engine.add(8, num_tokens=6)
    decisions = engine.run()
    for group in engine.groups:
        assert group.num_preemptions == sum(group in decision.preempted for decision in decisions)
    assert engine.groups[2].num_preemptions > 0


def test_auto_swaps_a_group_that_has_yet_to_fork():
    engine = build_engine(num_blocks=4, max_num_batched_tokens=6, max_num_seqs=4)
    engine.add(4)
    forker = engine.add(12, width=2)
    engine.step()
    assert engine.step().preempted == (forker,)
    assert forker.status is SequenceStatus.SWAPPED


# ---- sharing -------------------------------------------------------------------------------------


def test_the_second_of_two_equal_prompts_waits_and_finds_the_first_cached():
    engine = build_engine()
    engine.add(10, shared_prefix=True)
    engine.add(10, shared_prefix=True)
    assert tokens_of(engine.step()) == {0: 10}
    assert tokens_of(engine.step()) == {0: 1, 1: 2}


def test_a_prompt_waits_only_for_the_block_that_is_computed_next():
    engine = build_engine(max_num_batched_tokens=8, max_num_seqs=4)
    engine.add(16, shared_prefix=True)
    other = engine.add(6, shared_prefix=True)
    other.sequences[0].token_ids[4:] = [77, 78]
    assert tokens_of(engine.step()) == {0: 8}
    assert tokens_of(engine.step()) == {0: 8}, "out of tokens, but no request waits for a block"
    assert tokens_of(engine.step()) == {0: 1, 1: 2}


@pytest.mark.parametrize(
    ("options", "salt"), [({"enable_prefix_caching": False}, None), ({}, "another")]
)
def test_a_request_that_could_find_nothing_does_not_wait(options, salt):
    engine = build_engine(**options)
    engine.add(10, shared_prefix=True)
    engine.add(10, shared_prefix=True).sequences[0].cache_salt = salt
    assert tokens_of(engine.step()) == {0: 10, 1: 10}


def test_without_chunking_only_the_tokens_that_are_not_found_must_fit_the_budget():
    engine = build_engine(
        max_num_batched_tokens=20,
        max_num_seqs=4,
        max_model_len=20,
        enable_chunked_prefill=False,
    )
    engine.add(16, num_tokens=1, shared_prefix=True)
    engine.step()
    engine.add(10)
    engine.add(16, shared_prefix=True)
    assert tokens_of(engine.step()) == {1: 10, 2: 1}


def test_a_recomputed_sequence_finds_its_own_cached_blocks():
    engine = build_engine(num_blocks=5, preemption="recompute")
    engine.add(8, num_tokens=9)
    victim = engine.add(8, num_tokens=9)
    while not engine.step().preempted:
        pass
    while victim.status is not SequenceStatus.RUNNING:
        decision = engine.step()
    [part] = [s for s in decision.sequences if s.group is victim]
    assert part.num_new_tokens < victim.sequences[0].num_tokens


def test_a_finished_sample_frees_its_batch_slot():
    engine = build_engine(max_num_seqs=3)
    engine.add(4, num_tokens=2, width=3)  # the samples end one after the other
    engine.add(4)
    joined = [1 in tokens_of(engine.step()) for _ in range(4)]
    assert joined == [False, False, True, True]


@pytest.mark.parametrize("preemption", ["auto", "recompute"])
def test_a_forked_group_without_room_to_swap_is_recomputed(preemption):
    engine = build_engine(num_blocks=9, num_swap_blocks=0, preemption=preemption)
    engine.add(8, num_tokens=16)
    forked = engine.add(8, num_tokens=8, width=3)
    decisions = engine.run()
    assert any(forked in decision.preempted for decision in decisions)
    assert engine.finished == [0, 1]
    assert not engine.ended


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_a_recomputed_group_forks_again_where_its_tokens_diverge(enable_prefix_caching):
    """It holds as few blocks as before, though nothing was swapped and nothing may be cached."""
    engine = build_engine(
        num_blocks=20, num_swap_blocks=0, enable_prefix_caching=enable_prefix_caching
    )
    engine.add(20, num_tokens=40)
    forked = engine.add(17, num_tokens=10, width=4)
    memory, held = engine.scheduler.memory, []

    def preempted() -> bool:
        if len(forked.sequences) == 4:
            held.append(memory.num_distinct_blocks(forked))
        return forked.num_preemptions > 0

    engine.step_until(preempted)
    assert len(forked.sequences) == 1
    assert len(forked.awaiting_refork) == 3
    assert forked.num_batch_slots == 4
    engine.step_until(lambda: forked.is_decoding)
    assert len(forked.sequences) == 4
    assert memory.num_distinct_blocks(forked) <= held[-1] + 4, "at most one block more for each"
    engine.run()
    assert sorted(engine.finished) == [0, 1]
    assert [s.num_output_tokens for s in engine.samples[1]] == [10, 11, 12, 13]


def test_a_reforked_sequence_never_writes_to_a_cached_block():
    engine = build_engine(num_swap_blocks=0)
    forked = engine.add(3, num_tokens=9, width=3)
    engine.step()
    one, two, three = forked.sequences  # of 4 tokens, the last of which is not computed
    memory = engine.scheduler.memory
    engine.scheduler._preempt(forked, Draft(tokens_left=0))
    equal = Sequence(900, one.token_ids)
    admit(memory, SequenceGroup("equal", [equal]))
    equal.mark_computed(4)
    [known] = memory.cache_blocks(equal)
    memory.free(equal)
    engine.step_until(lambda: len(forked.sequences) == 3)
    assert memory.tables[one.seq_id].blocks[0] == known
    assert known not in memory.tables[two.seq_id].blocks
    assert known not in memory.tables[three.seq_id].blocks


def test_a_group_aborted_while_awaiting_refork_leaves_no_block():
    engine = build_engine(num_blocks=10, num_swap_blocks=0, enable_prefix_caching=False)
    engine.add(8, num_tokens=30)
    forked = engine.add(9, num_tokens=7, width=3)
    engine.step_until(lambda: bool(forked.awaiting_refork))
    engine.scheduler.abort(forked)
    assert forked.status is SequenceStatus.FINISHED
    assert not forked.awaiting_refork
    engine.run()
    assert engine.scheduler.memory.num_free == 10


def test_a_prompt_too_long_for_the_unpinned_blocks_can_never_join():
    engine = build_engine(num_blocks=6)
    engine.add(16, num_tokens=1, shared_prefix=True)
    engine.run()
    engine.scheduler.memory.pin(prefix := Sequence(999, range(16)))
    with pytest.raises(PromptTooLong, match="too many of the pool's 6 blocks for a prompt of 12"):
        engine.add(12)
    engine.add(20, num_tokens=2, shared_prefix=True)
    engine.step_until(lambda: engine.finished == [0, 1])
    engine.scheduler.memory.free(prefix)
    engine.add(12)


# ---- any workload --------------------------------------------------------------------------------

requests = st.lists(
    st.tuples(
        st.integers(1, 40),  # prompt length
        st.integers(1, 30),  # tokens to generate
        st.integers(1, 4),  # sequences
        st.integers(0, 6),  # steps to run after it arrives
        st.integers(0, 5).map(lambda n: n == 0),  # whether a request is aborted then
    ),
    min_size=1,
    max_size=12,
)


@given(
    requests=requests,
    num_blocks=st.integers(4, 60),
    block_size=st.sampled_from([1, 2, 4, 16]),
    num_swap_blocks=st.sampled_from([1, 8, 100]),
    max_num_seqs=st.integers(4, 12),
    budget=st.integers(12, 60),
    chunked=st.booleans(),
    preemption=st.sampled_from(["auto", "recompute", "swap"]),
    watermark=st.sampled_from([0.0, 0.1, 0.5]),
    pick=st.sampled_from([youngest, lambda groups: groups[0]]),
)
def test_every_request_ends_and_every_block_comes_back(
    requests, num_blocks, block_size, num_swap_blocks, max_num_seqs, budget, chunked, preemption,
    watermark, pick,
):  # fmt: skip
    engine = build_engine(
        Parts(select_victim=pick),
        num_blocks=num_blocks,
        block_size=block_size,
        num_swap_blocks=num_swap_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget if chunked else 400,
        enable_chunked_prefill=chunked,
        preemption=preemption,
        watermark=watermark,
    )
    refused, aborted = 0, []
    for prompt_len, num_tokens, num_seqs, pause, abort in requests:
        try:
            engine.add(prompt_len, num_tokens, num_seqs)
        except PromptTooLong:
            refused += 1
        for _ in range(pause):
            if engine.scheduler.has_unfinished():
                engine.step()
        alive = [g for g in engine.groups if g.sequences]
        if abort and alive:
            engine.scheduler.abort(alive[len(alive) // 2])
            aborted += numbers([alive[len(alive) // 2]])
    engine.run()
    ends = len(engine.finished) + len(engine.ended) + len(aborted) + refused
    assert ends == len(requests)
    for number in engine.finished:
        group, sequences = engine.groups[number], engine.samples[number]
        assert len(sequences) == group.width
        generated = [s.num_output_tokens for s in sequences]
        assert generated == [engine.length_of(s, number) for s in sequences]
    memory = engine.scheduler.memory
    assert memory.num_free == memory.num_blocks
    assert memory.num_free_swap_blocks == memory.num_swap_blocks
    assert not memory.tables


@given(
    requests=st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 3)),
        min_size=2,
        max_size=8,
    ),
    preemption=st.sampled_from(["auto", "recompute", "swap"]),
    num_swap_blocks=st.sampled_from([1, 5, 100]),
)
def test_the_oldest_running_group_advances_and_the_oldest_waiting_joins_first(
    requests, preemption, num_swap_blocks
):
    engine = build_engine(
        num_blocks=11,
        max_num_batched_tokens=16,
        max_num_seqs=8,
        preemption=preemption,
        num_swap_blocks=num_swap_blocks,
    )
    scheduler = engine.scheduler
    for prompt_len, num_tokens, num_seqs in requests:
        engine.add(prompt_len, num_tokens, num_seqs)
    while scheduler.has_unfinished():
        ran = list(scheduler.running)
        out = scheduler.swapped + scheduler.waiting
        decision = engine.step()
        computed = {s.group for s in decision.sequences}
        if ran:
            assert ran[0] in computed or ran[0] in decision.ended
        left_out = [g.arrival for g in scheduler.swapped + scheduler.waiting if g in out]
        joined = [g.arrival for g in out if g.sequences and g.arrival not in left_out]
        assert not joined or not left_out or max(joined) < min(left_out)


def test_a_young_swapped_group_does_not_overtake_an_older_one_that_waits():
    engine = build_engine(num_blocks=8, preemption="swap", num_swap_blocks=1)
    for _ in range(3):
        engine.add(4, num_tokens=20)
    seen = []
    while engine.scheduler.has_unfinished():
        decision = engine.step()
        seen.append(sorted({s.group.arrival for s in decision.sequences}))
    assert all(arrivals == list(range(arrivals[0], arrivals[-1] + 1)) for arrivals in seen)
