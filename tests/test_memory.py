"""Who owns which block: allocator, block table, block manager, and the second opinion on them."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minipaged.config import EngineConfig
from minipaged.errors import CheckFailed, DoubleFree, InvalidOption, OutOfBlocks
from minipaged.memory import BlockAllocator, BlockManager, BlockTable
from minipaged.memory.checked import CheckedAllocator, CheckedMemory
from minipaged.parts import Parts
from minipaged.sequence import Sequence, SequenceGroup


def checked_manager(allocator=BlockAllocator, manager=BlockManager, **options):
    return CheckedMemory(manager(allocator=lambda n: CheckedAllocator(allocator(n)), **options))


def group_of(*lengths: int, first_id: int = 0) -> SequenceGroup:
    sequences = [Sequence(first_id + i, range(n)) for i, n in enumerate(lengths)]
    return SequenceGroup(f"request {first_id}", sequences, num_seats=len(lengths))


# ---- allocator ---------------------------------------------------------------------------------


@pytest.fixture(params=[BlockAllocator, lambda n: CheckedAllocator(BlockAllocator(n))])
def allocator(request):
    return request.param(4)


def test_every_block_is_handed_out_once_and_then_the_pool_is_empty(allocator):
    assert {allocator.allocate() for _ in range(4)} == {0, 1, 2, 3}
    with pytest.raises(OutOfBlocks, match="all 4 blocks are in use"):
        allocator.allocate()


def test_a_block_returns_only_when_its_last_owner_lets_go(allocator):
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


def test_a_pool_of_fewer_than_no_blocks_is_refused():
    with pytest.raises(InvalidOption, match="a pool of -1 blocks"):
        BlockAllocator(-1)


# ---- block table -------------------------------------------------------------------------------


def test_a_slot_is_physical_block_times_block_size_plus_offset():
    table = BlockTable(4, [7, 1, 3], num_tokens=10)
    assert [table.slot(p) for p in (0, 3, 4, 9)] == [28, 31, 4, 13]
    assert [table.filled(i) for i in range(3)] == [4, 4, 2]
    with pytest.raises(AssertionError, match="position 10 has no slot"):
        table.slot(10)


# ---- block manager -----------------------------------------------------------------------------


def test_admission_takes_the_blocks_of_the_prompt_and_none_for_what_may_come():
    memory = checked_manager(num_blocks=10, block_size=4)
    memory.admit(group_of(9))
    assert len(memory.block_table(0)) == 3
    assert memory.num_free == 7


def test_admission_leaves_the_watermark_free_unless_the_group_is_alone():
    memory = checked_manager(num_blocks=4, block_size=4, watermark_blocks=2)
    group = group_of(12)
    assert not memory.can_admit(group, alone=False)
    assert memory.can_admit(group, alone=True)


def test_a_new_block_is_taken_only_when_the_last_one_is_full():
    memory = checked_manager(num_blocks=10, block_size=4)
    group = group_of(3)
    memory.admit(group)
    (seq,) = group.sequences
    seq.mark_computed(3)
    taken = []
    for token in range(6):
        seq.append(token)
        assert memory.append(seq) == []
        seq.mark_computed(1)
        taken.append(len(memory.block_table(0)))
    assert taken == [1, 2, 2, 2, 2, 3]


def test_a_fork_takes_no_block_and_its_first_write_copies_the_shared_one():
    memory = checked_manager(num_blocks=10, block_size=4)
    group = group_of(6)
    memory.admit(group)
    parent = group.sequences[0]
    parent.mark_computed(6)
    child = fork(memory, group, parent, 1)
    assert memory.num_free == 8
    assert memory.blocks_needed(group) == 3  # one shared, one original, one copy
    for seq in (parent, child):
        seq.append(0)
    shared = memory.block_table(0).blocks[1]
    [(source, copy)] = memory.append(parent)
    assert source == shared
    assert memory.append(child) == []  # the last owner keeps the original
    assert memory.block_table(0).blocks[1] == copy
    assert memory.block_table(1).blocks[1] == shared
    assert memory.block_table(0).blocks[0] == memory.block_table(1).blocks[0]


def test_a_shared_full_block_is_never_copied():
    memory = checked_manager(num_blocks=10, block_size=4)
    group = group_of(8)
    memory.admit(group)
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
    memory.admit(group)
    group.sequences[0].mark_computed(9)
    fork(memory, group, group.sequences[0], 1)
    out = memory.swap_out(group)
    assert len(out) == 3
    assert (memory.num_free, memory.num_free_swap_blocks) == (10, 2)
    assert memory.is_swapped(0)
    assert memory.is_swapped(1)
    back = memory.swap_in(group)
    assert [swap for _, swap in out] == [swap for swap, _ in back]
    assert memory.block_table(0).blocks == memory.block_table(1).blocks
    assert all(memory.ref_count(b) == 2 for b in memory.block_table(0).blocks)
    assert memory.num_free_swap_blocks == 5


def test_a_group_too_large_for_the_swap_pool_cannot_swap_out():
    memory = checked_manager(num_blocks=10, num_swap_blocks=2, block_size=4)
    group = group_of(9)
    memory.admit(group)
    assert not memory.can_swap_out(group)


def test_usage_counts_shared_slots_once_and_adds_up_to_the_pool():
    memory = checked_manager(num_blocks=10, num_swap_blocks=10, block_size=4)
    group = group_of(6)
    memory.admit(group)
    fork(memory, group, group.sequences[0], 1)
    usage = memory.usage()
    assert (usage.used, usage.internal, usage.free) == (6, 2, 32)
    assert (usage.reserved, usage.external) == (0, 0)
    assert usage.total == 40
    memory.swap_out(group)
    assert memory.usage().used == 0


def test_internal_fragmentation_stays_below_one_block_a_sequence():
    memory = checked_manager(num_blocks=100, block_size=16)
    for index, length in enumerate((1, 15, 16, 17, 160)):
        memory.admit(group_of(length, first_id=index))
    assert memory.usage().internal == 15 + 1 + 0 + 15 + 0


def fork(memory, group: SequenceGroup, parent: Sequence, child_id: int) -> Sequence:
    child = Sequence(child_id, parent.token_ids)
    child.num_computed_tokens = parent.num_computed_tokens
    group.sequences.append(child)
    memory.fork(parent, child)
    return child


# ---- anything, in any order ----------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Admit, write, fork, swap and free in any order, under `Checked`, beside a model of tensors.

    The model writes into each slot which token of which history stands there, and carries out the
    copies that the manager asks for, so a wrong slot, a missing copy or a lost block shows as a
    sequence that reads another's tokens.
    """

    manager = BlockManager
    allocator = BlockAllocator

    @initialize(
        num_blocks=st.integers(3, 14),
        num_swap_blocks=st.integers(0, 14),
        block_size=st.integers(1, 5),
    )
    def build(self, num_blocks: int, num_swap_blocks: int, block_size: int) -> None:
        self.memory = checked_manager(
            self.allocator,
            self.manager,
            num_blocks=num_blocks,
            num_swap_blocks=num_swap_blocks,
            block_size=block_size,
        )
        self.block_size = block_size
        self.pool: dict[int, list] = {b: [None] * block_size for b in range(num_blocks)}
        self.swap_pool: dict[int, list] = {b: [None] * block_size for b in range(num_swap_blocks)}
        self.groups: list[SequenceGroup] = []
        self.next_id = 0

    def pick(self, data, swapped: bool) -> SequenceGroup:
        return data.draw(st.sampled_from([g for g in self.groups if self.is_out(g) is swapped]))

    def is_out(self, group: SequenceGroup) -> bool:
        return self.memory.is_swapped(group.unfinished[0].seq_id)

    def has(self, swapped: bool) -> bool:
        return any(self.is_out(g) is swapped for g in self.groups)

    def compute(self, seq: Sequence) -> None:
        """Play the model: write every uncomputed token into its slot."""
        table = self.memory.block_table(seq.seq_id)
        for position in range(seq.num_computed_tokens, seq.num_tokens):
            block, offset = divmod(table.slot(position), self.block_size)
            self.pool[block][offset] = seq.token_ids[position]
        seq.mark_computed(seq.num_uncomputed_tokens)

    @rule(length=st.integers(1, 18))
    def admit(self, length: int) -> None:
        group = SequenceGroup(str(self.next_id), [Sequence(self.next_id, [self.next_id] * length)])
        self.next_id += 1
        if self.memory.can_admit(group, alone=True):
            self.memory.admit(group)
            self.groups.append(group)
            self.compute(group.sequences[0])

    @precondition(lambda self: self.has(swapped=False))
    @rule(data=st.data())
    def append(self, data) -> None:
        group = self.pick(data, swapped=False)
        tokens = [s.seq_id * 1000 + s.num_tokens for s in group.unfinished]
        for seq, token in zip(group.unfinished, tokens, strict=True):
            seq.append(token)
        free, needed = self.memory.num_free, self.memory.blocks_needed(group)
        if not self.memory.can_append(group):
            for seq in group.unfinished:
                seq.token_ids.pop()
            return
        for seq in group.unfinished:
            for source, target in self.memory.append(seq):
                self.pool[target] = list(self.pool[source])
        held = {b for s in group.unfinished for b in self.memory.block_table(s.seq_id).blocks}
        assert len(held) == needed, "blocks_needed must be exact"
        assert self.memory.num_free <= free
        for seq in group.unfinished:
            self.compute(seq)

    @precondition(lambda self: self.has(swapped=False))
    @rule(data=st.data())
    def fork(self, data) -> None:
        group = self.pick(data, swapped=False)
        fork(self.memory, group, data.draw(st.sampled_from(group.unfinished)), self.next_id)
        self.next_id += 1

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def free(self, data) -> None:
        group = data.draw(st.sampled_from(self.groups))
        seq = data.draw(st.sampled_from(group.unfinished))
        self.memory.free(seq)
        group.finished_ids.add(seq.seq_id)
        if not group.unfinished:
            self.groups.remove(group)

    @precondition(lambda self: self.has(swapped=False))
    @rule(data=st.data())
    def swap_out(self, data) -> None:
        group = self.pick(data, swapped=False)
        if self.memory.can_swap_out(group):
            for source, target in self.memory.swap_out(group):
                self.swap_pool[target] = list(self.pool[source])

    @precondition(lambda self: self.has(swapped=True))
    @rule(data=st.data())
    def swap_in(self, data) -> None:
        group = self.pick(data, swapped=True)
        if self.memory.can_swap_in(group, alone=True):
            for source, target in self.memory.swap_in(group):
                self.pool[target] = list(self.swap_pool[source])

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for group in getattr(self, "groups", []):
            pool = self.swap_pool if self.is_out(group) else self.pool
            for seq in group.unfinished:
                table = self.memory.block_table(seq.seq_id)
                slots = [divmod(table.slot(p), self.block_size) for p in range(seq.num_tokens)]
                assert [pool[block][offset] for block, offset in slots] == seq.token_ids

    @invariant()
    def usage_adds_up(self) -> None:
        if hasattr(self, "memory"):
            usage = self.memory.usage()
            assert usage.total == self.memory.num_blocks * self.block_size

    def teardown(self) -> None:
        for group in getattr(self, "groups", []):
            for seq in group.unfinished:
                self.memory.free(seq)
        if hasattr(self, "memory"):
            assert self.memory.num_free == self.memory.num_blocks
            assert self.memory.num_free_swap_blocks == self.memory.num_swap_blocks


TestAnyOrder = AnyOrder.TestCase


# ---- deliberate faults: each must be caught ------------------------------------------------------


class LeaksAReference(BlockAllocator):
    def free(self, block: int) -> None:
        if self.ref_count(block) != 2:
            super().free(block)


class ForgetsToReturnABlock(BlockAllocator):
    def free(self, block: int) -> None:
        super().free(block)
        if self.ref_count(block) == 0 and block == 1:
            self._free.remove(block)


class HandsOutTheSameBlockTwice(BlockAllocator):
    def allocate(self) -> int:
        block = super().allocate()
        if block == 2:
            self._free.append(block)
        return block


class AcceptsADoubleFree(BlockAllocator):
    def free(self, block: int) -> None:
        if self.ref_count(block):
            super().free(block)
        else:
            self._free.append(block)


class WritesIntoSharedBlocks(BlockManager):
    """No copy-on-write."""

    def append(self, seq):
        table = self._tables[seq.seq_id]
        while len(table) < self._blocks_for(seq.num_tokens):
            table.blocks.append(self._pool.allocate())
        table.num_tokens = seq.num_tokens
        return []


class ForgetsTheCopy(BlockManager):
    """Repoints the table, but does not say that the block must be copied."""

    def append(self, seq):
        super().append(seq)
        return []


class SharesTheTableItself(BlockManager):
    def fork(self, parent, child):
        super().fork(parent, child)
        self._tables[child.seq_id] = self._tables[parent.seq_id]


class ForksWithoutCounting(BlockManager):
    def fork(self, parent, child):
        self._tables[child.seq_id] = self._tables[parent.seq_id].copy()


class LosesSharingInTheSwap(BlockManager):
    def _move(self, group, source, target):
        pairs = []
        for seq in group.unfinished:
            table = self._tables[seq.seq_id]
            for logical, block in enumerate(table.blocks):
                table.blocks[logical] = target.allocate()
                source.free(block)
                pairs.append((block, table.blocks[logical]))
        return pairs


class FreesIntoTheWrongPool(BlockManager):
    def _pool_of(self, seq):
        return self._pool


class KeepsAFreedTable(BlockManager):
    def free(self, seq):
        for block in self._tables[seq.seq_id].blocks:
            self._pool_of(seq).free(block)


class AllocatesOneBlockTooFew(BlockManager):
    def _blocks_for(self, num_tokens):
        return max(1, num_tokens // self.block_size)


@pytest.mark.parametrize(
    "fault",
    [
        LeaksAReference,
        ForgetsToReturnABlock,
        HandsOutTheSameBlockTwice,
        WritesIntoSharedBlocks,
        ForgetsTheCopy,
        SharesTheTableItself,
        ForksWithoutCounting,
        LosesSharingInTheSwap,
        FreesIntoTheWrongPool,
        KeepsAFreedTable,
        AllocatesOneBlockTooFew,
    ],
)
def test_a_deliberate_fault_is_caught(fault):
    from hypothesis import Phase, settings
    from hypothesis.stateful import run_state_machine_as_test

    role = "allocator" if issubclass(fault, BlockAllocator) else "manager"
    machine = type(fault.__name__, (AnyOrder,), {role: fault})
    quick = settings(
        max_examples=400, phases=[Phase.generate], derandomize=True, deadline=None, database=None
    )
    with pytest.raises((CheckFailed, AssertionError, DoubleFree, OutOfBlocks, LookupError)):
        run_state_machine_as_test(machine, settings=quick)


def test_checked_names_the_call_after_which_the_count_was_wrong():
    allocator = CheckedAllocator(ForgetsToReturnABlock(3))
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
    memory.admit(group)
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


class HandsOutABlockTwiceAndCountsWell(HandsOutTheSameBlockTwice):
    @property
    def num_free(self) -> int:
        return self.num_blocks - sum(map(bool, self._ref_counts))


@pytest.mark.parametrize(
    ("fault", "calls", "sentence"),
    [
        (ForgetsToShare, "allocate share", r"ref_count\(0\) is 1, but 2 own it.*share\(0\)"),
        (SharesAFreeBlock, "share", r"share\(0\) was accepted, but block 0 has no owner"),
        (HandsOutABlockThatIsNotThere, "allocate", r"allocate\(\) gave block 3, outside 0 to 2"),
        (HandsOutABlockTwiceAndCountsWell, "allocate " * 4, "gave block 2, which somebody owns"),
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
        checked_manager(manager=manager, num_blocks=4, block_size=4).admit(group_of(5))


@pytest.mark.parametrize("name", ["ref_count", "swap_ref_count"])
def test_checked_memory_counts_the_owners_in_both_pools(name):
    manager = type("Miscounts", (BlockManager,), {name: lambda self, block: 7})
    memory = checked_manager(manager=manager, num_blocks=4, num_swap_blocks=4, block_size=4)
    with pytest.raises(CheckFailed, match=rf"^{name}\(0\) is 7, but counting gives .*admit"):
        memory.admit(group_of(5))


class ListsABlockTwice(BlockManager):
    def admit(self, group):
        super().admit(group)
        blocks = self.block_table(group.sequences[0].seq_id).blocks
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
        memory.admit(group_of(7))


def test_swapping_out_is_recounted():
    class Loses(BlockManager):
        def swap_out(self, group):
            super().swap_out(group)
            self._swap_pool.free(self.block_table(0).blocks[0])
            return []

    memory = CheckedMemory(Loses(num_blocks=4, num_swap_blocks=4, block_size=4))
    group = group_of(5)
    memory.admit(group)
    with pytest.raises(CheckFailed, match=r"swap_ref_count\(0\) is 0.*last call: swap_out"):
        memory.swap_out(group)


def test_checked_parts_recount_memory_and_allocator():
    config = EngineConfig(num_blocks=8, num_swap_blocks=8, max_model_len=64, block_size=4)

    class Wrong(BlockManager):
        num_free = 99

    scheduler = Parts(memory=Wrong).checked().build_scheduler(config)
    with pytest.raises(CheckFailed, match="num_free is 99"):
        scheduler.memory.admit(group_of(5))
    scheduler = Parts(allocator=ForgetsToShare).checked().build_scheduler(config)
    scheduler.memory.admit(group := group_of(5))
    with pytest.raises(CheckFailed, match=r"last call: share\(0\)"):
        scheduler.memory.fork(group.sequences[0], group_of(5, first_id=1).sequences[0])


def test_a_block_shared_with_outsiders_costs_a_writer_exactly_one_copy():
    memory = checked_manager(num_blocks=10, block_size=4)
    group = group_of(6)
    memory.admit(group)
    [writer] = group.sequences
    writer.mark_computed(6)
    for outsider in (1, 2):
        memory.fork(writer, Sequence(outsider, writer.token_ids))
    writer.append(0)
    assert memory.blocks_needed(group) == 3
    assert len(memory.append(writer)) == 1


def test_a_forked_group_swaps_out_into_room_for_its_distinct_blocks():
    memory = checked_manager(num_blocks=10, num_swap_blocks=3, block_size=4)
    group = group_of(9)
    memory.admit(group)
    fork(memory, group, group.sequences[0], 1)
    assert memory.can_swap_out(group)
    assert len(memory.swap_out(group)) == 3


def test_a_fork_of_a_swapped_sequence_is_swapped():
    memory = checked_manager(num_blocks=4, num_swap_blocks=4, block_size=4)
    group = group_of(5)
    memory.admit(group)
    memory.swap_out(group)
    child = fork(memory, group, group.sequences[0], 1)
    assert memory.is_swapped(1)
    memory.free(child)
    assert memory.num_free_swap_blocks == 2
