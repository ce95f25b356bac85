"""Lab 5: sequences that share blocks, and diverge when they write.

Which blocks are allocated does not matter; how many, their owners and their content do.
"""

import random
from itertools import count

import pytest

from minipaged.errors import OutOfBlocks
from minipaged.evaluation.testing.admission import admit as admit_group
from minipaged.memory import BlockTable, CheckedMemory, PrefixCache
from minipaged.sequence import Sequence, SequenceGroup

from serving import serves_what_the_library_serves

essential = pytest.mark.essential


def task(number: int) -> pytest.MarkDecorator:
    return pytest.mark.lab(number=5, task=number)


class Written(PrefixCache):
    """Acts as if every pinned sequence were computed, so that tables begin without `append`."""

    def __init__(self, allocator, block_size, enabled):
        super().__init__(allocator, block_size, enabled)
        self.size = block_size

    def share_cached(self, seq):
        blocks = [self.allocate() for _ in range(-(-seq.num_tokens // self.size))]
        return BlockTable(self.size, blocks, seq.num_tokens)


@pytest.fixture
def build(part):
    """A memory that is recounted after every call."""

    def build(num_blocks=12, **options):
        return CheckedMemory(part("memory")(num_blocks=num_blocks, block_size=4, **options))

    return build


@pytest.fixture
def written(build):
    """A memory in which `begin` allocates the blocks of a sequence."""
    return lambda **options: build(num_swap_blocks=12, prefix_cache=Written, **options)


def begin(memory, seq_id, num_tokens, first=0):
    seq = Sequence(seq_id, range(first, first + num_tokens))
    memory.pin(seq)
    seq.mark_computed(num_tokens)
    return seq


def admit(memory, seq_id, num_tokens):
    seq = Sequence(seq_id, range(num_tokens))
    admit_group(memory, SequenceGroup(str(seq_id), [seq]))
    seq.mark_computed(seq.num_uncomputed_tokens)
    return seq


def fork(memory, parent, seq_id):
    child = parent.fork(seq_id)
    memory.fork(parent, child)
    return child


def table(memory, seq):
    return memory.tables[seq.seq_id].blocks


# ---- task 1: fork --------------------------------------------------------------------------------


@task(1)
def test_a_fork_reads_the_blocks_of_its_parent(written):
    memory = written()
    parent = begin(memory, 1, 10)
    before = list(table(memory, parent))
    child = fork(memory, parent, 2)
    assert table(memory, child) == table(memory, parent) == before
    assert memory.tables[2].num_tokens == 10


@task(1)
@essential("a fork shares the blocks of its parent and allocates none (rule 1).")
def test_a_fork_takes_no_free_block(written):
    memory = written(num_blocks=3)
    parent = begin(memory, 1, 10)
    for seq_id in range(2, 6):
        fork(memory, parent, seq_id)
    assert memory.num_free == 0
    assert memory.num_distinct_blocks(SequenceGroup("all", [parent])) == 3


@task(1)
def test_each_fork_adds_one_owner_to_each_block(written):
    memory = written()
    parent = begin(memory, 1, 10)
    counts = []
    for seq_id in (2, 3, 4):
        fork(memory, parent, seq_id)
        counts.append([memory.ref_count(block) for block in table(memory, parent)])
    assert counts == [[2] * 3, [3] * 3, [4] * 3]


@task(1)
def test_parent_and_child_have_separate_tables(written):
    memory = written()
    parent = begin(memory, 1, 10)
    child = fork(memory, parent, 2)
    assert memory.tables[1] is not memory.tables[2]
    table(memory, parent).append(11)  # must not appear in the child's table
    assert len(table(memory, child)) == 3


@task(1)
def test_a_child_that_has_computed_less_shares_less(written):
    """A group that was preempted forks again, where the tokens of its sequences diverge."""
    memory = written()
    parent = begin(memory, 1, 12)
    child = parent.fork(2)
    child.forget_computed()
    child.mark_computed(8)
    memory.fork(parent, child)
    assert table(memory, child) == table(memory, parent)[:2]
    assert [memory.ref_count(block) for block in table(memory, parent)] == [2, 2, 1]


@task(1)
def test_a_swapped_sequence_forks_in_the_swap_pool(written):
    memory = written()
    parent = begin(memory, 1, 10)
    memory.swap_out(SequenceGroup("A", [parent]))
    child = fork(memory, parent, 2)
    assert memory.is_swapped(2)
    assert [memory.swap_ref_count(block) for block in table(memory, child)] == [2, 2, 2]


# ---- task 2: free --------------------------------------------------------------------------------


@task(2)
def test_a_block_without_other_owners_becomes_free(written):
    memory = written()
    one, other = begin(memory, 1, 10), begin(memory, 2, 5)
    memory.free(one)
    assert memory.num_free == 12 - 2
    assert 1 not in memory.tables
    assert [memory.ref_count(block) for block in table(memory, other)] == [1, 1]


@task(2)
@essential("the end of a sequence removes one owner from each of its blocks (rule 1).")
@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 1, 3)])
def test_forks_may_end_in_any_order_and_the_last_frees_all_blocks(written, order):
    memory = written()
    parent = begin(memory, 1, 10)
    family = {1: parent, 2: fork(memory, parent, 2), 3: fork(memory, parent, 3)}
    free = []
    for seq_id in order:
        memory.free(family[seq_id])
        free.append(memory.num_free)
    assert free == [9, 9, 12]


@task(2)
def test_a_swapped_sequence_frees_blocks_of_the_swap_pool(written):
    memory = written()
    parent, other = begin(memory, 1, 10), begin(memory, 2, 10)
    memory.swap_out(SequenceGroup("A", [parent]))
    memory.free(parent)
    assert (memory.num_free, memory.num_free_swap_blocks) == (9, 12)
    assert not memory.is_swapped(1)
    assert [memory.ref_count(block) for block in table(memory, other)] == [1, 1, 1]


@task(2)
def test_the_last_cached_block_of_a_sequence_can_be_evicted_first(written):
    memory = written(num_blocks=3, enable_prefix_caching=True)
    seq = begin(memory, 1, 12)
    memory.cache_blocks(seq)
    first = table(memory, seq)[0]
    memory.free(seq)
    assert memory.num_free == 3
    begin(memory, 2, 8, first=100)  # takes two of the three, children first
    assert list(memory.cached) == [first]


@task(2)
def test_a_prefix_that_was_released_is_pinned_no_longer(written):
    memory = written(num_blocks=3)
    memory.free(begin(memory, 1, 12))
    group = SequenceGroup("large", [Sequence(2, range(12))])
    assert memory.fits(group)


# ---- task 3: copy-on-write -----------------------------------------------------------------------


class Slots:
    """Simulated keys and values: token ids that are copied and written as in the engine."""

    def __init__(self, memory):
        self.memory = memory
        self.slots = {}

    def step(self, sequences):
        """Compute all uncomputed tokens: first all blocks, then all copies, then all writes."""
        pairs = [pair for seq in sequences for pair in self.memory.append(seq)]
        for source, target in pairs:
            for offset in range(4):
                self.slots[target * 4 + offset] = self.slots.get(source * 4 + offset)
        for seq in sequences:
            where = self.memory.tables[seq.seq_id]
            for position in range(seq.num_computed_tokens, seq.num_tokens):
                self.slots[where.slot(position)] = seq.token_ids[position]
            seq.mark_computed(seq.num_uncomputed_tokens)
        return pairs

    def read(self, seq):
        where = self.memory.tables[seq.seq_id]
        return [self.slots.get(where.slot(position)) for position in range(seq.num_tokens)]


@pytest.fixture
def played(build):
    """A memory, and the content of its slots."""

    def played(num_blocks=12, **options):
        memory = build(num_blocks, **options)
        return memory, Slots(memory)

    return played


def prompt(memory, slots, num_tokens):
    """A sequence whose prompt is computed."""
    seq = Sequence(1, range(num_tokens))
    admit_group(memory, SequenceGroup("A", [seq]))
    for position, token in enumerate(seq.token_ids):
        slots.slots[memory.tables[1].slot(position)] = token
    seq.mark_computed(num_tokens)
    return seq


@task(3)
def test_a_sequence_takes_a_block_only_when_a_token_needs_it(played):
    memory, slots = played()
    seq = prompt(memory, slots, 6)
    held = []
    for token in range(7):
        seq.append(token)
        assert slots.step([seq]) == []
        held.append(len(table(memory, seq)))
    assert held == [2, 2, 3, 3, 3, 3, 4]
    assert slots.read(seq) == seq.token_ids


@task(3)
def test_the_first_of_two_writers_gets_a_copy_and_the_second_keeps_the_original(played):
    memory, slots = played()
    first = prompt(memory, slots, 7)  # the paper's Figure 8
    full, shared = table(memory, first)
    second = fork(memory, first, 2)
    first.append(70)
    second.append(71)
    [pair] = memory.append(first)
    copy = table(memory, first)[1]
    assert pair == (shared, copy), "a pair is (from, to)"
    assert copy != shared
    assert memory.append(second) == []
    assert table(memory, second) == [full, shared]
    assert [memory.ref_count(block) for block in (full, shared, copy)] == [2, 1, 1]


@task(3)
@pytest.mark.parametrize("writers", [2, 3, 5])
def test_of_n_writers_n_minus_1_copy(played, writers):
    memory, slots = played()
    parent = prompt(memory, slots, 6)
    family = [parent, *(fork(memory, parent, seq_id) for seq_id in range(2, writers + 1))]
    for seq in family:
        seq.append(100 + seq.seq_id)
    assert len(slots.step(family)) == writers - 1
    assert memory.num_free == 12 - 1 - writers
    for seq in family:
        assert slots.read(seq) == seq.token_ids


@task(3)
def test_after_its_copy_a_sequence_does_not_copy_again(played):
    memory, slots = played()
    one = prompt(memory, slots, 5)
    other = fork(memory, one, 2)
    copies = []
    for token in range(4):
        one.append(10 + token)
        other.append(20 + token)
        copies.append(len(slots.step([one, other])))
    assert copies == [1, 0, 0, 0]
    assert slots.read(one) == one.token_ids
    assert slots.read(other) == other.token_ids


@task(3)
def test_a_block_that_is_full_stays_shared(played):
    memory, slots = played()
    one = prompt(memory, slots, 8)
    other = fork(memory, one, 2)
    for seq in (one, other):
        seq.append(50 + seq.seq_id)
    assert slots.step([one, other]) == []
    assert table(memory, one)[:2] == table(memory, other)[:2]
    assert table(memory, one)[2] != table(memory, other)[2]


@task(3)
def test_the_only_remaining_owner_does_not_copy(played):
    memory, slots = played()
    one = prompt(memory, slots, 6)
    other = fork(memory, one, 2)
    memory.free(one)
    other.append(9)
    assert slots.step([other]) == []
    assert slots.read(other) == other.token_ids


@task(3)
def test_a_copy_without_a_free_block_is_refused(build):
    memory = build(2)
    one = admit(memory, 1, 6)
    other = fork(memory, one, 2)
    for seq in (one, other):
        seq.append(0)
    assert not memory.can_append(SequenceGroup("A", [one, other]))
    with pytest.raises(OutOfBlocks):
        memory.append(one)


@task(3)
def test_the_original_is_cached_and_the_copy_is_not(build):
    """The same prompt twice: the second writes the keys of its last token, to a copy."""
    memory = build(12, enable_prefix_caching=True)
    one = admit(memory, 1, 8)
    memory.cache_blocks(one)
    other = Sequence(2, range(8))
    [(source, target)] = admit_group(memory, SequenceGroup("B", [other]))
    assert source == table(memory, one)[1]
    assert target == table(memory, other)[1]
    for token in range(100, 106):
        other.mark_computed(1)
        memory.cache_blocks(other)
        other.append(token)
        assert memory.append(other) == []
    assert table(memory, other)[:2] == table(memory, one)  # of two equal blocks one is kept
    memory.free(one)
    memory.free(other)
    assert memory.num_free == 12


@task(3)
@essential("every owner counts, and a block with several must not be written (rules 1 and 2).")
def test_in_any_order_each_sequence_reads_what_it_wrote(build):
    rng = random.Random(5)
    memory = build(60)
    slots, ids, alive = Slots(memory), count(1), []
    for _ in range(300):
        choices = ["begin"] * (not alive) + ["step"] * 4 + ["fork"] * (len(alive) < 6) + ["free"]
        action = rng.choice(choices) if alive else "begin"
        if action == "begin":
            seq = Sequence(next(ids), [rng.randrange(1000) for _ in range(rng.randint(1, 9))])
            admit_group(memory, SequenceGroup(str(seq.seq_id), [seq]))
            alive.append(seq)
            slots.step([seq])
        elif action == "step":
            for seq in alive:
                seq.append(rng.randrange(1000))
            rng.shuffle(alive)
            slots.step(alive)
        elif action == "fork":
            alive.append(fork(memory, rng.choice(alive), next(ids)))
        if action == "free" or alive[0].num_tokens > 30:
            memory.free(alive.pop(rng.randrange(len(alive))))
        for seq in alive:
            assert slots.read(seq) == seq.token_ids, "a sequence wrote to a block of another one"
    for seq in alive:
        memory.free(seq)
    assert memory.num_free == 60


# ---- task 5: serve a language model --------------------------------------------------------------


@task(5)
def test_samples_are_those_of_the_library(observed):
    serves_what_the_library_serves(observed, num_blocks=200, block_size=4, samples=3)


@task(5)
def test_samples_survive_preemption(observed):
    serves_what_the_library_serves(observed, num_blocks=32, block_size=8, samples=3)


@task(5)
def test_one_sample_gives_the_usual_tokens(observed):
    serves_what_the_library_serves(observed, num_blocks=16, preemption="swap")
