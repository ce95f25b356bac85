"""Memory under any calls in any order, beside a model of the tensors; and faults it must catch.

The model writes into each slot what its keys and values depend on, the salt and all tokens up to
that place, and carries out the copies that the manager asks for. So a wrong slot, a missing copy, a
lost block, or a block found under the wrong beginning shows as a sequence that reads what is not
its own.
"""

import pytest
from faulty_memory import ALLOCATORS, CACHES, MANAGERS, with_cache
from full_set import examples
from hypothesis import Phase, settings
from hypothesis.stateful import (
    run_state_machine_as_test,
)
from memory_machine import AnyOrder

from minipaged.errors import CheckFailed, DoubleFree, OutOfBlocks
from minipaged.memory import (
    PrefixCache,
)

TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=examples(200, full=1500))


# ---- deliberate faults: each must be caught ------------------------------------------------------


class EvictsTheNewestLeaf(PrefixCache):
    """Unusual, and right."""

    def evict_candidate(self):
        return next(block for block in reversed(self.idle) if self.is_leaf(block))


def test_any_order_of_leaves_will_do():
    machine = type("NewestLeaf", (AnyOrder,), {"manager": with_cache(EvictsTheNewestLeaf)})
    quick = settings(
        max_examples=150, phases=[Phase.generate], derandomize=True, deadline=None, database=None
    )
    run_state_machine_as_test(machine, settings=quick)


@pytest.mark.parametrize("fault", [*ALLOCATORS, *MANAGERS, *CACHES])
def test_a_deliberate_fault_is_caught(fault):
    roles = {"allocator": fault} if fault in ALLOCATORS else {"manager": fault}
    if fault in CACHES:
        roles = {"manager": with_cache(fault)}
    machine = type(fault.__name__, (AnyOrder,), roles)
    quick = settings(
        max_examples=8000, phases=[Phase.generate], derandomize=True, deadline=None, database=None
    )
    with pytest.raises((CheckFailed, AssertionError, DoubleFree, OutOfBlocks, LookupError)):
        run_state_machine_as_test(machine, settings=quick)
