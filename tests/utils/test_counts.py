"""Numbers with their nouns."""

import pytest

from minipaged.errors import OutOfBlocks
from minipaged.memory import BlockAllocator, BlockManager
from minipaged.sequence import Sequence, SequenceGroup
from minipaged.utils.counts import counted


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((0, "block"), "0 blocks"),
        ((1, "block"), "1 block"),
        ((2_000, "block"), "2,000 blocks"),
        ((1, "block has", "blocks have"), "1 block has"),
        ((2, "block has", "blocks have"), "2 blocks have"),
        ((2, "copy", "copies"), "2 copies"),
        ((1.0, "point"), "1 point"),
        ((12.5, "point"), "12.5 points"),
    ],
)
def test_number_and_noun_agree(words, said):
    assert counted(*words) == said


def test_one_block_is_singular():
    pool = BlockAllocator(1)
    pool.allocate()
    with pytest.raises(OutOfBlocks) as refused:
        pool.allocate()
    assert "1 blocks" not in str(refused.value)
    memory = BlockManager(num_blocks=1, block_size=4)
    reason = memory.explain_rejection(SequenceGroup("0", [Sequence(0, range(5))]))
    assert "2 blocks of 4 tokens" in reason
    assert "shorten the prompt by 1 token." in reason
