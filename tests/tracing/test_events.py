"""The event stream: what is emitted, and when."""

import json
from dataclasses import replace

import pytest
from scheduling import CONFIG

from minipaged.engine.parts import Parts
from minipaged.evaluation.testing.engine_without_model import EngineWithoutModel
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
    log.emit("free", seq_id=2)
    assert json.loads(lines[0]) == {"v": 2, "step": 0, "time": 2.5, "event": "free", "seq_id": 2}
    assert "\n" not in lines[0]


def test_steps_are_numbered_by_the_scheduler():
    events: list[Event] = []
    engine = traced_engine(events.append)
    engine.add(5, num_tokens=3)
    engine.run()
    assert [e.step for e in events if e.event == "schedule"] == [1, 2, 3]
    assert [e.time for e in events] == sorted(e.time for e in events)


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
def test_every_preemption_is_emitted_with_its_mode(mode):
    events: list[Event] = []
    engine = traced_engine(events.append, num_blocks=6, preemption=mode)
    for _ in range(3):
        engine.add(8, num_tokens=6)
    plans = engine.run()
    emitted = [(e.fields["request_id"], e.fields["mode"]) for e in events if e.event == "preempt"]
    assert emitted
    assert emitted == [(g.request_id, mode) for decision in plans for g in decision.preempted]


def test_a_request_that_runs_out_of_memory_is_emitted():
    events: list[Event] = []
    engine = traced_engine(events.append, num_blocks=5)
    engine.add(4, num_tokens=300)
    engine.run()
    assert [e.fields for e in events if e.event == "out_of_memory"] == [{"request_id": "0"}]


def test_a_schedule_event_names_the_queues_and_the_tokens_of_its_step():
    emitted: list[dict] = []

    def listen(event: Event) -> None:
        if event.event == "schedule":
            emitted.append(event.fields["num_scheduled_tokens"])
            for name in ("running", "waiting", "swapped"):
                queue = getattr(engine.scheduler, name)
                assert event.fields[name] == [g.request_id for g in queue]

    engine = traced_engine(
        listen, num_blocks=9, preemption="swap", max_num_batched_tokens=6, max_num_seqs=4
    )
    for _ in range(4):
        engine.add(8, num_tokens=20)
    plans = engine.run()
    assert emitted == [
        {s.seq.seq_id: s.num_new_tokens for s in decision.sequences} for decision in plans
    ]


def test_events_within_a_step_have_the_number_of_the_step():
    events: list[Event] = []
    engine = traced_engine(events.append)
    engine.add(5, num_tokens=4)
    engine.run()
    assert [e.step for e in events if e.event == "admit"] == [1]
    assert [e.step for e in events if e.event == "append"] == [2, 3, 4]
    assert [e.step for e in events if e.event == "free"] == [4]


def test_the_tokens_that_the_prefix_cache_held_are_emitted_at_admission():
    events: list[Event] = []
    engine = traced_engine(events.append, num_blocks=30)
    for _ in range(2):
        engine.add(11, num_tokens=2, shared_prefix=True)
        engine.run()
    cached = [e.fields["num_cached_tokens"] for e in events if e.event == "admit"]
    assert cached == [{0: 0}, {1: 8}]  # two full blocks of four


def test_a_late_listener_receives_evictions():
    engine = traced_engine(num_blocks=8)
    engine.add(20, num_tokens=2)
    engine.run()
    events: list[Event] = []
    engine.scheduler._log.listeners.append(events.append)
    engine.add(24, num_tokens=2)
    engine.run()
    assert any(event.event == "evict" for event in events)
