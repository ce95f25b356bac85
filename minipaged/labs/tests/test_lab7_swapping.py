"""Lab 7: what must survive a preemption. No test depends on block numbers.

The pools contain words instead of keys and values. Swapping returns pairs of blocks; `Pools` copies
them and then reads each sequence through its table.
"""

import random
from functools import partial

import pytest

from minipaged.evaluation.testing.engine_without_model import numbers, tokens_of
from minipaged.scheduler.fcfs import youngest
from minipaged.sequence import Sequence, SequenceGroup, SequenceStatus

from pools_of_words import Pools
from schedulers import build_engine
from serving import serves_what_the_library_serves

essential = pytest.mark.essential


def task(number: int) -> pytest.MarkDecorator:
    return pytest.mark.lab(number=7, task=number)


@pytest.fixture
def build(part):
    return lambda **options: Pools(part("memory"), **options)


@pytest.fixture
def engine(part):
    """`engine(8, 4, num_blocks=6)`: the student's scheduler over the library's own memory."""

    return partial(build_engine, part("scheduler"), youngest)


# ---- task 1: swap out ----------------------------------------------------------------------------


@task(1)
@pytest.mark.parametrize(("num_swap_blocks", "has_room"), [(0, False), (2, False), (3, True)])
def test_a_group_can_be_swapped_out_if_all_its_blocks_fit(build, num_swap_blocks, has_room):
    pools = build(num_swap_blocks=num_swap_blocks)
    assert pools.memory.can_swap_out(pools.group(10)) is has_room


@task(1)
@pytest.mark.parametrize(("num_swap_blocks", "has_room"), [(4, False), (5, True)])
def test_a_shared_block_needs_one_swap_block(build, num_swap_blocks, has_room):
    pools = build(num_swap_blocks=num_swap_blocks)
    group = pools.group(8, width=3)  # two shared blocks, and one block of its own per sample
    assert pools.memory.can_swap_out(group) is has_room


@task(1)
def test_blocks_of_other_groups_take_room_in_the_swap_pool(build):
    pools = build(num_swap_blocks=5)
    one, other = pools.group(10), pools.group(9, first=100)
    pools.swap_out(one)
    assert not pools.memory.can_swap_out(other)


@task(1)
@essential("a request must read the same content after it was swapped (rule 1).")
def test_a_swapped_group_moves_from_the_pool_to_the_swap_pool(build):
    pools = build()
    group = pools.group(10)
    before = pools.reads(group)
    assert pools.swap_out(group) == 3
    assert pools.num_free == (20, 17)
    assert all(pools.memory.is_swapped(seq.seq_id) for seq in group.sequences)
    pools.check(group, before)


@task(1)
def test_samples_share_in_the_swap_pool_what_they_shared_in_the_pool(build):
    pools = build()
    group = pools.group(10, width=3)
    before, held = pools.reads(group), pools.memory.num_distinct_blocks(group)
    assert pools.swap_out(group) == held, "a shared block is copied only once"
    assert pools.num_free == (20, 20 - held)
    pools.check(group, before)
    [first, *_] = pools.memory.tables[group.sequences[0].seq_id].blocks
    assert pools.memory.swap_ref_count(first) == 3


@task(1)
def test_a_block_with_other_owners_stays_in_the_pool(build):
    pools = build(caching=True)
    one, other = pools.group(10), pools.group(12)
    before = pools.reads(one), pools.reads(other)
    pools.swap_out(one)
    pools.check(one, before[0])
    pools.check(other, before[1])
    assert pools.num_free == (17, 17)


@task(1)
def test_an_aborted_swapped_group_leaves_no_blocks(build):
    pools = build()
    group = pools.group(10, width=2)
    pools.swap_out(group)
    pools.free(group)
    assert pools.num_free == (20, 20)
    assert not pools.memory.tables


@task(1)
def test_swapped_blocks_stay_cached_in_the_pool_and_can_be_evicted(build):
    pools = build(num_blocks=4, caching=True)
    group = pools.group(13)
    before = pools.reads(group)
    pools.swap_out(group)
    assert pools.memory.num_cached_tokens(Sequence(900, range(13))) == 12
    pools.free(pools.group(16, first=100))  # takes all four; evicts the end of the prompt first
    assert pools.memory.num_cached_tokens(Sequence(900, range(13))) == 0
    pools.check(group, before)


# ---- task 2: swap in -----------------------------------------------------------------------------


@task(2)
@essential("after a swap in, a request must read and share the same content (rules 1 and 2).")
@pytest.mark.parametrize("width", [1, 3])
def test_a_swapped_in_group_has_its_content_and_its_sharing(build, width):
    pools = build()
    group = pools.group(10, width=width)
    before, held = pools.reads(group), pools.memory.num_distinct_blocks(group)
    pools.swap_out(group)
    assert pools.swap_in(group) == held
    assert not any(pools.memory.is_swapped(seq.seq_id) for seq in group.sequences)
    pools.check(group, before)
    assert pools.num_free == (20 - held, 20)


@task(2)
def test_a_swapped_in_group_can_grow_and_end(build):
    pools = build()
    group = pools.group(9, width=2)
    pools.swap_out(group)
    pools.swap_in(group)
    pools.grow(group, 6)
    assert [len(blocks) for blocks in pools.reads(group)] == [5, 5]
    pools.free(group)
    assert pools.num_free == (20, 20)


@task(2)
def test_blocks_still_cached_are_shared_again_and_not_copied(build):
    pools = build(caching=True)
    group = pools.group(14, width=2)  # three full blocks are shared
    before = pools.reads(group)
    pools.swap_out(group)
    other = pools.group(9)  # shares two of them in the meantime
    copied = pools.swap_in(group)
    full = {w for words in before for w in words if len(w.split()) == 4}
    assert copied == len({w for words in before for w in words} - full)
    pools.check(group, before)
    pools.free(group, other)
    assert pools.num_free == (20, 20)


@task(2)
def test_no_cached_block_is_evicted_on_the_way_back(build):
    """Two samples have diverged; swapping in the first must not evict blocks of the second."""
    pools = build(num_blocks=11, caching=True)
    group = pools.group(4, width=2)
    pools.grow(group, 6)
    before = pools.reads(group)
    pools.swap_out(group)
    pools.free(pools.group(4 * pools.num_free[0] - 20, first=100))  # also cached, and used later
    assert pools.memory.can_admit(group, True)
    pools.swap_in(group)
    pools.check(group, before)


@task(2)
def test_swapped_in_blocks_can_be_cached_again(build):
    pools = build(num_blocks=6, caching=True)
    group = pools.group(14)
    pools.swap_out(group)
    pools.free(pools.group(24, first=100))  # nothing of the prompt is cached any more
    assert pools.swap_in(group) == 4
    assert pools.memory.num_cached_tokens(Sequence(900, range(14))) == 0
    pools.memory.cache_blocks(group.sequences[0])
    assert pools.memory.num_cached_tokens(Sequence(900, range(14))) == 12


@task(2)
@pytest.mark.parametrize("caching", [False, True])
def test_in_any_order_each_sequence_reads_what_it_wrote(build, caching):
    rng = random.Random(7)
    pools = build(num_blocks=40, num_swap_blocks=60, caching=caching)
    running: list[SequenceGroup] = []
    swapped: list[SequenceGroup] = []
    read: dict[str, list[list[str]]] = {}
    for _ in range(250):
        group = rng.choice(running or swapped or [None])
        if swapped and rng.random() < 0.3 and pools.memory.can_admit(swapped[0], True):
            group = swapped.pop(0)
            pools.swap_in(group)
            running.append(group)
        elif group in running and rng.random() < 0.4 and pools.memory.can_swap_out(group):
            running.remove(group)
            pools.swap_out(group)
            swapped.append(group)
        elif pools.memory.num_free > 24:
            running.append(pools.group(rng.randint(1, 18), rng.choice([1, 2, 3])))
            read[running[-1].request_id] = pools.reads(running[-1])
        elif group is not None and (queue := running if group in running else swapped):
            queue.remove(group)
            pools.free(group)
        for group in running + swapped:
            pools.check(group, read[group.request_id])
    pools.free(*running, *swapped)
    assert pools.num_free == (40, 60)


# ---- task 3: recompute, or choose ----------------------------------------------------------------


@task(3)
def test_a_recomputed_group_waits_in_front_and_nothing_is_computed(engine):
    built = engine(8, 8, 4, num_blocks=4, preemption="recompute")
    victim = built.groups[1]
    built.step()
    tokens = victim.sequences[0].token_ids.copy()
    output = built.step()
    assert (output.preempted, output.swap_out) == ((victim,), ())
    assert built.scheduler.waiting[0] is victim
    assert victim.sequences[0].num_computed_tokens == 0
    assert victim.sequences[0].token_ids == tokens, "a recomputed request must keep its tokens"
    assert victim.sequences[0].seq_id not in built.memory.tables


@task(3)
@essential("after recomputation is chosen, no token counts as computed, and all stay (rule 5).")
def test_a_recomputed_group_keeps_its_tokens_and_none_is_computed(engine):
    built = engine(8, 8, 4, num_blocks=4, preemption="recompute")
    [seq] = built.groups[1].sequences
    built.step_until(lambda: seq.num_output_tokens == 1)
    tokens = seq.token_ids.copy()
    built.scheduler.schedule()
    assert (seq.token_ids, seq.num_computed_tokens) == (tokens, 0)


@task(3)
def test_a_recomputed_group_computes_its_tokens_in_one_step(engine):
    built = engine(8, 8, num_blocks=4, preemption="recompute", enable_prefix_caching=False)
    built.step_until(lambda: 0 in built.finished)
    assert tokens_of(built.step()) == {1: 9}, "eight prompt tokens and one generated token"
    built.run()
    assert built.finished == [0, 1]


@task(3)
def test_a_swapped_group_keeps_its_computed_tokens(engine):
    built = engine(8, 8, num_blocks=4, preemption="swap")
    victim = built.groups[1]
    built.step()
    output = built.step()
    assert len(output.swap_out) == 2, "swap_out lists the blocks that the engine must copy"
    assert built.scheduler.swapped == [victim]
    assert victim.status is SequenceStatus.SWAPPED
    assert victim.sequences[0].num_computed_tokens == 8
    built.run()
    assert built.finished == [0, 1]


@task(3)
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_every_preemption_is_counted_and_recorded_once(engine, preemption):
    built = engine(8, 8, 8, num_tokens=6, num_blocks=6, preemption=preemption)
    recorded = [number for output in built.run() for number in numbers(output.preempted)]
    assert [group.num_preemptions for group in built.groups] == [
        recorded.count(n) for n in range(3)
    ]
    assert recorded.count(2) > 0


@task(3)
@pytest.mark.parametrize(
    ("preemption", "width", "status"),
    [("auto", 1, "WAITING"), ("auto", 3, "SWAPPED"), ("recompute", 3, "SWAPPED"),
     ("swap", 1, "SWAPPED"), ("swap", 3, "SWAPPED")],
)  # fmt: skip
def test_auto_recomputes_one_sequence_and_swaps_several(engine, preemption, width, status):
    built = engine(8, num_tokens=30, num_blocks=12, preemption=preemption)
    group = built.add(8, num_tokens=30, width=width)
    built.step_until(lambda: group.num_preemptions)
    assert group.status.name == status


@task(3)
def test_auto_swaps_a_group_that_has_yet_to_fork(engine):
    built = engine(4, num_blocks=4, max_num_batched_tokens=6, max_num_seqs=4)
    forker = built.add(12, width=2)
    built.step()
    assert built.step().preempted == (forker,)
    assert forker.status is SequenceStatus.SWAPPED


@task(3)
def test_a_group_without_room_to_swap_is_recomputed(engine):
    built = engine(8, 8, 8, num_tokens=6, num_blocks=6, num_swap_blocks=1, preemption="swap")
    outputs = built.run()
    assert any(output.preempted for output in outputs)
    assert not any(output.swap_out for output in outputs)
    assert built.finished == [0, 1, 2]


@task(3)
def test_recomputed_samples_await_refork(engine):
    built = engine(8, num_tokens=24, num_blocks=10, num_swap_blocks=0)
    group = built.add(9, num_tokens=7, width=3)
    built.step_until(lambda: group.num_preemptions)
    assert [*group.sequences, *group.awaiting_refork] == built.samples[1]
    assert len(group.sequences) == 1, "a recomputed group starts again with one sequence"
    built.run()
    assert [seq.num_output_tokens for seq in built.samples[1]] == [7, 8, 9]


@task(3)
@pytest.mark.parametrize("preemption", ["auto", "recompute", "swap"])
def test_all_requests_end_and_all_blocks_are_free_again(engine, preemption):
    rng = random.Random(9)
    for num_swap_blocks in (1, 6, 100):
        built = engine(num_blocks=12, num_swap_blocks=num_swap_blocks, preemption=preemption)
        for _ in range(8):
            built.add(rng.randint(1, 16), rng.randint(1, 14), rng.choice([1, 1, 2, 3]))
        built.run()
        assert len(built.finished) + len(built.ended) == 8


# ---- task 4: serve a language model --------------------------------------------------------------


@task(4)
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_the_model_generates_the_same_with_the_parts_of_the_library(observed, preemption):
    serves_what_the_library_serves(observed, num_blocks=16, preemption=preemption)


@task(4)
@pytest.mark.parametrize("num_swap_blocks", [100, 2])
def test_three_samples_of_each_are_preempted_together(observed, num_swap_blocks):
    serves_what_the_library_serves(
        observed, num_blocks=48, block_size=4, samples=3, num_swap_blocks=num_swap_blocks
    )
