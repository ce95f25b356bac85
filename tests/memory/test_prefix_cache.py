"""Full blocks found again: by what, for how long, and which are evicted first."""

import pytest

from minipaged.errors import DoubleFree, OutOfBlocks
from minipaged.evaluation.testing.admission import admit
from minipaged.memory import BlockAllocator, BlockManager, CheckedAllocator, CheckedMemory
from minipaged.memory.prefix_cache import PrefixCache
from minipaged.sequence import Sequence, SequenceGroup

SAME_HASH = (0, 2**61 - 1)  # two different integers of equal hash in CPython


def build(num_blocks: int = 8, block_size: int = 4, **options) -> CheckedMemory:
    return CheckedMemory(
        BlockManager(
            num_blocks=num_blocks,
            block_size=block_size,
            allocator=lambda n: CheckedAllocator(BlockAllocator(n)),
            enable_prefix_caching=True,
            **options,
        )
    )


class Served:
    """Admits prompts and computes them at once."""

    def __init__(self, memory: CheckedMemory) -> None:
        self.memory = memory
        self.next_id = 0

    def admit(self, tokens, **options) -> Sequence:
        seq = Sequence(self.next_id, tokens, **options)
        self.next_id += 1
        admit(self.memory, SequenceGroup(str(seq.seq_id), [seq]))
        return seq

    def compute(self, seq: Sequence) -> Sequence:
        seq.mark_computed(seq.num_uncomputed_tokens)
        self.memory.cache_blocks(seq)
        return seq

    def serve(self, tokens, **options) -> Sequence:
        return self.compute(self.admit(tokens, **options))

    def num_cached_tokens(self, tokens, **options) -> int:
        return self.memory.num_cached_tokens(Sequence(-1, tokens, **options))


@pytest.fixture
def served() -> Served:
    return Served(build())


# ---- what is found -------------------------------------------------------------------------------


def test_the_full_blocks_of_a_shared_prefix_are_found(served):
    served.serve([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert served.num_cached_tokens([1, 2, 3, 4, 5, 6, 7, 8, 0, 0]) == 8
    assert served.num_cached_tokens([1, 2, 3, 4, 5, 6, 7, 0, 0, 0]) == 4
    assert served.num_cached_tokens([1, 2, 3, 0, 5, 6, 7, 8, 9]) == 0


def test_a_block_is_found_only_after_the_same_prefix(served):
    served.serve([1, 1, 1, 1, 5, 5, 5, 5])
    assert served.num_cached_tokens([2, 2, 2, 2, 5, 5, 5, 5, 9]) == 0
    assert served.num_cached_tokens([5, 5, 5, 5, 9]) == 0


def test_a_hash_collision_does_not_confuse_blocks(served):
    one, other = ([token] * 4 + [7] for token in SAME_HASH)
    assert hash(tuple(one)) == hash(tuple(other))
    served.serve(one)
    assert served.num_cached_tokens(one) == 4
    assert served.num_cached_tokens(other) == 0


def test_a_salt_keeps_equal_prompts_apart(served):
    tokens = [1, 2, 3, 4, 5]
    served.serve(tokens, cache_salt="mine")
    assert served.num_cached_tokens(tokens, cache_salt="mine") == 4
    assert served.num_cached_tokens(tokens, cache_salt="yours") == 0
    assert served.num_cached_tokens(tokens) == 0


def test_only_the_last_token_of_a_fully_cached_prompt_is_computed(served):
    served.memory.free(served.serve([1, 2, 3, 4, 5, 6, 7, 8]))
    seq = served.admit([1, 2, 3, 4, 5, 6, 7, 8])
    assert seq.num_computed_tokens == seq.num_cached_tokens == 7
    assert served.memory.num_free == 6


def test_a_fully_cached_prompt_copies_its_last_block_if_shared(served):
    first = served.serve([1, 2, 3, 4, 5, 6, 7, 8])
    again = Sequence(9, first.token_ids)
    [(source, copy)] = admit(served.memory, SequenceGroup("9", [again]))
    blocks = served.memory.tables[first.seq_id].blocks
    assert source == blocks[1]
    assert served.memory.tables[9].blocks == [blocks[0], copy]


def test_nothing_is_found_before_it_is_written(served):
    waits = served.admit([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert served.num_cached_tokens(waits.token_ids) == 0
    waits.mark_computed(6)
    served.memory.cache_blocks(waits)
    assert served.num_cached_tokens(waits.token_ids) == 4, "the second block is half written"


def test_generated_blocks_are_found_too(served):
    seq = served.serve([1, 2, 3])
    for token in (4, 5, 6, 7, 8):
        seq.append(token)
        served.memory.append(seq)
        served.compute(seq)
    assert served.num_cached_tokens([1, 2, 3, 4, 5, 6, 7, 8, 9]) == 8


def test_a_request_that_does_not_read_the_cache_still_fills_it(served):
    served.serve([1, 2, 3, 4, 5])
    assert served.admit([1, 2, 3, 4, 5], reads_cache=False).num_computed_tokens == 0
    served.serve([6, 7, 8, 9, 0], reads_cache=False)
    assert served.num_cached_tokens([6, 7, 8, 9, 0]) == 4


def test_a_disabled_cache_finds_nothing():
    memory = CheckedMemory(BlockManager(num_blocks=8, block_size=4))
    served = Served(memory)
    served.memory.free(served.serve([1, 2, 3, 4, 5]))
    assert served.num_cached_tokens([1, 2, 3, 4, 5]) == 0
    assert not memory.cached


def test_equal_blocks_computed_in_one_step_are_shared_afterwards(served):
    first, second = served.admit([1, 2, 3, 4, 5]), served.admit([1, 2, 3, 4, 5])
    assert served.memory.num_free == 4
    served.compute(first)
    served.compute(second)
    blocks, others = (served.memory.tables[s.seq_id].blocks for s in (first, second))
    assert blocks[0] == others[0]
    assert blocks[1] != others[1]
    assert served.memory.num_free == 5


def test_blocks_after_a_deduplicated_block_are_found(served):
    first, second = served.admit([1, 2, 3, 4, 5]), served.admit([1, 2, 3, 4, 6, 7, 8, 9])
    served.compute(first)
    served.compute(second)
    assert served.num_cached_tokens([1, 2, 3, 4, 6, 7, 8, 9, 0]) == 8


# ---- the order of eviction -----------------------------------------------------------------------


def test_idle_blocks_count_as_free_and_are_evicted_when_none_is_empty(served):
    served.memory.free(served.serve(range(32)))
    assert served.memory.num_free == 8
    assert len(served.memory.cached) == 8
    served.serve(range(100, 132))
    assert served.num_cached_tokens(list(range(33))) == 0


def test_empty_blocks_are_taken_before_idle_ones(served):
    served.memory.free(served.serve(range(8)))
    served.memory.free(served.serve(range(100, 124)))
    assert served.num_cached_tokens(list(range(9))) == 8


def test_the_least_recently_used_block_is_evicted_first(served):
    for first in (0, 100, 200, 300):
        served.memory.free(served.serve(range(first, first + 8)))
    served.memory.free(served.serve(range(8)))  # used once more
    served.serve([9] * 8)
    prompts = [[*range(first, first + 8), 0] for first in (0, 100, 200, 300)]
    assert [served.num_cached_tokens(prompt) for prompt in prompts] == [8, 0, 8, 8]


def test_leaves_are_evicted_before_their_parents(served):
    served.memory.free(served.serve(range(32)))
    lengths = []
    for token in range(8):
        served.serve([1000 + token] * 4)
        lengths.append(served.num_cached_tokens(list(range(33))))
    assert lengths == [28, 24, 20, 16, 12, 8, 4, 0]


def test_a_branch_is_evicted_before_a_trunk_that_is_still_in_use(served):
    trunk = [1, 2, 3, 4]
    one, other = served.serve([*trunk, 5, 5, 5, 5]), served.serve([*trunk, 6, 6, 6, 6])
    served.memory.free(one)
    served.serve([9] * 20)
    assert served.memory.num_free == 1
    served.serve([8])
    assert served.num_cached_tokens([*trunk, 5, 5, 5, 5, 0]) == 4
    assert served.num_cached_tokens(other.token_ids) == 7


class NewestLeafFirst(PrefixCache):
    def evict_candidate(self) -> int:
        return next(block for block in reversed(self.idle) if self.is_leaf(block))


class ParentsFirst(PrefixCache):
    def evict_candidate(self) -> int:
        return next((b for b in self.idle if not self.is_leaf(b)), next(iter(self.idle)))


def test_another_policy_evicts_other_blocks():
    served = Served(build(num_blocks=2, prefix_cache=NewestLeafFirst))
    for tokens in ([1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]):
        served.memory.free(served.serve(tokens))
    assert [served.num_cached_tokens([n] * 4 + [0]) for n in (1, 2, 3)] == [4, 0, 4]


def test_a_policy_that_evicts_a_parent_before_its_children_is_refused():
    served = Served(build(num_blocks=2, prefix_cache=ParentsFirst))
    served.memory.free(served.serve([1, 2, 3, 4, 5, 6, 7, 8]))
    with pytest.raises(AssertionError, match="before its children"):
        served.serve([9, 9, 9, 9])


def test_a_found_block_cannot_be_evicted():
    memory = build(num_blocks=3)
    served = Served(memory)
    memory.free(served.serve(range(12)))
    assert not memory.can_admit(
        SequenceGroup("x", [Sequence(7, [*range(8), 99, 99, 99, 99, 99])]), alone=True
    ), "two are shared, and of the two that it needs besides only one is free"
    assert memory.can_admit(SequenceGroup("x", [Sequence(7, [*range(8), 99])]), alone=True)


def test_an_allocator_with_cached_blocks_keeps_the_allocator_contract():
    cache = PrefixCache(BlockAllocator(2), block_size=1)
    manager = BlockManager(num_blocks=0, block_size=1)
    manager._pool = cache
    seq = Sequence(0, [5])
    admit(manager, SequenceGroup("0", [seq]))
    seq.mark_computed(1)
    [block] = cache.cache_blocks(seq, manager.tables[0])
    assert cache.ref_count(block) == 1, "the cache itself is not counted"
    manager.free(seq)
    assert (cache.num_free, cache.ref_count(block)) == (2, 0)
    with pytest.raises(DoubleFree, match=f"block {block} has no owner"):
        cache.free(block)
    with pytest.raises(DoubleFree, match="has no owner, so it cannot be shared"):
        cache.share(1 - block)
    assert {cache.allocate(), cache.allocate()} == {0, 1}
    with pytest.raises(OutOfBlocks):
        cache.allocate()


# ---- preemption and prefixes that stay -----------------------------------------------------------


def test_blocks_that_are_still_cached_come_back_from_a_swap_without_a_copy():
    memory = build(num_swap_blocks=8)
    served = Served(memory)
    seq = served.serve(range(10))
    group = SequenceGroup("0", [seq])
    before = list(memory.tables[0].blocks)
    assert len(memory.swap_out(group)) == 3
    assert len(memory.swap_in(group)) == 1, "the last block was not full, so not known"
    assert memory.tables[0].blocks[:2] == before[:2]


def test_uncomputed_blocks_come_back_from_a_swap_into_new_blocks():
    """Another sequence has computed the same since; to share its blocks is to write to them."""
    memory = build(num_swap_blocks=8)
    served = Served(memory)
    swapped = SequenceGroup("0", [served.admit(range(10))])
    memory.swap_out(swapped)
    other = served.serve(range(10))
    memory.swap_in(swapped)
    blocks = set(memory.tables[0].blocks)
    assert not blocks & set(memory.tables[other.seq_id].blocks)
    assert memory.append(swapped.sequences[0]) == []


def test_a_pinned_prefix_stays_and_is_shared_until_it_is_freed(served):
    served.memory.free(served.serve(range(10)))
    prefix = Sequence(50, range(8))
    assert served.memory.pin(prefix) == 8
    assert served.memory.num_free == 6
    served.memory.free(served.serve(range(100, 124)))
    served.memory.free(served.serve(range(200, 224)))
    assert served.num_cached_tokens([*range(8), 99]) == 8
    served.memory.free(prefix)
    assert served.memory.num_free == 8
    served.serve(range(300, 332))
    assert served.num_cached_tokens([*range(8), 99]) == 0


def test_a_group_must_fit_into_the_unpinned_blocks(served):
    served.memory.free(served.serve(range(16)))
    served.memory.pin(Sequence(50, range(16)))
    assert not served.memory.fits(SequenceGroup("x", [Sequence(7, range(100, 117))]))
    assert served.memory.fits(SequenceGroup("x", [Sequence(7, range(100, 116))]))
    assert served.memory.fits(SequenceGroup("x", [Sequence(7, [*range(16), *range(100, 116)])]))
