"""Lab 6: what a prefix cache finds, who owns cached blocks, and which block is evicted.

No test depends on block numbers or on how the cache looks up a block.
"""

import pytest

from minipaged.errors import DoubleFree, OutOfBlocks
from minipaged.memory import BlockAllocator, BlockTable
from minipaged.sequence import Sequence

from newcomers import Users, serve_in_any_order
from serving import expected, generate, prompts, serves_what_the_library_serves

essential = pytest.mark.essential


def task(number: int) -> pytest.MarkDecorator:
    return pytest.mark.lab(number=6, task=number)


@pytest.fixture
def build(part):
    def new(num_blocks: int = 32, **options) -> Users:
        return Users(part("prefix_cache")(BlockAllocator(num_blocks), 4, **options))

    return new


@pytest.fixture
def users(build) -> Users:
    return build()


# ---- task 1: cache written blocks ----------------------------------------------------------------


@task(1)
def test_a_key_consists_of_the_previous_block_and_the_tokens(users):
    first, second = users.caches([1, 2, 3, 4, 5, 6, 7, 8]).blocks
    assert dict(users.cache.cached) == {
        first: (None, (1, 2, 3, 4)),
        second: (first, (5, 6, 7, 8)),
    }


@task(1)
@pytest.mark.parametrize(("length", "num_full"), [(3, 0), (4, 1), (7, 1), (8, 2), (9, 2)])
def test_only_full_blocks_are_cached(users, length, num_full):
    seq, table = users.writes(range(length))
    assert users.cache.cache_blocks(seq, table) == table.blocks[:num_full]
    assert list(users.cache.cached) == table.blocks[:num_full]


@task(1)
@essential("a block may be cached only once its keys and values are written (rule 2).")
@pytest.mark.parametrize(("computed", "num_written"), [(0, 0), (3, 0), (4, 1), (11, 2)])
def test_only_computed_blocks_are_cached(users, computed, num_written):
    table = users.caches(range(12), num_computed=computed)
    assert list(users.cache.cached) == table.blocks[:num_written]


@task(1)
def test_cached_blocks_are_counted_in_the_table_and_cached_once(users):
    seq, table = users.writes(range(12), num_computed=8)
    before = users.cache.cache_blocks(seq, table)
    assert (before, table.num_cached_blocks) == (table.blocks[:2], 2)
    seq.mark_computed(4)
    assert users.cache.cache_blocks(seq, table) == table.blocks[2:]
    assert users.cache.cache_blocks(seq, table) == []
    assert table.num_cached_blocks == 3


@task(1)
def test_equal_tokens_after_another_prefix_are_another_block(users):
    tables = [users.caches([start, 0, 0, 0, 5, 6, 7, 8]) for start in (1, 2)]
    blocks = [block for table in tables for block in table.blocks]
    assert sorted(users.cache.cached) == sorted(set(blocks))
    assert len(set(blocks)) == 4, "keys and values depend on all tokens before them"


@task(1)
def test_equal_tokens_with_another_salt_are_another_block(users):
    tables = [users.caches([1, 2, 3, 4], cache_salt=salt) for salt in (None, "ann", "ben")]
    assert sorted(users.cache.cached) == sorted(table.blocks[0] for table in tables)


@task(1)
def test_a_disabled_cache_caches_nothing(build):
    users = build(enabled=False)
    seq, table = users.writes(range(8))
    assert users.cache.cache_blocks(seq, table) == []
    assert not users.cache.cached


# ---- task 2: find the longest prefix -------------------------------------------------------------


@task(2)
def test_the_longest_cached_prefix_is_found_in_order(users):
    blocks = users.caches(range(12)).blocks
    assert users.finds(range(12)) == blocks
    assert users.finds(range(20)) == blocks
    assert users.finds([*range(8), 99, 9, 10, 11]) == blocks[:2]
    assert users.finds([99, *range(1, 12)]) == []
    assert users.finds(range(4, 12)) == [], "no sequence has this prefix"


@task(2)
@essential("a prompt may find a block only if it is equal up to the block's end (rule 1).")
def test_no_prompt_finds_a_block_of_another_prefix(users):
    start, end = users.caches([1, 0, 0, 0, 5, 6, 7, 8]).blocks
    [other] = users.caches([2, 0, 0, 0], cache_salt="ann").blocks
    for tokens in ([2, 0, 0, 0, 5, 6, 7, 8], [9, 9, 9, 9, 1, 0, 0, 0], [5, 6, 7, 8]):
        assert users.finds(tokens) == [], "keys and values depend on all tokens before them"
    assert other not in users.finds([2, 0, 0, 0], cache_salt="ben")
    assert end not in users.finds([1, 0, 0, 0, 5, 6, 7, 9])
    assert start not in users.finds([1, 0, 0, 9])


@task(2)
def test_a_block_is_found_only_after_its_own_prefix(users):
    one = users.caches([1, 0, 0, 0, 5, 6, 7, 8]).blocks
    other = users.caches([2, 0, 0, 0]).blocks
    assert users.finds([2, 0, 0, 0, 5, 6, 7, 8]) == other
    assert users.finds([1, 0, 0, 0, 5, 6, 7, 8]) == one
    assert users.finds([9, 9, 9, 9, 2, 0, 0, 0]) == [], "nothing is found after a gap"


@task(2)
def test_a_salt_finds_only_its_own_blocks(users):
    ann = users.caches(range(8), cache_salt="ann").blocks
    assert users.finds(range(8), cache_salt="ann") == ann
    assert users.finds(range(8), cache_salt="ben") == []
    assert users.finds(range(8)) == []


@task(2)
def test_a_sequence_that_does_not_read_the_cache_finds_nothing(users):
    users.caches(range(8))
    assert users.finds(range(8), reads_cache=False) == []


@task(2)
def test_finding_takes_no_blocks(users):
    users.caches(range(8))
    free, cached = users.cache.num_free, dict(users.cache.cached)
    found = users.finds(range(8))
    found.append(99)  # the caller's own list
    assert (users.cache.num_free, dict(users.cache.cached)) == (free, cached)
    assert users.finds(range(8)) == found[:2]


# ---- task 3: count owners ------------------------------------------------------------------------


@task(3)
@essential("`ref_count` must report the owners other than the cache (rule 3).")
def test_the_cache_itself_is_not_counted(users):
    cached, other = users.caches(range(6)).blocks
    assert (users.cache.ref_count(cached), users.cache.ref_count(other)) == (1, 1)


@task(3)
def test_cached_blocks_are_shared(users):
    table = users.caches(range(10))
    again = users.cache.share_cached(users.sequence(range(10)))
    assert again.blocks == table.blocks[:2]
    assert (again.num_tokens, again.num_cached_blocks, again.block_size) == (8, 2, 4)
    assert [users.cache.ref_count(block) for block in table.blocks] == [2, 2, 1]


@task(3)
def test_without_cached_blocks_the_table_is_empty_and_of_the_given_class(build):
    class MyTable(BlockTable):
        pass

    table = build(block_table=MyTable).cache.share_cached(Sequence(1, range(8)))
    assert isinstance(table, MyTable)
    assert (table.blocks, table.num_tokens) == ([], 0)


@task(3)
def test_a_cached_block_freed_by_its_last_owner_is_idle_and_is_found(build):
    users = build(4)
    table = users.caches(range(10))
    users.frees(table)
    assert users.cache.num_free == 4
    assert [users.cache.ref_count(block) for block in table.blocks] == [0, 0, 0]
    assert users.finds(range(10)) == table.blocks[:2]
    assert sorted(users.cache.idle) == sorted(table.blocks[:2]), "the third was never full"


@task(3)
def test_a_block_with_one_owner_left_is_not_idle(users):
    table = users.caches(range(4))
    users.cache.share_cached(users.sequence(range(4)))
    users.frees(table)
    assert users.cache.ref_count(table.blocks[0]) == 1
    assert not users.cache.idle
    assert users.cache.num_free == 31


@task(3)
def test_an_idle_block_that_is_shared_is_no_longer_idle(users):
    users.frees(users.caches(range(8)))
    table = users.cache.share_cached(users.sequence(range(5)))
    assert users.cache.ref_count(table.blocks[0]) == 1
    assert table.blocks[0] not in users.cache.idle
    assert users.cache.num_free == 31


@task(3)
def test_an_idle_block_cannot_be_freed(users):
    table = users.caches(range(4))
    users.frees(table)
    with pytest.raises(DoubleFree):
        users.frees(table)
    assert users.cache.num_free == 32
    assert users.finds(range(4)) == table.blocks


@task(3)
def test_of_two_equal_blocks_one_is_kept(users):
    seq, table = users.writes(range(10))
    first = users.caches(range(10)).blocks
    own_end = table.blocks[2]
    assert users.cache.cache_blocks(seq, table) == [], "both blocks were cached before"
    assert table.blocks == [*first[:2], own_end]
    assert table.num_cached_blocks == 2
    assert [users.cache.ref_count(block) for block in first[:2]] == [2, 2]
    assert users.cache.num_free == 32 - 4, "two full blocks that both use, and two ends"


# ---- task 4: evict -------------------------------------------------------------------------------


@task(4)
@essential("an evicted block will be overwritten and must not be found (rule 5).")
def test_an_evicted_block_is_not_found(build):
    users = build(2)
    users.frees(users.caches(range(8)))
    users.caches(range(100, 108))
    assert users.finds(range(8)) == [], "these blocks contain other tokens by now"
    assert len(users.finds(range(100, 108))) == 2
    assert len(users.cache.cached) == 2


@task(4)
def test_blocks_are_evicted_only_if_none_is_empty_children_first(build):
    users = build(5)
    table = users.caches(range(16))
    users.frees(table)
    for left in (4, 3, 2, 1, 0):  # the fifth block was still empty
        users.cache.allocate()
        assert users.finds(range(16)) == table.blocks[:left]


@task(4)
def test_the_least_recently_used_block_is_evicted_first(build):
    users = build(3)
    tables = [users.caches([number] * 4) for number in range(3)]
    for table in tables:
        users.frees(table)
    users.frees(users.cache.share_cached(users.sequence([0] * 4)))  # used again
    users.cache.allocate()
    assert [len(users.finds([number] * 4)) for number in range(3)] == [1, 0, 1]
    users.cache.allocate()
    assert [len(users.finds([number] * 4)) for number in range(3)] == [1, 0, 0]


@task(4)
def test_all_idle_blocks_can_be_allocated_and_no_others(build):
    users = build(6)
    used = users.caches(range(8))
    users.frees(users.caches(range(100, 116)))
    got = [users.cache.allocate() for _ in range(4)]
    assert sorted(got + used.blocks) == list(range(6))
    with pytest.raises(OutOfBlocks):
        users.cache.allocate()
    assert users.finds(range(8)) == used.blocks


@task(4)
@pytest.mark.parametrize("seed", range(4))
def test_in_any_order_a_found_block_has_the_right_content(part, seed):
    serve_in_any_order(part("prefix_cache"), seed)


# ---- task 5: serve a language model --------------------------------------------------------------


@task(5)
def test_the_model_generates_the_same_with_the_cache_of_the_library(observed):
    serves_what_the_library_serves(observed, num_blocks=16, preemption="swap")  # not enough for all


@task(5)
@pytest.mark.parametrize("num_blocks", [40, 200], ids=["a_small_pool", "an_ample_pool"])
def test_a_repeated_prompt_gives_the_same_tokens_with_fewer_computed(observed, num_blocks):
    from minipaged.sampling import SamplingParams

    asked = prompts(), 1, 20  # texts, samples, tokens
    with observed(num_blocks=num_blocks, block_size=4) as llm:
        for _ in range(2):
            assert generate(llm, *asked) == expected(*asked)
        again = prompts()[-1]
        once = SamplingParams(temperature=0.0, max_tokens=1)
        for _ in range(2):
            [output] = llm.generate([again], once, use_tqdm=False)
        num_tokens = len(output.prompt_token_ids)
        most = (num_tokens - 1) // 4 * 4 if num_tokens % 4 else num_tokens - 1
        assert output.num_cached_tokens == most, "not all written blocks were found"
        memory = llm.engine.scheduler.memory
        assert memory.num_free == num_blocks, "all requests have ended, but not all blocks are free"
