"""The baselines of paging: a buddy allocator, reservations on it, and models served from them."""

import random
from itertools import count, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged.cli.main import app
from minipaged.engine.parts import Parts
from minipaged.errors import CheckFailed, DoubleFree, InvalidOption, InvalidRequest, PromptTooLong
from minipaged.evaluation.testing.admission import admit
from minipaged.llm import LLM
from minipaged.memory import CheckedMemory
from minipaged.memory.baselines.buddy import BuddyAllocator
from minipaged.memory.baselines.contiguous import CONTIGUOUS, ContiguousMemory
from minipaged.sampling import BeamSearchParams, SamplingParams
from minipaged.sequence import Sequence, SequenceGroup

# ---- the buddy allocator -------------------------------------------------------------------------


def test_a_pool_that_is_no_power_of_two_is_laid_out_in_ever_shorter_regions():
    regions = BuddyAllocator(983, 128)
    starts = [regions.allocate(128).start for _ in range(7)]
    assert sorted(starts) == [*range(0, 896, 128)]
    assert regions.allocate(128) is None
    assert [len(regions.allocate(size)) for size in (64, 16, 4, 2, 1)] == [64, 16, 4, 2, 1]
    assert regions.num_free == 0


def test_a_region_comes_from_the_smallest_piece_that_is_large_enough():
    regions = BuddyAllocator(24, 16)
    assert regions.allocate(3) == range(16, 20)  # from the 8 at the end, not from the 16
    assert regions.allocate(9) == range(16)


def test_free_halves_are_merged():
    regions = BuddyAllocator(16, 16)
    pieces = [regions.allocate(1) for _ in range(16)]
    assert regions.allocate(1) is None
    for piece in pieces:
        regions.free(piece)
    assert regions.allocate(16) == range(16)


def test_a_region_without_an_owner_cannot_be_freed():
    regions = BuddyAllocator(16, 16)
    region = regions.allocate(4)
    regions.free(region)
    with pytest.raises(DoubleFree, match="no owner"):
        regions.free(region)


@pytest.mark.parametrize(("num_blocks", "longest"), [(0, 4), (8, 3), (8, 0)])
def test_an_invalid_pool_is_refused(num_blocks, longest):
    with pytest.raises(InvalidOption, match="power of two"):
        BuddyAllocator(num_blocks, longest)


def play(allocator, num_blocks: int, longest: int, seed: int) -> None:
    """Any calls in any order, compared with a set of owned blocks."""
    draw = random.Random(seed)
    owned: list[range] = []
    for _ in range(200):
        if owned and draw.random() < 0.5:
            allocator.free(owned.pop(draw.randrange(len(owned))))
        else:
            size = draw.randint(1, longest)
            could = allocator.num_free_regions(size)
            region = allocator.allocate(size)
            assert (region is None) == (could == 0), "num_free_regions and allocate disagree"
            if region is not None:
                assert size <= len(region) < 2 * size, "a region is rounded up to a power of two"
                assert region.start % len(region) == 0, "a region begins at a multiple of its size"
                assert region.stop <= num_blocks
                owned.append(region)
        blocks = [block for region in owned for block in region]
        assert len(blocks) == len(set(blocks)), "two regions overlap"
        assert allocator.num_free == num_blocks - len(blocks)
    for region in owned:
        allocator.free(region)
    for size in range(1, longest + 1):
        free = allocator.num_free_regions(size)
        assert free == allocator.max_regions(size), "halves were not joined"


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 100), st.sampled_from([1, 2, 4, 8, 16]), st.integers(0, 10**6))
def test_regions_never_overlap_and_all_come_back(num_blocks, longest, seed):
    play(BuddyAllocator(num_blocks, longest), num_blocks, longest, seed)


class NeverJoins(BuddyAllocator):
    def free(self, region):
        self._owned.remove(region)
        self.num_free += len(region)
        self._free[len(region)][region.start] = None


class JoinsStrangers(BuddyAllocator):
    def free(self, region):
        super().free(region)
        for size in list(self._free):
            starts = sorted(self._free[size])
            for a, b in pairwise(starts):
                if b == a + size and 2 * size <= self._longest and a % (2 * size):
                    del self._free[size][a], self._free[size][b]
                    self._free[2 * size][a] = None  # neighbours, but no halves of one region
                    return


class KeepsNoUpperHalf(BuddyAllocator):
    def allocate(self, num_blocks):
        region = super().allocate(num_blocks)
        if region is not None and (rest := self._free.get(len(region))) and region.stop in rest:
            del rest[region.stop]
        return region


@pytest.mark.parametrize("fault", [NeverJoins, JoinsStrangers, KeepsNoUpperHalf])
def test_a_fault_in_the_allocator_is_caught(fault):
    def all_seeds():
        for seed in range(50):
            play(fault(21, 8), 21, 8, seed)

    with pytest.raises((AssertionError, KeyError, DoubleFree)):
        all_seeds()


# ---- reservations --------------------------------------------------------------------------------


def group_of(prompt_len: int, output_len: int | None, width: int = 1, seq_id: int = 0):
    seq = Sequence(seq_id, range(prompt_len), max_output_len=output_len)
    return SequenceGroup(f"request {seq_id}", [seq], width=width)


@pytest.mark.parametrize(
    ("reserve", "needed", "kept"),
    # A prompt of 20 and an output of 25 need 45 slots; blocks of 8; at most 128 tokens.
    [("oracle", 45, 45), ("pow2", 45, 20 + 32), ("max", 45, 128)],
)
def test_every_baseline_reserves_what_it_expects(reserve, needed, kept):
    memory = ContiguousMemory(32, 8, reserve, longest=128)
    admit(memory, group_of(20, 25))
    usage = memory.usage()
    region = 1 << (-(-kept // 8) - 1).bit_length()
    assert (usage.used, usage.reserved) == (20, needed - 20)
    assert usage.internal == kept - needed
    assert usage.external == region * 8 - kept
    assert usage.free == (32 - region) * 8
    assert usage.total == 32 * 8


def test_a_request_without_a_limit_reserves_all_of_the_context():
    memory = ContiguousMemory(32, 8, "oracle", longest=128)
    admit(memory, group_of(20, None))
    assert memory.usage().reserved == 108


def test_a_reservation_is_never_longer_than_the_context():
    memory = ContiguousMemory(32, 8, "pow2", longest=100)
    admit(memory, group_of(60, 35))  # 60 + 64 would be 124
    assert memory.usage().internal == 100 - 95


def test_no_request_is_admitted_that_might_not_fit():
    memory = ContiguousMemory(32, 8, "max", longest=128)
    first, second, third = (group_of(4, 4, seq_id=i) for i in range(3))
    for group in (first, second):
        assert memory.can_admit(group, alone=False)
        admit(memory, group)
    assert not memory.can_admit(third, alone=True)
    memory.free(first.sequences[0])
    assert memory.can_admit(third, alone=False)


def test_several_samples_are_reserved_together_or_not_at_all():
    memory = ContiguousMemory(32, 8, "oracle", longest=128)
    assert memory.can_admit(group_of(20, 12, width=8), alone=True)  # 8 regions of 4
    assert not memory.can_admit(group_of(20, 12, width=9), alone=True)
    assert not memory.fits(group_of(20, 12, width=9))
    why = memory.explain_rejection(group_of(20, 12, width=9))
    assert "9 contiguous regions of 4 blocks" in why
    assert "has room for 8" in why


def test_a_static_batch_admits_no_request_until_all_of_it_has_ended():
    memory = ContiguousMemory(32, 8, "max", longest=64, joins=False)
    first, second, late = (group_of(4, 8, seq_id=i) for i in range(3))
    for group in (first, second):
        assert memory.can_admit(group, alone=False)
        admit(memory, group)
    for group in (first, second):
        group.sequences[0].append(7)
        memory.append(group.sequences[0])
    assert not memory.can_admit(late, alone=False)
    wasted = memory.usage().internal
    memory.free(first.sequences[0])
    assert memory.num_free == 16, "its region is kept for the batch"
    assert not memory.can_admit(late, alone=False)
    assert memory.usage().internal == wasted + 12, "its tokens and those to come are waste now"
    assert memory.usage().total == 32 * 8
    memory.free(second.sequences[0])
    assert memory.num_free == 32
    assert memory.can_admit(late, alone=True)


# ---- reservations under any calls, against a model of the tensors --------------------------------


def serve_at_random(memory_class, seed: int) -> None:
    """Groups come, fork, lose sequences, grow and end; every slot must hold its own token."""
    draw = random.Random(seed)
    size, longest = draw.choice([1, 2, 4]), 16
    inner = memory_class(
        draw.randint(16, 64), size, draw.choice(["max", "pow2", "oracle"]), longest
    )
    memory = CheckedMemory(inner)
    slots: dict[int, tuple[int, ...]] = {}  # what was written: all tokens up to that place
    ids, groups = count(), []

    def write(seq: Sequence) -> None:
        for source, target in memory.append(seq):
            for offset in range(size):
                slots[target * size + offset] = slots.get(source * size + offset, ())
        table = memory.tables[seq.seq_id]
        for place in range(seq.num_computed_tokens, seq.num_tokens):
            slots[table.slot(place)] = tuple(seq.token_ids[: place + 1])
        seq.num_computed_tokens = seq.num_tokens
        for place in range(seq.num_tokens):
            assert slots[table.slot(place)] == tuple(seq.token_ids[: place + 1]), "not its own"

    for _ in range(60):
        if draw.random() < 0.3:
            prompt = draw.randint(1, 8)
            seq = Sequence(next(ids), (draw.randrange(9) for _ in range(prompt)), max_output_len=8)
            group = SequenceGroup("g", [seq], width=draw.randint(1, 4))
            if memory.fits(group) and memory.can_admit(group, alone=False):
                admit(memory, group)
                write(seq)
                groups.append(group)
            continue
        if not groups:
            continue
        group = draw.choice(groups)
        beams = list(group.sequences)
        parents = [draw.choice(beams) for _ in range(group.width)]
        for i, parent in enumerate(parents):
            if parent in parents[:i]:
                child = parent.fork(next(ids))
                group.sequences.append(child)
                memory.fork(parent, child)
        for beam in beams:
            if beam not in parents:
                group.sequences.remove(beam)
                memory.free(beam)
        if len(group.sequences) > 1 and draw.random() < 0.2:  # its first token was its last
            memory.free(group.sequences.pop(draw.randrange(len(group.sequences))))
            group.width = len(group.sequences)  # from now on, that many go on
        for seq in group.sequences:
            seq.append(draw.randrange(9))
        for seq in group.sequences:
            write(seq)
        usage = inner.usage()
        assert usage.total == inner.num_blocks * size
        assert min(usage.used, usage.reserved, usage.internal, usage.external, usage.free) >= 0
        if group.sequences[0].num_output_tokens == 8 or draw.random() < 0.1:
            groups.remove(group)
            for seq in group.sequences:
                memory.free(seq)
    for group in groups:
        for seq in group.sequences:
            memory.free(seq)
    assert memory.num_free == memory.num_blocks, "a region was lost"


@pytest.mark.parametrize("seed", range(40))
def test_every_sequence_reads_its_own_tokens(seed):
    serve_at_random(ContiguousMemory, seed)


class NeverCopies(ContiguousMemory):
    def append(self, seq):
        super().append(seq)
        return []


class CopiesHalf(ContiguousMemory):
    def append(self, seq):
        pairs = super().append(seq)
        return pairs[: len(pairs) // 2]


class SharesForEver(ContiguousMemory):
    def append(self, seq):
        self._tables[seq.seq_id].num_tokens = seq.num_tokens
        return []


class LosesSpareRegions(ContiguousMemory):
    def free(self, seq):
        reservation = self._reservations[seq.seq_id]
        super().free(seq)
        reservation.spare.clear()


class FreesTheRegionOfOthers(ContiguousMemory):
    def free(self, seq):
        region = self._region_of(seq)
        self._reservations[seq.seq_id].owners[region] = {seq.seq_id}
        super().free(seq)


@pytest.mark.parametrize(
    "fault", [NeverCopies, CopiesHalf, SharesForEver, LosesSpareRegions, FreesTheRegionOfOthers]
)
def test_a_fault_in_the_reservations_is_caught(fault):
    def all_seeds():
        for seed in range(40):
            serve_at_random(fault, seed)

    with pytest.raises((AssertionError, CheckFailed, KeyError, IndexError, StopIteration)):
        all_seeds()


# ---- served for real -----------------------------------------------------------------------------

PROMPTS = ["Theo the frog", "Mia the cat put the", "Once there was a", "Where is the key of Theo?"]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=24),
    SamplingParams(n=3, seed=5, max_tokens=10),
    BeamSearchParams(3, max_tokens=12),
    SamplingParams(temperature=0.7, seed=1, max_tokens=6),
]


def answers(llm: LLM) -> list[list[list[int]]]:
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    return [[o.token_ids for o in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def paged_answers() -> list[list[list[int]]]:
    return answers(LLM())


@pytest.mark.parametrize("memory", CONTIGUOUS)
@pytest.mark.parametrize("num_blocks", [56, 300])
def test_a_baseline_generates_the_tokens_of_paging(memory, num_blocks, paged_answers):
    """Also where it must serve one after the other, and where a context is no power of two."""
    parts = Parts().checked()
    llm = LLM(memory=memory, max_model_len=200, num_blocks=num_blocks, parts=parts)
    assert answers(llm) == paged_answers
    memory = llm.engine.scheduler.memory
    assert memory.num_free == num_blocks
    assert memory.usage().free == num_blocks * 16


def test_a_request_that_never_fits_is_told_what_to_change():
    llm = LLM(memory="contiguous-max", max_model_len=1024, num_blocks=40)
    with pytest.raises(PromptTooLong, match=r"64 blocks .* raise num_blocks, or lower max_model"):
        llm.generate("Theo", SamplingParams(max_tokens=4), use_tqdm=False)
    fitting = LLM(memory="contiguous-oracle", max_model_len=1024, num_blocks=40)
    [output] = fitting.generate("Theo", SamplingParams(max_tokens=4), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory": "contiguous"}, "choose one of"),
        ({"memory": "contiguous-max", "preemption": "swap"}, "does not swap: leave out preemption"),
        (
            {"memory": "static", "parts": Parts(memory=ContiguousMemory)},
            "part memory would never be called",
        ),
    ],
)
def test_options_that_exclude_each_other_are_refused(options, words):
    with pytest.raises(InvalidOption, match=words):
        LLM(**options)


def test_a_baseline_has_no_prefix_cache():
    llm = LLM(memory="contiguous-max", num_blocks=128)
    with pytest.raises(InvalidRequest, match="enable_prefix_caching"):
        llm.cache_prefix([1] * 40)


def test_paging_is_the_default():
    assert not LLM().engine.scheduler.memory.reserves


def test_the_block_map_shows_what_is_reserved_and_empty(capsys):
    shown = ["demo", "--memory", "contiguous-max", "--show-blocks"]
    app(shown, standalone_mode=False)
    printed = capsys.readouterr().out
    assert "8 of 8 answers are right" in printed
    assert "BBb____" in printed
