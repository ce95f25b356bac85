"""A trace of several ranks: the times of each step on each rank, sent only when requested."""

from pathlib import Path

import pytest
from commands import minipaged

from minipaged import LLM, Parts, SamplingParams
from minipaged.tracing.events import Event, EventLog
from minipaged.tracing.replay import Replay
from minipaged.worker.executor import MultiExecutor
from minipaged.worker.process import STEP, TRACED_STEP

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
OPTIONS = {"tensor_parallel_size": 2, "num_blocks": 64}


def rank_events(events: list[Event]) -> list[Event]:
    return [event for event in events if event.event == "ranks"]


def test_every_step_in_a_trace_file_has_the_times_of_each_rank(capsys, monkeypatch, tmp_path: Path):
    trace = tmp_path / "trace.jsonl"
    command = ("generate", "Theo", "--tensor-parallel-size", "2", "--num-blocks", "64")
    code, _, err = minipaged(
        capsys,
        monkeypatch,
        *(*command, "--max-tokens", "5", "--ignore-eos", "--trace", str(trace)),
    )
    assert code == 0, err
    events = Replay.read(trace).events  # which checks all fields
    in_order = [(e.step, e.event) for e in events if e.event in ("schedule", "ranks")]
    assert in_order == [(step, name) for step in range(1, 6) for name in ("schedule", "ranks")]
    times = {(e.step, e.event): e.time for e in events}
    for event in rank_events(events):
        assert event.fields["num_all_reduces"] == 9  # two in each of four layers, and one
        assert len(event.to_json()) < 2000
        begin, end = times[event.step, "schedule"], times[event.step, "ranks"]
        assert len(event.fields["spans"]) == 2
        for spans in event.fields["spans"]:
            assert (len(spans["compute"]), len(spans["all_reduce"])) == (11, 9)
            computed = [*spans["compute"], *spans["all_reduce"], spans["gather"]]
            assert min(computed[:10]) > 0
            assert 0 < sum(computed) / 1e6 < end - begin


def test_workers_send_times_only_while_a_trace_is_recorded():
    log, events = EventLog(), list[Event]()
    llm = LLM("storyteller", parts=Parts().traced(log), **OPTIONS)
    executor = llm.engine.executor._inner
    assert isinstance(executor, MultiExecutor)
    kinds: list[int] = []
    send, gather = executor.ranks.send, executor.ranks._gather_numbers
    executor.ranks.send = lambda numbers: (kinds.append(numbers[0]), send(numbers))[1]
    asked: list[int] = []
    executor.ranks._gather_numbers = lambda own: (asked.append(len(own)), gather(own))[1]
    counts = executor.ranks.counts

    def run() -> dict[str, int]:
        before = dict(counts)
        llm.generate("Theo", GREEDY, use_tqdm=False)
        return {name: counts[name] - before.get(name, 0) for name in counts}

    plain = run()
    assert (set(kinds), asked) == ({STEP}, [])
    kinds.clear()
    log.listeners.append(events.append)
    traced = run()
    assert (set(kinds), len(asked)) == ({TRACED_STEP}, 5)
    assert len(rank_events(events)) == 5
    assert traced == plain == {"message": 5, "all-reduce": 45, "gather": 5, "step": 5}
    log.listeners.clear()
    kinds.clear()
    assert run() == plain
    assert (set(kinds), len(asked)) == ({STEP}, 5)


def test_a_rank_that_ends_in_a_traced_step_ends_the_engine():
    from minipaged.errors import WorkerLost

    llm = LLM("storyteller", parts=Parts().traced(EventLog(lambda _: None)), **OPTIONS)
    llm.generate("Theo", GREEDY, use_tqdm=False)
    executor = llm.engine.executor._inner

    def lose() -> list[list[float]]:
        executor._workers._started[0].process.kill()
        executor._workers._started[0].process.wait()
        return gather()

    gather, executor.ranks.gather_spans = executor.ranks.gather_spans, lose
    for _ in range(2):
        with pytest.raises(WorkerLost, match="rank 1 has ended"):
            llm.generate("Theo", GREEDY, use_tqdm=False)


def test_a_trace_of_one_process_has_no_event_of_ranks():
    events: list[Event] = []
    llm = LLM("storyteller", parts=Parts().traced(EventLog(events.append)), num_blocks=64)
    llm.generate("Theo", GREEDY, use_tqdm=False)
    assert events
    assert not rank_events(events)
