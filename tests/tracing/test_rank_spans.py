"""The event of a step of several ranks: what it holds, and how large it is."""

import pytest

from minipaged.tracing.event_check import find_fault
from minipaged.tracing.events import Event, EventLog, TracedExecutor
from minipaged.tracing.rank_spans import rank_spans


def seconds_of(num_all_reduces: int, scale: float = 1e-6) -> list[float]:
    """A rank's spans, all of different lengths."""
    return [scale * (7 + n) for n in range(2 * num_all_reduces + 4)]


def test_spans_are_sent_by_kind_in_microseconds_and_in_order():
    fields = rank_spans([[4e-6, 10e-6, 1e-6, 20e-6, 2e-6, 30e-6, 3e-6, 40e-6], seconds_of(2)])
    assert fields["num_all_reduces"] == 2
    assert fields["spans"][0] == {
        "message": 4,
        "compute": [10, 20, 30, 40],
        "all_reduce": [1, 2],
        "gather": 3,
    }
    assert len(fields["spans"]) == 2


def test_a_step_without_tokens_has_no_collectives():
    fields = rank_spans([[5e-6, 9e-6], [8e-6, 7e-6]])
    assert fields["num_all_reduces"] == 0
    assert fields["spans"][1] == {"message": 8, "compute": [7, 0], "all_reduce": [], "gather": 0}


@pytest.mark.parametrize(("num_layers", "num_ranks"), [(4, 2), (30, 2), (80, 8), (126, 16)])
def test_an_event_has_about_two_kilobytes_and_loses_no_span(num_layers, num_ranks):
    num_all_reduces = 2 * num_layers + 1
    ranks = [seconds_of(num_all_reduces, scale=9.7e-6)] * num_ranks
    fields = rank_spans(ranks)
    event = Event("ranks", 99_999, 1234.567891, fields)
    assert len(event.to_json()) < 2400
    assert find_fault({"event": "ranks", "step": 1, "time": 0.5, **fields}) is None
    assert fields["num_all_reduces"] == num_all_reduces
    for given, spans in zip(ranks, fields["spans"], strict=True):
        told = [spans["message"], *spans["compute"], *spans["all_reduce"], spans["gather"]]
        assert sum(told) == pytest.approx(1e6 * sum(given), abs=len(given))
        all_reduces = 1e6 * sum(given[2:-2:2])
        assert sum(spans["all_reduce"]) == pytest.approx(all_reduces, abs=num_all_reduces)


def test_a_few_all_reduces_are_sent_one_by_one():
    [spans, _] = rank_spans([seconds_of(61)] * 2)["spans"]
    assert len(spans["all_reduce"]) == 61


class StubExecutor:
    """Remembers whether it was asked for times."""

    is_traced = False
    spans = ([3e-6, 5e-6], [4e-6, 6e-6])

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def run(self, step: str) -> str:
        self.asked.append(self.is_traced)
        return f"logits of {step}"


def test_ranks_send_times_only_if_there_is_a_listener():
    inner, log, events = StubExecutor(), EventLog(), []
    executor = TracedExecutor(inner, log)
    assert executor.run("a") == "logits of a"
    log.listeners.append(events.append)
    executor.run("b")
    log.listeners.clear()
    executor.run("c")
    assert inner.asked == [False, True, False]
    assert [event.event for event in events] == ["ranks"]
