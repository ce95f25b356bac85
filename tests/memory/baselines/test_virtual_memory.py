"""vAttention's memory, without a page: the owners of regions, and what is mapped when.

The pages of these tests count instead of mapping anything; those of the any-order test also
play the tensors, as in memory_machine.
"""

from types import SimpleNamespace

import pytest
from full_set import examples
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, run_state_machine_as_test
from memory_machine import AnyOrder

from minipaged.config import ModelConfig
from minipaged.errors import CheckFailed, InvalidOption, InvalidRequest, OutOfBlocks
from minipaged.evaluation.testing.admission import admit
from minipaged.memory import CheckedMemory
from minipaged.memory.baselines.regions import RegionLayout
from minipaged.memory.baselines.virtual import VirtualMemory
from minipaged.sequence import Sequence, SequenceGroup

MODEL = ModelConfig(
    architecture="none",
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_size=32,
    vocab_size=10,
    max_position_embeddings=100,
)
FOUR_A_GROUP = RegionLayout(
    num_buffers=2, num_regions=4, region_len=40, token_bytes=1, page_bytes=4
)


class Book:
    """Pages that are only counted."""

    def __init__(self):
        self.mapped: dict[int, int] = {}
        self.num_calls = {"map": 0, "unmap": 0}

    def map(self, region: int, groups: range) -> None:
        assert groups.start == self.mapped.get(region, 0)
        self.mapped[region] = groups.stop
        self.num_calls["map"] += len(groups)

    def unmap(self, region: int, groups: range) -> None:
        assert groups.stop == self.mapped[region]
        assert len(groups) > 0
        self.mapped[region] = groups.start
        self.num_calls["unmap"] += len(groups)


def make(budget: int = 10, watermark: int = 0) -> tuple[VirtualMemory, Book]:
    book = Book()
    checked = CheckedMemory(VirtualMemory(FOUR_A_GROUP, budget, book, watermark))
    return checked, book


def group_of(length: int, seq_id: int = 0, width: int = 1) -> SequenceGroup:
    return SequenceGroup(str(seq_id), [Sequence(seq_id, range(length))], width=width)


def admitted(memory, length: int, seq_id: int) -> SequenceGroup:
    group = group_of(length, seq_id)
    assert memory.can_admit(group, alone=False)
    admit(memory, group)
    group.sequences[0].mark_computed(length)
    return group


def generate(memory, group: SequenceGroup, num_tokens: int = 1) -> list[tuple[int, int]]:
    pairs = []
    for _ in range(num_tokens):
        for seq in group.sequences:
            seq.append(0)
        assert memory.can_append(group)
        for seq in group.sequences:
            pairs += memory.append(seq)
            seq.mark_computed(1)
    return pairs


def forked(memory, group: SequenceGroup, child_id: int) -> Sequence:
    child = group.sequences[0].fork(child_id)
    memory.fork(group.sequences[0], child)
    group.sequences.append(child)
    return child


# ---- layout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("head_dim", [8, 12, 80])
@pytest.mark.parametrize("page_bytes", [4096, 2 * 1024**2])
def test_every_region_begins_on_a_page_and_no_two_pieces_overlap(sliced, head_dim, page_bytes):
    model = ModelConfig(**{**vars(MODEL), "head_dim": head_dim})
    layout = RegionLayout.for_model(
        model, 2, num_regions=5, longest=100, page_bytes=page_bytes, sliced=sliced
    )
    assert layout.region_len >= 100
    groups = range(layout.groups_for(layout.region_len))
    pieces = sorted(piece for region in range(5) for piece in layout.pieces(region, groups))
    assert all(start % page_bytes == 0 for start, _ in pieces)
    ends = [start + length for start, length in pieces]
    assert [start for start, _ in pieces] == [0, *ends[:-1]]
    assert ends[-1] == layout.num_bytes


def test_two_regions_never_have_a_page_in_common():
    with pytest.raises(AssertionError, match="a region is a whole number of pages"):
        RegionLayout(num_buffers=2, num_regions=4, region_len=10, token_bytes=1, page_bytes=4)


def test_slicing_divides_the_waste_by_the_number_of_layers():
    options = {"num_regions": 1, "longest": 100, "page_bytes": 4096}
    whole = RegionLayout.for_model(MODEL, 2, **options)
    sliced = RegionLayout.for_model(MODEL, 2, **options, sliced=True)
    assert whole.tokens_in(1) == MODEL.num_layers * sliced.tokens_in(1) + 2  # 128 = 3 * 42 + 2
    assert (whole.num_buffers, sliced.num_buffers) == (6, 2)


@pytest.mark.parametrize("token_bytes", [1, 3, 4, 6, 48])
def test_a_page_with_a_fractional_number_of_tokens_is_counted_exactly(token_bytes):
    layout = RegionLayout(2, 1, 48, token_bytes, page_bytes=16)
    for num_tokens in range(49):
        groups = layout.groups_for(num_tokens)
        assert groups == len({byte // 16 for byte in range(num_tokens * token_bytes)})
        assert layout.tokens_in(groups) >= num_tokens


# ---- growing -------------------------------------------------------------------------------------


def test_a_page_group_is_mapped_when_a_token_needs_it_and_not_before():
    memory, book = make()
    group = admitted(memory, 7, 0)
    [region] = memory.tables[0].blocks
    taken = []
    for _ in range(6):
        generate(memory, group)
        taken.append(book.mapped[region])
    assert taken == [2, 3, 3, 3, 3, 4]


def test_pages_are_mapped_before_the_step_that_writes_them():
    memory, book = make()
    group = admitted(memory, 4, 0)
    group.sequences[0].append(0)
    memory.append(group.sequences[0])  # the model has not run yet
    assert sum(book.mapped.values()) == 2


def test_exceeding_the_budget_is_reported_before_anything_is_mapped():
    memory, book = make(budget=3)
    group = admitted(memory, 12, 0)
    [seq] = group.sequences
    seq.append(0)
    assert not memory.can_append(group)
    with pytest.raises(OutOfBlocks, match="all 3 page groups are needed"):
        memory.append(seq)
    assert (sum(book.mapped.values()), memory.tables[0].num_tokens) == (3, 12)


def test_no_sequence_grows_beyond_its_region():
    memory, _ = make(budget=100)
    group = admitted(memory, 40, 0)
    group.sequences[0].append(0)
    with pytest.raises(AssertionError, match="would grow into another region"):
        memory.append(group.sequences[0])


def test_no_request_is_admitted_without_a_region():
    memory, _ = make(budget=100)
    for seq_id in range(4):
        admitted(memory, 1, seq_id)
    assert not memory.can_admit(group_of(1, 9), alone=False)


def test_admission_leaves_the_watermark_unless_the_group_is_alone():
    memory, _ = make(budget=4, watermark=2)
    group = group_of(12)
    assert not memory.can_admit(group, alone=False)
    assert memory.can_admit(group, alone=True)


def test_a_prompt_larger_than_the_budget_is_refused_with_what_it_needs():
    memory, _ = make(budget=3)
    assert memory.fits(group_of(12))
    assert not memory.fits(group_of(17))
    sentence = "needs 5 page groups of 8 bytes, but the pool has 3: raise num_blocks, "
    assert sentence + "shorten the prompt by 5 tokens" in memory.explain_rejection(group_of(17))


def test_a_pool_smaller_than_a_page_group_is_refused():
    with pytest.raises(
        InvalidOption, match=r"takes 8 bytes .a page of 4 in each of 2 buffers., but"
    ):
        FOUR_A_GROUP.groups_within(7)
    assert [FOUR_A_GROUP.groups_within(num_bytes) for num_bytes in (8, 15, 16)] == [1, 1, 2]


def test_nothing_is_swapped_and_no_prefix_is_kept():
    memory, _ = make()
    group = admitted(memory, 9, 0)
    assert not memory.can_swap_out(group)
    assert memory.num_cached_tokens(group.sequences[0]) == 0
    with pytest.raises(InvalidRequest, match="only paged memory keeps prefixes"):
        memory.pin(Sequence(1, range(4)))


# ---- deferred reclamation ------------------------------------------------------------------------


def test_pages_stay_when_a_sequence_ends_and_the_next_one_maps_none():
    memory, book = make()
    memory.free(admitted(memory, 12, 0).sequences[0])
    assert (memory.num_free, memory.num_mapped) == (4, 3)
    admitted(memory, 9, 1)
    assert book.num_calls == {"map": 3, "unmap": 0}


def test_a_new_sequence_takes_the_smallest_sufficient_mapping():
    memory, book = make(budget=20)
    lengths = (16, 4, 8, 12)  # 4, 1, 2 and 3 groups
    groups = [admitted(memory, length, i) for i, length in enumerate(lengths)]
    regions = [memory.tables[i].blocks[0] for i in range(4)]
    for group in groups:
        memory.free(group.sequences[0])
    admitted(memory, 7, 9)
    assert memory.tables[9].blocks == [regions[2]]
    assert book.num_calls == {"map": 10, "unmap": 0}


def test_where_no_mapping_is_sufficient_the_largest_is_taken():
    memory, book = make(budget=20)
    groups = [admitted(memory, length, i) for i, length in enumerate((4, 12, 8))]
    for group in groups:
        memory.free(group.sequences[0])
    admitted(memory, 20, 9)
    assert book.num_calls["map"] == 6 + 2


def test_surplus_is_unmapped_only_when_the_budget_is_short_and_only_as_much():
    memory, book = make(budget=5)
    one, two = admitted(memory, 8, 0), admitted(memory, 8, 1)
    memory.free(one.sequences[0])
    generate(memory, two, 4)  # a third group: the budget's last
    assert book.num_calls["unmap"] == 0
    generate(memory, two, 4)  # a fourth: taken from the region without an owner
    assert book.num_calls["unmap"] == 1
    assert sorted(book.mapped.values()) == [1, 4]


def test_surplus_of_a_region_in_use_goes_last():
    memory, book = make(budget=6)
    for length, seq_id in ((12, 0), (8, 1)):
        admitted(memory, length, seq_id)
    big, small = (memory.tables[seq_id].blocks[0] for seq_id in (0, 1))
    for seq_id in (0, 1):
        memory.free(Sequence(seq_id, [0]))
    two = admitted(memory, 5, 2)  # best fit: the small one
    one = admitted(memory, 4, 3)  # the big one, of which it needs a third
    assert (memory.tables[2].blocks, memory.tables[3].blocks) == ([small], [big])
    generate(memory, two, 11)  # 16 tokens: 2 groups more, 1 of them from the surplus
    assert book.mapped == {big: 2, small: 4}
    generate(memory, one, 4)
    assert memory.num_mapped == 6


def test_usage_counts_surplus_as_free_and_adds_up_to_the_budget():
    memory, _ = make(budget=10)
    admitted(memory, 6, 0)
    memory.free(admitted(memory, 12, 1).sequences[0])
    usage = memory.usage()
    assert (usage.used, usage.internal, usage.free) == (6, 2, 32)
    assert (usage.reserved, usage.external, usage.total) == (0, 0, 40)


# ---- forks ---------------------------------------------------------------------------------------


def test_a_fork_maps_nothing_and_its_first_write_copies_all_of_it():
    memory, _ = make()
    group = admitted(memory, 6, 0)
    forked(memory, group, 1)
    forked(memory, group, 2)
    [region] = memory.tables[0].blocks
    assert (memory.ref_count(region), memory.num_mapped, memory.usage().used) == (3, 2, 6)
    pairs = generate(memory, group)
    regions = [memory.tables[i].blocks[0] for i in range(3)]
    assert pairs == [(region, regions[0]), (region, regions[1])]
    assert regions[2] == region  # the last to write keeps it
    assert memory.num_mapped == 6
    assert generate(memory, group) == []


def test_a_group_without_regions_or_pages_for_its_forks_cannot_append():
    for budget, seats_taken in ((5, 0), (10, 2)):
        memory, _ = make(budget)
        for i in range(seats_taken):
            admitted(memory, 1, 10 + i)
        group = admitted(memory, 6, 0)
        forked(memory, group, 1)
        forked(memory, group, 2)
        for seq in group.sequences:
            seq.append(0)
        assert not memory.can_append(group)
        memory.free(group.sequences.pop())  # two of them have room
        assert memory.can_append(group)


def test_a_child_that_has_computed_nothing_gets_a_region_of_its_own():
    memory, _ = make()
    group = admitted(memory, 6, 0)
    child = Sequence(1, range(5))
    memory.fork(group.sequences[0], child)
    group.sequences.append(child)
    assert memory.tables[1].blocks == []
    assert memory.can_append(group)
    assert memory.append(child) == []
    assert memory.tables[1].blocks != memory.tables[0].blocks


# ---- any calls in any order ----------------------------------------------------------------------


class ErasingPages(Book):
    """Plays what pages do to the tensors: memory that comes is empty, memory that goes is lost."""

    def __init__(self, layout: RegionLayout, pool: dict[int, list]):
        super().__init__()
        self.layout = layout
        self.pool = pool

    def has(self, region: int, position: int) -> bool:
        return self.layout.groups_for(position + 1) <= self.mapped.get(region, 0)

    def map(self, region: int, groups: range) -> None:
        super().map(region, groups)
        self._erase(region, groups)

    def unmap(self, region: int, groups: range) -> None:
        super().unmap(region, groups)
        self._erase(region, groups)

    def _erase(self, region: int, groups: range) -> None:
        size, page = self.layout.token_bytes, self.layout.page_bytes
        first, end = groups.start * page // size, -(-groups.stop * page // size)
        for position in range(first, min(end, self.layout.region_len)):  # also those cut in two
            self.pool[region][position] = None


class VirtualInAnyOrder(AnyOrder):
    """The same calls as of paged memory, over regions."""

    manager = VirtualMemory
    pin = None  # only paged memory keeps prefixes

    @initialize(
        num_regions=st.integers(1, 6),
        budget=st.integers(1, 16),
        token_bytes=st.integers(1, 4),
        page_bytes=st.sampled_from([4, 6]),
    )
    def build(self, num_regions, budget, token_bytes, page_bytes) -> None:
        self.layout = RegionLayout(2, num_regions, 96, token_bytes, page_bytes)
        self.block_size = self.layout.region_len
        self.pool = {region: [None] * self.block_size for region in range(num_regions)}
        self.pages = ErasingPages(self.layout, self.pool)
        self.memory = CheckedMemory(self.manager(self.layout, budget, self.pages))
        self.swap_pool: dict[int, list] = {}
        self.groups: list[SequenceGroup] = []
        self.pinned: list[Sequence] = []
        self.next_id = 0

    def place(self, seq: Sequence, position: int) -> tuple[int, int]:
        region, offset = super().place(seq, position)
        assert self.pages.has(region, offset), "a page without physical memory was touched"
        return region, offset

    def copy_blocks(self, pairs, source, target) -> None:
        for old, new in pairs:
            for position in range(self.block_size):
                if self.pages.has(old, position) and self.pages.has(new, position):
                    target[new][position] = source[old][position]

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def fork_again(self, data) -> None:
        """As after a preemption: a child that has its tokens, and nothing computed."""
        group = data.draw(st.sampled_from(self.groups))
        if len(group.sequences) < 4:
            child = group.sequences[0].fork(self.new_id())
            child.forget_computed()
            group.sequences.append(child)
            self.memory.fork(group.sequences[0], child)
            self.append(group, data)

    @invariant()
    def usage_adds_up(self) -> None:
        if hasattr(self, "memory"):
            memory, usage = self.memory, self.memory.usage()
            assert usage.total == self.layout.tokens_in(memory.budget)
            assert sum(self.pages.mapped.values()) == memory.num_mapped <= memory.budget
            assert min(usage.used, usage.internal, usage.free) >= 0

    def teardown(self) -> None:
        if not hasattr(self, "memory"):
            return
        for group in self.groups.copy():
            self.give_up(group)
        assert self.memory.num_free == self.memory.num_blocks
        # A sequence that needs all page groups gets all of them.
        longest = min(self.layout.tokens_in(self.memory.budget), self.layout.region_len)
        if longest:
            admit(self.memory, SequenceGroup("all", [Sequence(0, [9] * longest)]))


TestVirtualInAnyOrder = VirtualInAnyOrder.TestCase
TestVirtualInAnyOrder.settings = settings(max_examples=examples(75, full=200))


class MapsOneGroupTooFew(VirtualMemory):
    def _grow(self, number, growth):
        super()._grow(number, growth - 1)


class ForgetsTheCopy(VirtualMemory):
    def append(self, seq):
        super().append(seq)
        return []


class CopiesTheWrongWay(VirtualMemory):
    def append(self, seq):
        return [(target, source) for source, target in super().append(seq)]


class SharesForGood(VirtualMemory):
    def append(self, seq):
        table = self._tables[seq.seq_id]
        if not table.blocks:
            return super().append(seq)
        region = self._regions[table.blocks[0]]
        self._grow(table.blocks[0], max(0, self.layout.groups_for(seq.num_tokens) - region.needed))
        table.num_tokens = seq.num_tokens
        return []


class TakesWhatIsNeeded(VirtualMemory):
    def _reclaim(self, num_groups):
        for region in self._regions:
            region.needed, region.true = 0, region.needed
        super()._reclaim(num_groups)
        for region in self._regions:
            region.needed = region.true


class IgnoresTheBudget(VirtualMemory):
    def _reclaim(self, num_groups):
        pass


class NeverGivesUpSurplus(VirtualMemory):
    def can_append(self, group):
        return super().can_append(group) and self.num_mapped < self.budget


class ForgetsThatNobodyNeedsIt(VirtualMemory):
    def _leave(self, table):
        before = self._num_needed
        super()._leave(table)
        self._num_needed = before


class KeepsTheRegion(VirtualMemory):
    def free(self, seq):
        blocks = list(self._tables[seq.seq_id].blocks)
        super().free(seq)
        self._inactive.difference_update(blocks[-1:])


class CountsASharedRegionOnce(VirtualMemory):
    def can_append(self, group):
        first = SequenceGroup("", group.sequences[:1])
        return super().can_append(first)


class ForgetsToCountRegions(VirtualMemory):
    def can_append(self, group):
        inactive, self._inactive = self._inactive, set(range(99))
        answer = super().can_append(group)
        self._inactive = inactive
        return answer


class FitsEverything(VirtualMemory):
    def fits(self, group):
        return True


def a_fork_reads_what_its_parent_has_written(manager: type[VirtualMemory]) -> None:
    machine = type("Story", (VirtualInAnyOrder,), {"manager": manager})()
    machine.build(num_regions=4, budget=16, token_bytes=1, page_bytes=4)
    machine.admit(tokens=[0, 1, 1], salt=None, reads=1)
    [group] = machine.groups
    machine.compute_group(group)
    parent = group.sequences[0]
    group.sequences.append(child := parent.fork(machine.new_id()))
    machine.memory.fork(parent, child)
    for _ in range(2):
        machine.append(group, SimpleNamespace(draw=lambda _: 1))
        machine.every_sequence_reads_its_own_tokens()
        machine.compute_group(group)


@pytest.mark.parametrize("fault", [ForgetsTheCopy, CopiesTheWrongWay])
def test_a_rare_fault_is_caught_by_a_scripted_scenario(fault):
    """A random search takes long to find it."""
    a_fork_reads_what_its_parent_has_written(VirtualMemory)
    with pytest.raises((CheckFailed, AssertionError)):
        a_fork_reads_what_its_parent_has_written(fault)


@pytest.mark.parametrize(
    "fault",
    [
        MapsOneGroupTooFew, SharesForGood, TakesWhatIsNeeded,
        IgnoresTheBudget, NeverGivesUpSurplus, ForgetsThatNobodyNeedsIt, KeepsTheRegion,
        CountsASharedRegionOnce, ForgetsToCountRegions, FitsEverything,
    ],
)  # fmt: skip
def test_a_deliberate_fault_is_caught(fault):
    machine = type(fault.__name__, (VirtualInAnyOrder,), {"manager": fault})
    quick = settings(
        max_examples=1500, phases=[Phase.generate], derandomize=True, deadline=None, database=None
    )
    with pytest.raises((CheckFailed, AssertionError, OutOfBlocks, LookupError)):
        run_state_machine_as_test(machine, settings=quick)
