"""Memory under any calls in any order, against a model of the tensors; faults it must catch.

The model writes into each slot what its keys and values depend on, the salt and all tokens up to
that place, and carries out the copies that the manager asks for. So a wrong slot, a missing copy, a
lost block, or a block found for the wrong prefix shows as a sequence that reads what is not
its own.
"""

from types import SimpleNamespace

import pytest
from faulty_memory import (
    ALLOCATORS,
    CACHES,
    MANAGERS,
    EvictsTheNewestFirst,
    ForgetsThatACopyIsNotPublished,
    ForgetsThatASwapUnpublishes,
    PublishesAPartialBlock,
    with_cache,
)
from full_set import examples
from hypothesis import Phase, settings
from hypothesis.stateful import (
    run_state_machine_as_test,
)
from memory_machine import AnyOrder

from minipaged.errors import CheckFailed, DoubleFree, OutOfBlocks
from minipaged.memory import BlockManager, PrefixCache
from minipaged.sequence import SequenceGroup

TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=examples(100, full=1500))


# ---- deliberate faults: each must be caught ------------------------------------------------------


class EvictsTheNewestLeaf(PrefixCache):
    """Unusual, and right."""

    def evict_candidate(self):
        return next(block for block in reversed(self.idle) if self.is_leaf(block))


def test_cached_leaves_may_be_evicted_in_any_order():
    machine = type("NewestLeaf", (AnyOrder,), {"manager": with_cache(EvictsTheNewestLeaf)})
    quick = settings(
        max_examples=examples(50, full=150),
        phases=[Phase.generate],
        derandomize=True,
        deadline=None,
        database=None,
    )
    run_state_machine_as_test(machine, settings=quick)


def begin(manager: type[BlockManager], num_blocks: int, block_size: int) -> AnyOrder:
    machine = type("Story", (AnyOrder,), {"manager": manager})()
    machine.build(num_blocks=num_blocks, num_swap_blocks=8, block_size=block_size, caching=True)
    return machine


def admit(machine: AnyOrder, tokens: list[int], salt: str | None = None, most: int = 99):
    """A group of one sequence; and `most` of its tokens, computed."""
    machine.admit(tokens=tokens, salt=salt, reads=1)
    machine.compute_group(machine.groups[-1], most)
    machine.every_sequence_reads_its_own_tokens()
    return machine.groups[-1]


def generate(machine: AnyOrder, group: SequenceGroup, tokens: list[int]) -> None:
    for token in tokens:
        machine.append(group, SimpleNamespace(draw=lambda _, token=token: token))
        machine.compute_group(group)
        machine.every_sequence_reads_its_own_tokens()


def a_swapped_sequence_publishes_its_blocks_again(manager: type[BlockManager]) -> None:
    machine = begin(manager, num_blocks=8, block_size=1)
    group = admit(machine, [0, 1])
    machine.copy_blocks(machine.memory.swap_out(group), machine.pool, machine.swap_pool)
    machine.give_up(admit(machine, [0] * 8, salt="another"))  # takes all blocks
    machine.copy_blocks(machine.memory.swap_in(group), machine.swap_pool, machine.pool)
    generate(machine, group, [1])


def a_copy_is_published_once_the_original_is_evicted(manager: type[BlockManager]) -> None:
    machine = begin(manager, num_blocks=6, block_size=2)
    first = admit(machine, [0, 1, 1, 0])
    second = admit(machine, [0, 1, 1, 0])  # whose last token is computed again, in a copy
    machine.give_up(first)
    machine.give_up(admit(machine, [0] * 2 * machine.memory.num_free, salt="another"))
    generate(machine, second, [1, 1, 0])


def a_child_is_evicted_before_its_parent(manager: type[BlockManager]) -> None:
    machine = begin(manager, num_blocks=4, block_size=1)
    machine.give_up(admit(machine, [0, 1, 0, 1]))
    admit(machine, [1, 1], salt="another")
    admit(machine, [0, 1])


def a_block_is_found_only_once_it_is_full(manager: type[BlockManager]) -> None:
    machine = begin(manager, num_blocks=6, block_size=2)
    admit(machine, [0, 1, 1, 0, 1], most=3)
    admit(machine, [0, 1, 1, 0, 1])


# Faults that a random search takes long to find, each with a few calls that show it at once.
STORIES = {
    ForgetsThatASwapUnpublishes: a_swapped_sequence_publishes_its_blocks_again,
    ForgetsThatACopyIsNotPublished: a_copy_is_published_once_the_original_is_evicted,
    EvictsTheNewestFirst: a_child_is_evicted_before_its_parent,
    PublishesAPartialBlock: a_block_is_found_only_once_it_is_full,
}


@pytest.mark.parametrize("fault", STORIES)
def test_a_rare_fault_is_caught_by_a_scripted_scenario(fault):
    STORIES[fault](BlockManager)
    with pytest.raises((CheckFailed, AssertionError)):
        STORIES[fault](with_cache(fault) if fault in CACHES else fault)


COMMON = [fault for fault in (*ALLOCATORS, *MANAGERS, *CACHES) if fault not in STORIES]


@pytest.mark.parametrize("fault", COMMON)
def test_a_deliberate_fault_is_caught(fault):
    roles = {"allocator": fault} if fault in ALLOCATORS else {"manager": fault}
    if fault in CACHES:
        roles = {"manager": with_cache(fault)}
    machine = type(fault.__name__, (AnyOrder,), roles)
    quick = settings(
        max_examples=2000, phases=[Phase.generate], derandomize=True, deadline=None, database=None
    )
    with pytest.raises((CheckFailed, AssertionError, DoubleFree, OutOfBlocks, LookupError)):
        run_state_machine_as_test(machine, settings=quick)
