"""Lab 1: what a block allocator must do, whatever data structure it uses.

No test depends on which free block is handed out.
"""

import random

import pytest

from minipaged.errors import DoubleFree, InvalidOption, OutOfBlocks
from minipaged.memory import CheckedAllocator

from serving import serves_what_the_library_serves

essential = pytest.mark.essential


def task(number: int) -> pytest.MarkDecorator:
    return pytest.mark.lab(number=1, task=number)


@pytest.fixture
def build(part):
    return lambda num_blocks: part("allocator")(num_blocks)


# ---- task 1: hand out free blocks ----------------------------------------------------------------


@task(1)
def test_at_first_all_blocks_are_free(build):
    allocator = build(5)
    assert (allocator.num_blocks, allocator.num_free) == (5, 5)


@task(1)
@essential("a block that is handed out twice is written by two sequences (rule 1).")
def test_every_block_is_handed_out_once(build):
    allocator = build(5)
    assert sorted(allocator.allocate() for _ in range(5)) == [0, 1, 2, 3, 4]


@task(1)
def test_each_allocation_lowers_num_free_by_one(build):
    allocator = build(5)
    free = []
    for _ in range(5):
        allocator.allocate()
        free.append(allocator.num_free)
    assert free == [4, 3, 2, 1, 0]


@task(1)
@pytest.mark.parametrize("num_blocks", [0, 1, 3])
def test_an_empty_pool_raises_out_of_blocks(build, num_blocks):
    allocator = build(num_blocks)
    for _ in range(num_blocks):
        allocator.allocate()
    with pytest.raises(OutOfBlocks):
        allocator.allocate()
    assert allocator.num_free == 0


@task(1)
def test_a_negative_pool_size_is_refused(build):
    with pytest.raises(InvalidOption):
        build(-1)


@task(1)
def test_two_pools_are_independent(build):
    one, other = build(3), build(3)
    one.allocate()
    assert other.num_free == 3


# ---- task 2: count the owners --------------------------------------------------------------------


@task(2)
def test_a_new_block_has_one_owner(build):
    allocator = build(4)
    assert allocator.ref_count(allocator.allocate()) == 1


@task(2)
@essential("every owner must be counted (rule 2).")
def test_each_share_adds_one_owner(build):
    allocator = build(4)
    block, other = allocator.allocate(), allocator.allocate()
    counts = []
    for _ in range(3):
        allocator.share(block)
        counts.append(allocator.ref_count(block))
    assert counts == [2, 3, 4]
    assert allocator.ref_count(other) == 1


@task(2)
def test_sharing_takes_no_free_block(build):
    allocator = build(4)
    block = allocator.allocate()
    allocator.share(block)
    assert allocator.num_free == 3


@task(2)
def test_a_free_block_has_no_owner_and_cannot_be_shared(build):
    allocator = build(4)
    taken = allocator.allocate()
    for block in set(range(4)) - {taken}:
        assert allocator.ref_count(block) == 0
        with pytest.raises(DoubleFree):
            allocator.share(block)


@task(2)
@pytest.mark.parametrize("no_block", [-1, 4, 100])
def test_a_number_outside_the_pool_cannot_be_shared(build, no_block):
    allocator = build(4)
    for _ in range(4):
        allocator.allocate()
    with pytest.raises(DoubleFree):
        allocator.share(no_block)
    assert [allocator.ref_count(block) for block in range(4)] == [1, 1, 1, 1]


# ---- task 3: take blocks back --------------------------------------------------------------------


@task(3)
def test_a_block_freed_by_its_only_owner_is_free(build):
    allocator = build(2)
    block = allocator.allocate()
    allocator.free(block)
    assert allocator.num_free == 2
    assert allocator.ref_count(block) == 0


@task(3)
@essential("a block with an owner left must not be free (rule 2).")
def test_a_block_is_free_only_when_its_last_owner_frees_it(build):
    allocator = build(2)
    block = allocator.allocate()
    allocator.share(block)
    allocator.share(block)
    free = []
    for _ in range(3):
        allocator.free(block)
        free.append(allocator.num_free)
    assert free == [1, 1, 2]


@task(3)
def test_a_block_that_came_back_can_be_handed_out_again(build):
    allocator = build(1)
    first = allocator.allocate()
    allocator.free(first)
    assert allocator.allocate() == first
    assert allocator.ref_count(first) == 1


@task(3)
def test_a_block_without_owners_cannot_be_freed(build):
    allocator = build(3)
    block = allocator.allocate()
    allocator.free(block)
    for wrong in (block, -1, 3):
        with pytest.raises(DoubleFree):
            allocator.free(wrong)
    assert allocator.num_free == 3
    assert sorted(allocator.allocate() for _ in range(3)) == [0, 1, 2]


@task(3)
def test_in_any_order_a_recount_finds_no_mismatch(build):
    rng = random.Random(0)
    allocator = CheckedAllocator(build(6))  # recounts all owners after every call
    owned: list[int] = []  # each block once per owner
    for _ in range(4000):
        choices = ["allocate"] * (allocator.num_free > 0) + ["share", "free", "free"] * bool(owned)
        match rng.choice(choices):
            case "allocate":
                owned.append(allocator.allocate())
            case "share":
                block = rng.choice(owned)
                allocator.share(block)
                owned.append(block)
            case "free":
                allocator.free(owned.pop(rng.randrange(len(owned))))
    for block in owned:
        allocator.free(block)
    assert allocator.num_free == 6


@task(3)
@essential("each call must take the same time, however large the pool is (rule 4).")
def test_each_call_is_as_quick_in_a_large_pool(build):
    """A million blocks allocated and freed take seconds if each call looks at one block only."""
    allocator = build(200_000)
    for _ in range(5):
        blocks = [allocator.allocate() for _ in range(200_000)]
        for block in blocks:
            allocator.free(block)
    assert allocator.num_free == 200_000


# ---- task 4: serve a language model --------------------------------------------------------------


@task(4)
def test_the_model_generates_the_same_with_the_allocator_of_the_library(observed):
    serves_what_the_library_serves(observed, num_blocks=16, preemption="swap")  # not enough for all


@task(4)
def test_shared_blocks_are_counted_correctly(observed):
    serves_what_the_library_serves(observed, num_blocks=64, block_size=4, samples=3)
