"""The decision that the brief of lab 4 works out is the scheduler's."""

import pytest

from minipaged.config import EngineConfig
from minipaged.memory import BlockManager
from minipaged.scheduler.fcfs import FCFSScheduler
from minipaged.sequence import Sequence, SequenceGroup, SequenceStatus


@pytest.mark.parametrize(
    ("num_blocks", "tokens", "num_free", "preempted"),
    [(10, {"A": 1, "B": 8, "C": 3}, 0, []), (9, {"A": 1, "B": 8}, 1, []), (7, {"A": 1}, 3, ["B"])],
)
def test_the_worked_decision_of_lab_4_is_right(num_blocks, tokens, num_free, preempted):
    config = EngineConfig(
        num_blocks=num_blocks, num_swap_blocks=0, block_size=4, max_model_len=64,
        max_num_batched_tokens=12, max_num_seqs=8, enable_prefix_caching=False,
    )  # fmt: skip
    memory = BlockManager(num_blocks, block_size=4)
    scheduler = FCFSScheduler(config, memory)
    for number, (name, length) in enumerate({"A": 12, "B": 14, "C": 5, "D": 3}.items()):
        group = SequenceGroup(name, [Sequence(number, range(length))])
        scheduler.add(group)
        if name in "AB":
            memory.admit(group)
            scheduler._move(group, SequenceStatus.RUNNING)
    a, b = (group.sequences[0] for group in scheduler.running)
    a.mark_computed(12)
    a.append(0)
    b.mark_computed(6)
    output = scheduler.schedule()
    assert {s.group.request_id: s.num_new_tokens for s in output.sequences} == tokens
    assert memory.num_free == num_free
    assert [group.request_id for group in output.preempted] == preempted
