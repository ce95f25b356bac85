"""Which sequence owns which block: allocator, block table, block manager, and their checker."""

import pytest
from faulty_memory import (
    AllocatesOneBlockTooFew,
    ForksWithoutCounting,
    HandsOutABlockTwice,
    NeverReturnsABlock,
)

from minipaged.config import EngineConfig
from minipaged.engine.parts import Parts
from minipaged.errors import CheckFailed, DoubleFree, InvalidOption, OutOfBlocks
from minipaged.evaluation.testing.admission import admit
from minipaged.memory import BlockAllocator, BlockManager, BlockTable
from minipaged.memory.checked import CheckedAllocator, CheckedMemory
from minipaged.sequence import Sequence, SequenceGroup


def checked_manager(allocator=BlockAllocator, manager=BlockManager, **options):
    return CheckedMemory(manager(allocator=lambda n: CheckedAllocator(allocator(n)), **options))


def group_of(*lengths: int, first_id: int = 0) -> SequenceGroup:
    sequences = [Sequence(first_id + i, range(n)) for i, n in enumerate(lengths)]
    return SequenceGroup(f"request {first_id}", sequences, width=len(lengths))


# ---- allocator -----------------------------------------------------------------------------------


@pytest.fixture(params=[BlockAllocator, lambda n: CheckedAllocator(BlockAllocator(n))])
def allocator(request):
    return request.param(4)


def test_every_block_is_handed_out_once_and_then_the_pool_is_empty(allocator):
    assert {allocator.allocate() for _ in range(4)} == {0, 1, 2, 3}
    with pytest.raises(OutOfBlocks, match="no free block is left in a pool of 4"):
        allocator.allocate()


def test_a_block_is_free_only_when_its_last_owner_frees_it(allocator):
    block = allocator.allocate()
    allocator.share(block)
    allocator.free(block)
    assert (allocator.num_free, allocator.ref_count(block)) == (3, 1)
    allocator.free(block)
    assert (allocator.num_free, allocator.ref_count(block)) == (4, 0)


def test_a_free_block_cannot_be_freed_or_shared(allocator):
    block = allocator.allocate()
    allocator.free(block)
    with pytest.raises(DoubleFree, match=f"block {block} has no owner"):
        allocator.free(block)
    with pytest.raises(DoubleFree, match=f"block {block} has no owner"):
        allocator.share(block)
    assert allocator.num_free == 4


def test_a_negative_number_of_blocks_is_refused():
    with pytest.raises(InvalidOption, match="a pool of -1 blocks"):
        BlockAllocator(-1)


# ---- block table ---------------------------------------------------------------------------------


def test_a_slot_is_physical_block_times_block_size_plus_offset():
    table = BlockTable(4, [7, 1, 3], num_tokens=10)
    assert [table.slot(p) for p in (0, 3, 4, 9)] == [28, 31, 4, 13]
    assert [table.filled(i) for i in range(3)] == [4, 4, 2]
    with pytest.raises(AssertionError, match="position 10 has no slot"):
        table.slot(10)


# ---- block manager -------------------------------------------------------------------------------


def test_admission_takes_blocks_for_the_prompt_only():
    memory = checked_manager(num_blocks=10, block_size=4)
    admit(memory, group_of(9))
    assert len(memory.tables[0]) == 3
    assert memory.num_free == 7


def test_admission_leaves_the_watermark_free_unless_the_group_is_alone():
    memory = checked_manager(num_blocks=4, block_size=4, watermark_blocks=2)
    group = group_of(12)
    assert not memory.can_admit(group, alone=False)
    assert memory.can_admit(group, alone=True)


def test_a_new_block_is_taken_only_when_the_last_one_is_full():
    memory = checked_manager(num_blocks=10, block_size=4)
    group = group_of(3)
    admit(memory, group)
    (seq,) = group.sequences
    seq.mark_computed(3)
    taken = []
    for token in range(6):
        seq.append(token)
        assert memory.append(seq) == []
        seq.mark_computed(1)
        taken.append(len(memory.tables[0]))
    assert taken == [1, 2, 2, 2, 2, 3]


def test_a_fork_takes_no_block_and_its_first_write_copies_the_shared_one():
    memory = checked_manager(num_blocks=10, block_size=4)
    group = group_of(6)
    admit(memory, group)
    parent = group.sequences[0]
    parent.mark_computed(6)
    child = fork(memory, group, parent, 1)
    assert memory.num_free == 8
    for seq in (parent, child):
        seq.append(0)
    shared = memory.tables[0].blocks[1]
    [(source, copy)] = memory.append(parent)
    assert source == shared
    assert memory.append(child) == []  # the last owner keeps the original
    assert memory.tables[0].blocks[1] == copy
    assert memory.tables[1].blocks[1] == shared
    assert memory.tables[0].blocks[0] == memory.tables[1].blocks[0]


def test_a_shared_full_block_is_never_copied():
    memory = checked_manager(num_blocks=10, block_size=4)
    group = group_of(8)
    admit(memory, group)
    parent = group.sequences[0]
    parent.mark_computed(8)
    child = fork(memory, group, parent, 1)
    for seq in (parent, child):
        seq.append(0)
        assert memory.append(seq) == []
    assert memory.num_free == 10 - 4


def test_swapping_moves_each_shared_block_once_and_keeps_the_sharing():
    memory = checked_manager(num_blocks=10, num_swap_blocks=5, block_size=4)
    group = group_of(9)
    admit(memory, group)
    group.sequences[0].mark_computed(9)
    fork(memory, group, group.sequences[0], 1)
    out = memory.swap_out(group)
    assert len(out) == 3
    assert (memory.num_free, memory.num_free_swap_blocks) == (10, 2)
    assert memory.is_swapped(0)
    assert memory.is_swapped(1)
    back = memory.swap_in(group)
    assert [swap for _, swap in out] == [swap for swap, _ in back]
    assert memory.tables[0].blocks == memory.tables[1].blocks
    assert all(memory.ref_count(b) == 2 for b in memory.tables[0].blocks)
    assert memory.num_free_swap_blocks == 5


def test_a_group_too_large_for_the_swap_pool_cannot_swap_out():
    memory = checked_manager(num_blocks=10, num_swap_blocks=2, block_size=4)
    group = group_of(9)
    admit(memory, group)
    assert not memory.can_swap_out(group)


def test_usage_counts_shared_slots_once_and_adds_up_to_the_pool():
    memory = checked_manager(num_blocks=10, num_swap_blocks=10, block_size=4)
    group = group_of(6)
    admit(memory, group)
    fork(memory, group, group.sequences[0], 1)
    usage = memory.usage()
    assert (usage.used, usage.internal, usage.free) == (6, 2, 32)
    assert (usage.reserved, usage.external) == (0, 0)
    assert usage.total == 40
    memory.swap_out(group)
    assert memory.usage().used == 0


def test_internal_fragmentation_is_below_one_block_per_sequence():
    memory = checked_manager(num_blocks=100, block_size=16)
    for index, length in enumerate((1, 15, 16, 17, 160)):
        admit(memory, group_of(length, first_id=index))
    assert memory.usage().internal == 15 + 1 + 0 + 15 + 0


def fork(memory, group: SequenceGroup, parent: Sequence, child_id: int) -> Sequence:
    parent.mark_computed(parent.num_uncomputed_tokens)
    child = parent.fork(child_id)
    group.sequences.append(child)
    memory.fork(parent, child)
    return child


# ---- the checker ---------------------------------------------------------------------------------


class AcceptsADoubleFree(BlockAllocator):
    def free(self, block: int) -> None:
        if self.ref_count(block):
            super().free(block)
        else:
            self._free.append(block)


def test_checked_names_the_call_after_which_the_count_was_wrong():
    allocator = CheckedAllocator(NeverReturnsABlock(3))
    allocator.allocate()
    block = allocator.allocate()
    with pytest.raises(CheckFailed, match=r"num_free is 1, but 2 blocks have no owner.*free\(1\)"):
        allocator.free(block)


def test_checked_catches_a_double_free_that_the_allocator_accepts():
    allocator = CheckedAllocator(AcceptsADoubleFree(3))
    block = allocator.allocate()
    allocator.free(block)
    with pytest.raises(CheckFailed, match=r"free\(0\) was accepted"):
        allocator.free(block)


def test_checked_memory_names_the_sequence_and_the_call():
    memory = checked_manager(manager=ForksWithoutCounting, num_blocks=4, block_size=4)
    group = group_of(4)
    admit(memory, group)
    with pytest.raises(CheckFailed, match=r"ref_count\(0\) is 1, but counting gives 2.*fork\("):
        fork(memory, group, group.sequences[0], 1)


class ForgetsToShare(BlockAllocator):
    def share(self, block: int) -> None:
        pass


class SharesAFreeBlock(BlockAllocator):
    def share(self, block: int) -> None:
        self._ref_counts[block] += 1


class HandsOutABlockThatIsNotThere(BlockAllocator):
    def allocate(self) -> int:
        return super().allocate() + 3


class HandsOutABlockTwiceAndCountsWell(HandsOutABlockTwice):
    @property
    def num_free(self) -> int:
        return self.num_blocks - sum(map(bool, self._ref_counts))


@pytest.mark.parametrize(
    ("fault", "calls", "sentence"),
    [
        (ForgetsToShare, "allocate share", r"ref_count\(0\) is 1, but 2 own it.*share\(0\)"),
        (SharesAFreeBlock, "share", r"share\(0\) was accepted, but block 0 has no owner"),
        (HandsOutABlockThatIsNotThere, "allocate", r"allocate\(\) gave block 3, outside 0 to 2"),
        (HandsOutABlockTwiceAndCountsWell, "allocate " * 4, "gave block 2, which has an owner"),
    ],
)
def test_checked_says_what_the_allocator_did_wrong(fault, calls, sentence):
    allocator = CheckedAllocator(fault(3))

    def make_the_calls() -> None:
        for call in calls.split():
            getattr(allocator, call)(*[0] * (call == "share"))

    with pytest.raises(CheckFailed, match=sentence):
        make_the_calls()


@pytest.mark.parametrize("name", ["num_free", "num_free_swap_blocks"])
def test_checked_memory_counts_the_free_blocks_of_both_pools(name):
    manager = type("Miscounts", (BlockManager,), {name: 99})
    with pytest.raises(CheckFailed, match=f"{name} is 99, but counting gives .*admit"):
        admit(checked_manager(manager=manager, num_blocks=4, block_size=4), group_of(5))


@pytest.mark.parametrize("name", ["ref_count", "swap_ref_count"])
def test_checked_memory_counts_the_owners_in_both_pools(name):
    manager = type("Miscounts", (BlockManager,), {name: lambda self, block: 7})
    memory = checked_manager(manager=manager, num_blocks=4, num_swap_blocks=4, block_size=4)
    with pytest.raises(CheckFailed, match=rf"^{name}\(0\) is 7, but counting gives .*admit"):
        admit(memory, group_of(5))


class ListsABlockTwice(BlockManager):
    def admit(self, group):
        super().admit(group)
        blocks = self.tables[group.sequences[0].seq_id].blocks
        self._pool.free(blocks.pop())
        self._pool.share(blocks[0])
        blocks.append(blocks[0])


@pytest.mark.parametrize(
    ("manager", "sentence"),
    [
        (ListsABlockTwice, "distinct blocks of sequence 0 is 1, but counting gives 2"),
        (AllocatesOneBlockTooFew, "blocks of sequence 0 is 1, but counting gives 2"),
    ],
)
def test_checked_memory_looks_into_each_block_table(manager, sentence):
    memory = checked_manager(manager=manager, num_blocks=4, block_size=4)
    with pytest.raises(CheckFailed, match=sentence):
        admit(memory, group_of(7))


def test_swapping_out_is_recounted():
    class Loses(BlockManager):
        def swap_out(self, group):
            super().swap_out(group)
            self._swap_pool.free(self.tables[0].blocks[0])
            return []

    memory = CheckedMemory(Loses(num_blocks=4, num_swap_blocks=4, block_size=4))
    group = group_of(5)
    admit(memory, group)
    with pytest.raises(CheckFailed, match=r"swap_ref_count\(0\) is 0.*last call: swap_out"):
        memory.swap_out(group)


def test_checked_parts_recount_memory_and_allocator():
    config = EngineConfig(
        num_blocks=8,
        num_swap_blocks=8,
        block_size=4,
        max_model_len=64,
        max_num_batched_tokens=64,
        enable_prefix_caching=True,
    )

    class Wrong(BlockManager):
        num_free = 99

    scheduler = Parts(memory=Wrong).checked().build_scheduler(config)
    with pytest.raises(CheckFailed, match="num_free is 99"):
        admit(scheduler.memory, group_of(5))
    scheduler = Parts(allocator=ForgetsToShare).checked().build_scheduler(config)
    admit(scheduler.memory, group := group_of(5))
    with pytest.raises(CheckFailed, match=r"last call: share\(0\)"):
        fork(scheduler.memory, group, group.sequences[0], 1)


def test_a_block_shared_with_outsiders_costs_a_writer_exactly_one_copy():
    memory = checked_manager(num_blocks=10, block_size=4)
    group = group_of(6)
    admit(memory, group)
    [writer] = group.sequences
    writer.mark_computed(6)
    for outsider in (1, 2):
        memory.fork(writer, writer.fork(outsider))
    writer.append(0)
    assert len(memory.append(writer)) == 1


def test_a_forked_group_swaps_out_into_room_for_its_distinct_blocks():
    memory = checked_manager(num_blocks=10, num_swap_blocks=3, block_size=4)
    group = group_of(9)
    admit(memory, group)
    fork(memory, group, group.sequences[0], 1)
    assert memory.can_swap_out(group)
    assert len(memory.swap_out(group)) == 3


def test_a_fork_of_a_swapped_sequence_is_swapped():
    memory = checked_manager(num_blocks=4, num_swap_blocks=4, block_size=4)
    group = group_of(5)
    admit(memory, group)
    memory.swap_out(group)
    child = fork(memory, group, group.sequences[0], 1)
    assert memory.is_swapped(1)
    memory.free(child)
    assert memory.num_free_swap_blocks == 2
