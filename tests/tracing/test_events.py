"""The event stream: complete enough to rebuild, from outside, who owns which block."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduling import CONFIG

from minipaged.engine.parts import Parts
from minipaged.evaluation.testing.engine_without_model import EngineWithoutModel
from minipaged.tracing.block_map import BlockMap
from minipaged.tracing.events import Event, EventLog


def traced_engine(*listeners, **options) -> EngineWithoutModel:
    ticks = iter(range(10**9))
    log = EventLog(*listeners, clock=lambda: float(next(ticks)))
    return EngineWithoutModel(
        Parts().checked().traced(log).build_scheduler(replace(CONFIG, **options))
    )


def test_an_event_is_one_line_of_json_with_version_step_and_time():
    lines = []
    log = EventLog(lambda event: lines.append(event.to_json()), clock=iter([1.0, 3.5]).__next__)
    log.emit("free", seq=2)
    assert json.loads(lines[0]) == {"v": 1, "step": 0, "time": 2.5, "event": "free", "seq": 2}
    assert "\n" not in lines[0]


def test_steps_are_numbered_by_the_scheduler():
    events: list[Event] = []
    engine = traced_engine(events.append)
    engine.add(5, num_tokens=3)
    engine.run()
    assert [e.step for e in events if e.event == "schedule"] == [1, 2, 3]
    assert [e.time for e in events] == sorted(e.time for e in events)


@given(
    requests=st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 15), st.integers(1, 3)), min_size=1, max_size=6
    ),
    num_blocks=st.integers(6, 30),
    preemption=st.sampled_from(["auto", "recompute", "swap"]),
)
def test_a_listener_knows_every_block_table_and_every_owner(requests, num_blocks, preemption):
    """BlockMap hears events only; after every step it must agree with the memory itself."""
    picture = BlockMap(num_blocks, CONFIG.block_size)
    owners: dict[tuple[str, int], int] = {}

    def count(event: Event) -> None:
        if event.event in ("allocate", "share", "release"):
            owners[event.fields["pool"], event.fields["block"]] = event.fields["owners"]

    engine = traced_engine(picture, count, num_blocks=num_blocks, preemption=preemption)
    for prompt_len, num_tokens, num_seqs in requests:
        engine.add(prompt_len, num_tokens, num_seqs, shared_prefix=prompt_len % 2 == 0)
    memory = engine.scheduler.memory
    while engine.scheduler.has_unfinished():
        engine.step()
        heard = {seq: (h.blocks, h.num_tokens, h.swapped) for seq, h in picture._holders.items()}
        assert heard == {
            seq: (table.blocks, table.num_tokens, memory.is_swapped(seq))
            for seq, table in memory.tables.items()
        }
        for block in range(num_blocks):
            by_cache = block in memory.cached
            assert owners.get(("pool", block), 0) == memory.ref_count(block) + by_cache
        assert picture._cached == memory.cached.keys()
        picture.picture()


def test_the_picture_shows_full_partial_shared_and_free_blocks():
    picture = BlockMap(4, 4)
    picture(Event("admit", 1, 0.0, {"request": "x", "seqs": {0: [0, 1]}, "tokens": {0: 6}}))
    picture(Event("admit", 1, 0.0, {"request": "y", "seqs": {1: [3]}, "tokens": {1: 4}}))
    picture(Event("fork", 1, 0.0, {"parent": 1, "child": 2, "tokens": 4}))
    queues = {"running": ["x", "y"], "waiting": [], "swapped": []}
    picture(Event("schedule", 1, 0.0, {"tokens": {0: 6, 1: 4}, **queues}))
    headline, _, row = picture.picture().plain.splitlines()
    assert headline == (
        "step 1: 2 running, 0 waiting, 0 swapped; 3 of 4 blocks of 4 in use, "
        "83% of their slots filled, 1 shared"
    )
    assert row.split() == ["0", "Aa·2"]
    picture(Event("free", 2, 0.0, {"seq": 0}))
    headline, _, row = picture.picture().plain.splitlines()
    assert headline.startswith("step 2: 1 running")
    assert row.split() == ["0", "···2"]
    assert picture.fullest().plain.splitlines()[2].split() == ["0", "Aa·2"]


def test_a_pool_too_large_to_draw_is_drawn_as_far_as_it_was_used():
    picture = BlockMap(10_000, 4)
    picture(Event("admit", 1, 0.0, {"request": "x", "seqs": {0: [0, 70]}, "tokens": {0: 8}}))
    queues = {"running": ["x"], "waiting": [], "swapped": []}
    picture(Event("schedule", 1, 0.0, {"tokens": {0: 8}, **queues}))
    lines = picture.picture(width=48).plain.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["0", "40", "and"]
    assert lines[-1].split() == ["and", "9929", "more"]


def test_one_traced_set_of_parts_can_serve_two_engines():
    pools = []
    log = EventLog(lambda e: pools.append(e.fields["pool"]) if e.event == "allocate" else None)
    parts = Parts().traced(log)
    for _ in range(2):
        engine = EngineWithoutModel(
            parts.build_scheduler(replace(CONFIG, num_blocks=4, preemption="swap"))
        )
        engine.add(8)
        engine.add(8)
        engine.run()
    assert pools[: len(pools) // 2] == pools[len(pools) // 2 :]
    assert set(pools) == {"pool", "swap"}


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_every_preemption_is_told_with_its_mode(mode):
    events: list[Event] = []
    engine = traced_engine(events.append, num_blocks=6, preemption=mode)
    for _ in range(3):
        engine.add(8, num_tokens=6)
    plans = engine.run()
    told = [(e.fields["request"], e.fields["mode"]) for e in events if e.event == "preempt"]
    assert told
    assert told == [(g.request_id, mode) for plan in plans for g in plan.preempted]


def test_who_ends_for_want_of_memory_is_told():
    events: list[Event] = []
    engine = traced_engine(events.append, num_blocks=5)
    engine.add(4, num_tokens=300)
    engine.run()
    assert [e.fields for e in events if e.event == "end"] == [{"request": "0"}]


def test_a_schedule_event_names_the_queues_and_the_tokens_of_its_step():
    told: list[dict] = []

    def listen(event: Event) -> None:
        if event.event == "schedule":
            told.append(event.fields["tokens"])
            for name in ("running", "waiting", "swapped"):
                queue = getattr(engine.scheduler, name)
                assert event.fields[name] == [g.request_id for g in queue]

    engine = traced_engine(
        listen, num_blocks=9, preemption="swap", max_num_batched_tokens=6, max_num_seqs=4
    )
    for _ in range(4):
        engine.add(8, num_tokens=20)
    plans = engine.run()
    assert told == [{s.seq.seq_id: s.num_new_tokens for s in plan.sequences} for plan in plans]


def test_what_happens_within_a_step_bears_its_number():
    events: list[Event] = []
    engine = traced_engine(events.append)
    engine.add(5, num_tokens=4)
    engine.run()
    assert [e.step for e in events if e.event == "admit"] == [1]
    assert [e.step for e in events if e.event == "append"] == [2, 3, 4]
    assert [e.step for e in events if e.event == "free"] == [4]


def test_the_fullest_picture_stays_when_the_pool_empties():
    picture = BlockMap(4, 4)
    queues = {"running": ["x"], "waiting": [], "swapped": []}
    picture(Event("admit", 1, 0.0, {"request": "x", "seqs": {0: [0, 1]}, "tokens": {0: 8}}))
    for child in range(1, 12):
        picture(Event("fork", 1, 0.0, {"parent": 0, "child": child, "tokens": 8}))
    picture(Event("schedule", 1, 0.0, {"tokens": {0: 8}, **queues}))
    for seq in range(12):
        picture(Event("free", 2, 0.0, {"seq": seq}))
    picture(Event("schedule", 2, 0.0, {"tokens": {}, **queues}))
    assert picture.fullest().plain.splitlines()[2].split() == ["0", "99··"]
