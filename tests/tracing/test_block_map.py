"""The picture of the pool in the terminal."""

from dataclasses import replace

import pytest
from scheduling import CONFIG

from minipaged.engine.parts import Parts
from minipaged.evaluation.testing.engine_without_model import EngineWithoutModel
from minipaged.memory.baselines.contiguous import contiguous
from minipaged.sequence import Sequence
from minipaged.tracing.block_map import BlockMap
from minipaged.tracing.events import EventLog


def engine_and_map(parts: Parts | None = None, **options) -> tuple[EngineWithoutModel, BlockMap]:
    """An engine whose blocks hold 4 tokens, and the picture of its pool."""
    log = EventLog()
    parts = (parts or Parts()).checked().traced(log)
    scheduler = parts.build_scheduler(replace(CONFIG, **options))
    block_map = BlockMap(scheduler)
    log.listeners.append(block_map)
    return EngineWithoutModel(scheduler), block_map


def signs(picture) -> str:
    """Only the signs of the blocks."""
    rows = [line.split() for line in picture.plain.splitlines()[3:]]
    return "".join(row[1] for row in rows if row[0].isdigit())


def test_the_map_shows_full_partial_and_free_blocks():
    engine, block_map = engine_and_map(num_blocks=6)
    engine.add(6, num_tokens=4)
    engine.add(4, num_tokens=4)
    engine.scheduler.schedule()
    assert block_map.picture().plain.splitlines()[:2] == [
        "step 1: 2 running, 0 waiting, 0 swapped",
        "3 of 6 blocks of 4 in use, 83% of their slots filled",
    ]
    assert signs(block_map.picture()) == "AaB···"


def test_a_shared_block_shows_how_many_sequences_own_it():
    engine, block_map = engine_and_map(num_blocks=40)
    engine.add(8, num_tokens=4, width=3)
    engine.step()
    engine.scheduler.schedule()
    assert signs(block_map.picture()).startswith("33")
    assert "2 shared" in block_map.picture().plain


def test_more_than_nine_owners_are_shown_as_nine():
    engine, block_map = engine_and_map(num_blocks=40, max_num_seqs=12)
    engine.add(8, num_tokens=4, width=12)
    engine.step()
    assert signs(block_map.picture()).startswith("99")


def test_cached_and_pinned_blocks_are_shown_when_no_request_owns_them():
    engine, block_map = engine_and_map(num_blocks=6)
    engine.add(12, num_tokens=1, shared_prefix=True)
    engine.run()
    assert signs(block_map.picture()) == "+++···"
    tokens = engine.samples[0][0].token_ids
    prefix = Sequence(99, tokens[:8])
    engine.scheduler.memory.pin(prefix)
    assert signs(block_map.picture()) == "**+···"
    engine.scheduler.memory.free(prefix)
    assert signs(block_map.picture()) == "+++···"


def test_a_block_of_a_request_and_a_pinned_prefix_has_two_owners():
    engine, block_map = engine_and_map(num_blocks=6)
    engine.add(9, num_tokens=1, shared_prefix=True)
    engine.run()
    tokens = engine.samples[0][0].token_ids
    engine.scheduler.memory.pin(Sequence(99, tokens[:8]))
    engine.add(9, num_tokens=1, shared_prefix=True)
    engine.scheduler.schedule()
    assert signs(block_map.picture()) == "22b···"


def test_what_a_baseline_reserves_is_shown_as_reserved():
    engine, block_map = engine_and_map(Parts(memory=contiguous("contiguous-max", 32)), num_blocks=8)
    engine.add(6, num_tokens=4)
    engine.scheduler.schedule()
    assert signs(block_map.picture()) == "Aa______"


def test_swapped_requests_are_not_in_the_pool_and_keep_their_letters():
    engine, block_map = engine_and_map(num_blocks=5, preemption="swap", enable_prefix_caching=False)
    engine.add(8, num_tokens=9)
    engine.add(8, num_tokens=9)
    seen = []
    while engine.scheduler.has_unfinished():
        engine.step()
        seen.append((block_map.picture().plain.splitlines()[0], signs(block_map.picture())))
    during = [row for headline, row in seen if "1 swapped (2 blocks)" in headline]
    assert during
    assert not any("b" in row.lower() for row in during)
    assert any("b" in row.lower() for _, row in seen[-3:])
    assert "In total: 1 preemption, " in block_map.totals()


def test_the_fullest_state_of_the_pool_is_kept():
    engine, block_map = engine_and_map(num_blocks=6, enable_prefix_caching=False)
    engine.add(6, num_tokens=1)
    engine.add(4, num_tokens=1)
    engine.run()
    assert signs(block_map.picture()) == "······"
    assert signs(block_map.fullest()) == "AaB···"


def test_a_large_pool_is_drawn_up_to_its_last_used_block():
    engine, block_map = engine_and_map(num_blocks=10_000)
    engine.add(4 * 71, num_tokens=2)
    while engine.scheduler.has_unfinished():
        engine.step()
    lines = block_map.fullest(width=48).plain.splitlines()
    assert [line.split()[0] for line in lines[3:]] == ["0", "40", "and"]
    assert lines[-1].split() == ["and", "9928", "more"]


def test_the_text_fits_a_terminal_of_80_columns():
    _, block_map = engine_and_map(num_blocks=128)
    assert max(map(len, block_map.picture(80).plain.splitlines())) <= 80


def test_copies_and_evictions_are_counted():
    engine, block_map = engine_and_map(num_blocks=9)
    for _ in range(4):
        engine.add(10, num_tokens=4, width=2)
    engine.run()
    totals = block_map.totals()
    assert "0 blocks copied" not in totals
    assert not totals.endswith(" 0 evicted.")


@pytest.mark.parametrize("checked", [True, False])
def test_the_map_needs_no_events(checked):
    parts = Parts().checked() if checked else Parts()
    engine = EngineWithoutModel(parts.build_scheduler(replace(CONFIG, num_blocks=6)))
    block_map = BlockMap(engine.scheduler)
    engine.add(6, num_tokens=4)
    engine.scheduler.schedule()
    assert signs(block_map.picture()) == "Aa····"
