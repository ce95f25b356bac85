"""Lab 2: the slot of a token, and when a sequence takes a block.

No test depends on which free block a sequence gets. Each block has one owner.
"""

import random

import pytest

from minipaged.evaluation.testing.admission import admit
from minipaged.memory import CheckedMemory
from minipaged.sequence import Sequence, SequenceGroup

from newcomers import Story
from serving import serves_what_the_library_serves

essential = pytest.mark.essential


def task(number: int) -> pytest.MarkDecorator:
    return pytest.mark.lab(number=2, task=number)


@pytest.fixture
def new_table(part):
    return part("block_table")


@pytest.fixture
def table(new_table):
    """The table in BlockTable's docstring: two full blocks, and two tokens in the third."""
    return new_table(4, [7, 1, 3], 10)


@pytest.fixture
def build(part):
    """A memory with blocks of 4, on the library's block tables."""
    return lambda num_blocks, **options: part("memory")(num_blocks, block_size=4, **options)


# ---- task 1: find a token's slot -----------------------------------------------------------------


@task(1)
def test_the_table_maps_a_position_to_its_slot(table):
    assert [table.slot(position) for position in (0, 3, 4, 7, 8, 9)] == [28, 31, 4, 7, 12, 13]


@task(1)
@essential("every token needs a slot of its own, in the block that the table lists (rule 2).")
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_every_token_has_a_slot_of_its_own_in_a_block_of_the_table(new_table, block_size):
    blocks = random.Random(0).sample(range(100), 9)
    num_tokens = 9 * block_size
    table = new_table(block_size, blocks, num_tokens)
    slots = [table.slot(position) for position in range(num_tokens)]
    assert len(set(slots)) == num_tokens, "two tokens in one slot"
    assert [slot // block_size for slot in slots[::block_size]] == blocks


@task(1)
@pytest.mark.parametrize("position", [-1, 10, 11, 12])
def test_a_position_without_a_token_has_no_slot(table, position):
    with pytest.raises((AssertionError, IndexError, ValueError)):
        table.slot(position)


@task(1)
def test_all_blocks_but_the_last_are_full(table, new_table):
    assert [table.filled(logical) for logical in range(3)] == [4, 4, 2]
    table = new_table(4, [7, 1], 8)
    assert [table.filled(logical) for logical in range(2)] == [4, 4]


# ---- task 2: map only the first tokens -----------------------------------------------------------


@task(2)
@pytest.mark.parametrize(
    ("num_tokens", "blocks"),
    [(0, []), (1, [7]), (4, [7]), (5, [7, 1]), (8, [7, 1]), (9, [7, 1, 3]), (10, [7, 1, 3])],
)
def test_a_prefix_has_the_blocks_of_its_tokens(table, num_tokens, blocks):
    beginning = table.beginning(num_tokens)
    assert beginning.blocks == blocks
    assert (beginning.num_tokens, beginning.block_size) == (num_tokens, 4)


@task(2)
@essential("a prefix must have its own list, because the two sequences grow separately.")
@pytest.mark.parametrize("num_tokens", [10, 8])
def test_a_table_and_its_prefix_have_separate_lists(table, num_tokens):
    beginning = table.beginning(num_tokens)
    before = list(beginning.blocks)
    beginning.blocks.append(5)
    assert table.blocks == [7, 1, 3], "a block added to the prefix is in the table's list"
    table.blocks.append(6)
    assert beginning.blocks == [*before, 5], "a block added to the table is in the prefix's list"


@task(2)
@pytest.mark.parametrize(
    ("cached", "num_tokens", "expected"),
    [(2, 10, 2), (2, 8, 2), (2, 7, 1), (2, 3, 0), (1, 8, 1), (0, 8, 0)],
)
def test_only_full_blocks_of_a_prefix_count_as_cached(new_table, cached, num_tokens, expected):
    table = new_table(4, [7, 1, 3], 10, num_cached_blocks=cached)
    assert table.beginning(num_tokens).num_cached_blocks == expected


# ---- task 3: take a block when it is needed ------------------------------------------------------


@task(3)
@pytest.mark.parametrize(
    ("length", "num_blocks"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3), (20, 5)]
)
def test_a_prompt_gets_the_blocks_that_its_tokens_need(build, length, num_blocks):
    story = Story(build(8))
    [seq] = story.comes(length).sequences
    got = len(story.table(seq).blocks)
    assert got == num_blocks, f"blocks of 4 for {length} tokens"
    assert story.memory.num_free == 8 - num_blocks


@task(3)
@essential("a block must be taken exactly when a token needs it (rule 1).")
def test_a_block_is_taken_when_the_last_is_full_and_not_before(build):
    story = Story(build(8))
    [seq] = story.comes(3).sequences
    num_blocks, first = {}, story.table(seq).blocks[0]
    for _ in range(6):
        story.grows(seq)
        assert story.table(seq).blocks[0] == first, "the first block must stay the same"
        num_blocks[seq.num_tokens] = len(story.table(seq).blocks)
    assert num_blocks == {4: 1, 5: 2, 6: 2, 7: 2, 8: 2, 9: 3}


@task(3)
def test_the_table_counts_the_tokens_with_a_slot(build):
    story = Story(build(8))
    [seq] = story.comes(3).sequences
    counts = [story.table(seq).num_tokens]
    for _ in range(3):
        story.grows(seq)
        counts.append(story.table(seq).num_tokens)
    assert counts == [3, 4, 5, 6]


@task(3)
def test_a_token_with_a_slot_gets_no_second_one(build):
    story = Story(build(8))
    [seq] = story.comes(10).sequences
    seq.mark_computed(5)  # a step may compute a part of a prompt
    story.memory.append(seq)
    story.memory.append(seq)
    assert len(story.table(seq).blocks) == 3
    assert story.memory.num_free == 5


@task(3)
def test_two_growing_sequences_have_no_block_in_common(build):
    story = Story(build(8))
    one, other = (story.comes(4).sequences[0] for _ in range(2))
    for _ in range(8):
        story.grows(one)
        story.grows(other)
    blocks = story.table(one).blocks + story.table(other).blocks
    assert len(set(blocks)) == len(blocks) == 6
    assert story.memory.num_free == 2


@task(3)
def test_there_is_nothing_to_copy_while_each_block_has_one_owner(build):
    story = Story(build(8))
    copies = admit(story.memory, SequenceGroup("0", [seq := Sequence(0, range(3))]))
    for _ in range(3):
        copies += story.grows(seq)
    assert copies == []


@task(3)
def test_in_any_order_a_recount_finds_no_mismatch(build):
    rng = random.Random(0)
    story = Story(CheckedMemory(build(400)))  # recounts all owners after every call
    sequences = [story.comes(rng.randrange(1, 14)).sequences[0] for _ in range(8)]
    for _ in range(150):
        seq = rng.choice(sequences)
        story.grows(seq, rng.randrange(1, 6))
        assert story.table(seq).num_tokens == seq.num_tokens


# ---- task 4: check first, and free ---------------------------------------------------------------


@task(4)
@essential("`can_append` takes no block, and is true only if enough blocks are free (rule 5).")
def test_a_free_block_is_needed_when_the_last_is_full(build):
    story = Story(build(3))
    one, other = story.comes(4), story.comes(4)
    story.samples(one.sequences[0])
    story.samples(other.sequences[0])
    for _ in range(2):  # can_append takes no blocks
        assert story.memory.can_append(one), "one block is free, and one is needed"
    story.memory.append(one.sequences[0])
    assert not story.memory.can_append(other), "no block is free, and one is needed"


@task(4)
def test_with_an_empty_slot_in_the_last_block_no_block_is_needed(build):
    story = Story(build(2))
    group = story.comes(6)
    story.samples(group.sequences[0])
    assert story.memory.num_free == 0
    assert story.memory.can_append(group), "the seventh token has a slot in the second block"


@task(4)
@pytest.mark.parametrize(("num_free", "answer"), [(2, False), (3, True), (4, True)])
def test_several_blocks_may_be_missing_at_once(build, num_free, answer):
    story = Story(build(1 + num_free))
    group = story.comes(4)
    story.samples(group.sequences[0], 9)
    assert story.memory.can_append(group) is answer


@task(4)
@pytest.mark.parametrize(("num_free", "answer"), [(0, False), (1, False), (2, True)])
def test_the_sequences_of_a_group_need_their_blocks_together(build, num_free, answer):
    story = Story(build(3 + num_free))
    group = story.comes(4, 4, 2)  # the last one has room
    for seq in group.sequences:
        story.samples(seq)
    assert story.memory.can_append(group) is answer


@task(4)
@essential("the end of a sequence must free its blocks and no others (rule 4).")
def test_all_blocks_of_a_sequence_are_freed_and_no_others(build):
    memory = build(8)
    story = Story(memory)
    [one], [other] = story.comes(9).sequences, story.comes(5).sequences
    kept = list(story.table(other).blocks)
    memory.free(one)
    assert memory.num_free == 6
    assert list(memory.tables) == [other.seq_id], "the table of a sequence that has ended"
    assert story.table(other).blocks == kept


@task(4)
def test_blocks_of_the_swap_pool_go_back_there(build):
    memory = build(4, num_swap_blocks=4)
    story = Story(memory)
    group = story.comes(7)
    [seq] = group.sequences
    memory.swap_out(group)
    memory.free(seq)
    assert (memory.num_free, memory.num_free_swap_blocks) == (4, 4)
    assert not memory.is_swapped(seq.seq_id), "a sequence that has ended still counts as swapped"


@task(4)
def test_a_prefix_is_no_longer_pinned(build):
    memory = build(4, enable_prefix_caching=True)
    story = Story(memory)
    [seq] = story.comes(8).sequences
    seq.mark_computed(8)
    memory.cache_blocks(seq)
    memory.pin(Sequence(9, range(8)))
    memory.free(seq)
    large = SequenceGroup("10", [Sequence(10, range(100, 116))])
    assert not memory.fits(large), "two of four blocks are pinned"
    memory.free(Sequence(9, range(8)))
    assert memory.fits(large), "nothing is pinned any more"


@task(4)
def test_the_last_block_is_freed_first(build):
    """The prefix cache then evicts the end of a prompt first, and its beginning is still found."""
    story = Story(build(3, enable_prefix_caching=True))
    [seq] = story.comes(12).sequences
    seq.mark_computed(12)
    story.memory.cache_blocks(seq)
    story.memory.free(seq)
    admit(story.memory, SequenceGroup("1", [Sequence(1, [99])]))  # takes one of the three blocks
    assert story.memory.num_cached_tokens(Sequence(2, range(12))) == 8


# ---- task 5: serve a language model --------------------------------------------------------------


@task(5)
def test_the_model_generates_the_same_with_the_tables_of_the_library(observed):
    serves_what_the_library_serves(
        observed, num_blocks=16, preemption="swap", enable_prefix_caching=False
    )


@task(5)
def test_small_blocks_in_a_small_pool_give_the_same_tokens(observed):
    serves_what_the_library_serves(
        observed, num_blocks=48, block_size=4, preemption="recompute", enable_prefix_caching=False
    )
