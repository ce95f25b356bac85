"""The page that replays a trace: it shows the given trace, and its state is the memory's."""

import html
import json
import os
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import pytest
from playing import play_in_node
from scheduling import CONFIG

from minipaged.cli import main as cli
from minipaged.engine.parts import Parts
from minipaged.errors import InvalidOption
from minipaged.evaluation.testing.engine_without_model import EngineWithoutModel
from minipaged.memory.baselines.contiguous import contiguous
from minipaged.tracing import events as schema
from minipaged.tracing.event_check import FIELDS, MOST_BLOCKS, find_fault
from minipaged.tracing.events import SCHEMA_VERSION, Event, EventLog
from minipaged.tracing.replay import Replay
from minipaged.tracing.snapshot import snapshot

HOSTILE = '</script><img src=x onerror="document.title=1">{{trace}} \u2028 <!-- "A" & B'


# ---- traces, and the state of the memory after every step ----------------------------------------


def truth(scheduler, is_counted: bool = True) -> dict:
    """The state of scheduler and memory, in the form in which state.js sums up its state."""
    memory = scheduler.memory
    groups = [*scheduler.running, *scheduler.waiting, *scheduler.swapped]
    request_of = {seq.seq_id: group.request_id for group in groups for seq in group.sequences}
    sequences = {
        str(seq_id): {
            "request": request_of.get(seq_id, f"prefix {seq_id}"),
            "blocks": list(table.blocks),
            "tokens": table.num_tokens,
            "swapped": memory.is_swapped(seq_id),
        }
        for seq_id, table in memory.tables.items()
    }
    held: dict[str, dict[str, list[int]]] = {"pool": {}, "swap": {}}
    for seq_id, table in memory.tables.items():
        pool = held["swap" if memory.is_swapped(seq_id) else "pool"]
        for logical, block in enumerate(table.blocks):
            number, most = pool.get(str(block), [0, 0])
            pool[str(block)] = [number + 1, max(most, table.filled(logical))]
    ref_counts: dict[str, dict[str, int]] = {"pool": {}, "swap": {}}
    if is_counted:
        pool = {b: memory.ref_count(b) + (b in memory.cached) for b in range(memory.num_blocks)}
        swap = {b: memory.swap_ref_count(b) for b in range(memory.num_swap_blocks)}
        for name, counts in (("pool", pool), ("swap", swap)):
            ref_counts[name] = {str(block): count for block, count in counts.items() if count}
    return {
        "sequences": sequences,
        "refCounts": ref_counts,
        "held": held,
        "holders": {
            name: {b: many for b, (many, _) in pool.items()} for name, pool in held.items()
        },
        "cached": sorted(memory.cached),
        "queues": {
            name: [group.request_id for group in getattr(scheduler, name)]
            for name in ("running", "waiting", "swapped")
        },
    }


def run_engine(seed: int, **options) -> tuple[list[Event], dict[int, dict]]:
    """A random load on a small pool: its events, and the truth after every step.

    `late` gets, by step, how many events there are after it, and a snapshot in their place.
    """
    random, events = Random(seed), list[Event]()
    memory = options.pop("memory", None)
    ticks, late = iter(range(10**9)), options.pop("late", {})
    log = EventLog(events.append, clock=lambda: float(next(ticks)))
    parts = Parts() if memory is None else Parts(memory=memory)
    config = replace(CONFIG, **options)
    engine = EngineWithoutModel(parts.checked().traced(log).build_scheduler(config))
    for _ in range(7):
        engine.add(
            random.randint(1, 22),
            random.randint(1, 15),
            random.choice([1, 1, 2, 3]),
            shared_prefix=random.random() < 0.6,
        )
    expected = {}
    while engine.scheduler.has_unfinished():
        engine.step()
        expected[events[-1].step] = truth(engine.scheduler, is_counted=memory is None)
        late[log.step] = len(events), log.stamp("snapshot", snapshot(engine.scheduler))
    return events, expected


def record(generate, **options) -> tuple[list[Event], dict[int, dict]]:
    """A real model at work: its events, and the truth after every step."""
    from minipaged.llm import LLM

    events: list[Event] = []
    log, expected = EventLog(events.append), {}
    llm = LLM("storyteller", parts=Parts().traced(log), **options)
    step, is_counted = llm.engine.step, options.get("memory", "paged") == "paged"

    def note() -> None:
        expected[log.step] = truth(llm.engine.scheduler, is_counted)
        del expected[log.step]["queues"]  # new requests are in no event before the next schedule

    def note_and_step():  # not right after a step: what is pinned then still has its number
        note()
        return step()

    llm.engine.step = note_and_step
    generate(llm)
    note()
    return events, expected


@pytest.fixture(scope="module")
def real_runs() -> list[tuple[list[Event], dict[int, dict]]]:
    from minipaged.sampling import BeamSearchParams, SamplingParams

    prompts = [f"Once upon a time there was a cat named {name}" for name in ("Ada", "Ben", "Cleo")]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    samples = replace(greedy, temperature=0.9, n=3)
    beams = BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True)

    def two_waves(llm) -> None:
        llm.cache_prefix("Once upon a time there was")
        for _ in range(2):
            llm.generate(prompts, greedy, use_tqdm=False)

    paged = {"block_size": 4, "num_blocks": 20, "enable_prefix_caching": True}
    return [
        record(lambda llm: llm.beam_search(prompts[:2], beams), **paged),
        record(lambda llm: llm.generate(prompts, samples, use_tqdm=False), **paged),
        record(two_waves, **paged),
        record(lambda llm: llm.generate(prompts, samples, use_tqdm=False), memory="virtual"),
    ]


def as_json(events: list[Event]) -> list[dict]:
    return [json.loads(event.to_json()) for event in events]


OTHER_VERSIONS = [(1, "version 1"), (None, "no version"), (SCHEMA_VERSION + 1, "version 3")]


def with_version(events: list[dict], version: int | None) -> list[dict]:
    """Events as an older or a newer minipaged wrote them; None: without any version."""
    changed = [event | {"v": version} for event in events]
    return [{k: v for k, v in event.items() if v is not None} for event in changed]


RANKS = Event(
    "ranks",
    1,
    0.25,
    {
        "num_all_reduces": 4,  # of which two and two are added up
        "spans": [
            {"message": 120, "compute": [900, 800, 60, 40], "all_reduce": [300, 500], "gather": 90},
            {"message": 10**10, "compute": [1900, 800, 10, 0], "all_reduce": [5, 400], "gather": 9},
        ],
    },
)
"""A step of two ranks; the second one had waited for hours."""


# ---- the program of the page, without a browser --------------------------------------------------


def assert_played(played: dict, expected: dict[int, dict]) -> None:
    """After every step the page's state is the expected one, whichever way it was reached."""
    assert played["same"], "backwards it is another state than forwards"
    states = {state["step"]: state for state in played["states"]}
    for step, right in expected.items():
        assert {name: states[step][name] for name in right} == right, f"step {step}"


def test_after_every_step_the_state_of_a_trace_is_that_of_the_memory():
    pools = [(9, "auto"), (9, "swap"), (9, "recompute"), (14, "auto"), (14, "swap"), (30, "auto")]
    runs = [
        run_engine(seed, num_blocks=num_blocks, preemption=preemption)
        for seed, (num_blocks, preemption) in enumerate(pools * 5)
    ]
    # Groups of several that cannot be swapped are recomputed, and fork again inside their tokens.
    runs += [run_engine(seed, num_blocks=12, num_swap_blocks=0) for seed in range(50, 56)]
    runs.append(run_engine(50, num_blocks=64, memory=contiguous("contiguous-max", 40)))
    kinds = {event.event for events, _ in runs for event in events}
    assert kinds >= {"fork", "copy_on_write", "swap_in", "swap_out", "cache", "evict", "preempt"}
    assert kinds >= {"deduplicate"}
    played = play_in_node([as_json(events) for events, _ in runs])
    for (_, expected), one in zip(runs, played, strict=True):
        assert_played(one, expected)


def test_a_trace_that_begins_with_a_snapshot_continues_like_the_full_one():
    kinds = [("auto", None), ("swap", None), ("recompute", None), ("auto", contiguous)]
    cut, rights = [], []
    for seed in range(12):
        preemption, build = kinds[seed % 4]
        others = {"preemption": preemption} if build is None else {}
        memory = build and build("contiguous-max", 40)
        late, size = {}, 64 if memory else 9
        events, expected = run_engine(seed, num_blocks=size, memory=memory, late=late, **others)
        for step in list(late)[:: max(1, len(late) // 8)]:
            place, begin = late[step]
            cut.append(as_json([begin, *events[place:]]))
            rights.append({later: expected[later] for later in expected if later >= step})
    for played, right in zip(play_in_node(cut), rights, strict=True):
        assert_played(played, right)
        assert played["states"][0]["step"] == min(right)  # and not an empty pool


def test_a_snapshot_distinguishes_pinned_prefixes_from_requests():
    from minipaged.llm import LLM

    log = EventLog()
    llm = LLM("storyteller", parts=Parts().traced(log), block_size=4, enable_prefix_caching=True)
    llm.cache_prefix("Once upon a time there was a cat")
    begin = log.stamp("snapshot", snapshot(llm.engine.scheduler))
    assert begin.fields["request_ids"] == {}
    [played] = play_in_node([as_json([begin])])
    assert_played(played, {log.step: truth(llm.engine.scheduler)})


def test_a_snapshot_in_the_middle_of_a_trace_replaces_the_state():
    late: dict = {}
    events, expected = run_engine(3, num_blocks=9, preemption="swap", late=late)
    place, begin = late[12]
    strangers = events[: late[5][0]]
    [played] = play_in_node([as_json([*strangers, begin, *events[place:]])])
    assert_played(played, {step: right for step, right in expected.items() if step >= 12})


def test_after_every_step_of_a_model_the_state_is_that_of_the_memory(real_runs):
    played = play_in_node([as_json(events) for events, _ in real_runs])
    kinds = {event.event for events, _ in real_runs for event in events}
    assert kinds >= {"fork", "copy_on_write", "cache", "evict", "pin", "free"}
    for (_, expected), one in zip(real_runs, played, strict=True):
        assert_played(one, expected)


@pytest.mark.parametrize(("version", "named"), OTHER_VERSIONS)
def test_a_page_refuses_events_of_another_version(version, named):
    events, _ = run_engine(3, num_blocks=9)
    [played] = play_in_node([with_version(as_json(events), version)])
    assert played["refused"] == (
        f"This trace has events of {named}, and this page reads only version {SCHEMA_VERSION}: "
        "record it again with this minipaged."
    )


def test_a_page_reads_the_version_that_is_written():
    [played] = play_in_node([as_json(hostile_events())])
    assert "refused" not in played


def test_a_trace_without_the_init_event_can_be_replayed():
    events, expected = run_engine(3, num_blocks=9, preemption="swap")
    [played] = play_in_node([as_json([e for e in events if e.event != "init"])])
    assert played["shape"]["blockSize"] == CONFIG.block_size
    assert played["shape"]["numBlocks"] <= 9
    assert_played(played, expected)


def test_unknown_events_are_skipped_and_truncated_traces_replayed():
    events, _ = run_engine(4, num_blocks=9, preemption="swap")
    strange = [Event(name, 1, 0.0, {}) for name in ("constructor", "toString", "new_kind")]
    _, cut = play_in_node([as_json([*events[:9], *strange]), as_json(events[len(events) // 2 :])])
    assert len(cut["states"]) > 2


def test_a_second_engine_on_the_same_log_begins_with_an_empty_pool():
    first, _ = run_engine(5, num_blocks=30)
    step = first[-1].step
    second, expected = run_engine(6, num_blocks=20)
    later = [replace(event, step=event.step + step) for event in second]
    [played] = play_in_node([as_json([*first, *later])])
    states = {state["step"]: state for state in played["states"]}
    last = max(expected)
    right = {name: expected[last // 2][name] for name in ("sequences", "cached", "held")}
    assert {name: states[step + last // 2][name] for name in right} == right


def test_the_sentences_describe_the_events():
    events, _ = run_engine(1, num_blocks=9, preemption="swap")
    [played] = play_in_node([as_json(events)])
    words = " ".join(note for state in played["states"] for note in state["notes"])
    for phrase in (
        "is admitted: block",
        "is preempted (swapping), and moves",
        "is swapped in: ",
        "(copy-on-write)",
        "Prefix cache hit: block",
        "the prefix cache evicts",
        "has ended: it gives back",
    ):
        assert phrase in words
    assert "undefined" not in words
    assert "NaN" not in words


def test_each_rank_gets_a_sentence_until_the_next_step():
    schedule = hostile_events()[-1]
    later = replace(schedule, step=2, fields={**schedule.fields, "num_scheduled_tokens": {}})
    [played] = play_in_node([as_json([*hostile_events(), RANKS, later])])
    first, second = (state for state in played["states"] if state["step"] in (1, 2))
    assert first["notes"][-2:] == [
        "Rank 0 computed for 1.8 ms and spent 0.8 ms in 4 all-reduces.",
        "Rank 1 computed for 2.7 ms and spent 0.4 ms in 4 all-reduces.",
    ]
    assert (len(first["ranks"]), second["ranks"]) == (2, [])
    assert second["notes"] == []


def test_eight_ranks_get_a_sentence_and_the_others_are_counted():
    one = RANKS.fields["spans"][0]
    many = replace(RANKS, fields={"num_all_reduces": 1, "spans": [one] * 11})
    [played] = play_in_node([as_json([*hostile_events(), many])])
    *_, eighth, rest = played["states"][-1]["notes"]
    assert eighth == "Rank 7 computed for 1.8 ms and spent 0.8 ms in 1 all-reduce."
    assert rest == "The lanes show 3 more."


# ---- traces with fields that cannot be -----------------------------------------------------------

BILLION = 10**9
ODD_VALUES = [
    -1, 0, 1, 1.0, 1.5, 7, 200_000, BILLION, 10**400, 1e308, -0.5, True, None, "",
    "7", "pool", "swap", [], [1], [[1, 2]], [[1]], ["a"], [None], [BILLION], [-1], {}, {"0": 1},
    {"0": [1]}, {"0": [BILLION]}, {"x": 1}, {"-1": 1}, {"": [1]}, {"0": -1}, {"0": "1"}, {"é": 1},
]  # fmt: skip


def one_of_each_kind() -> list[dict]:
    """Events of real runs, one of each kind, with all their fields."""
    runs = [run_engine(seed, num_blocks=9, preemption="swap") for seed in range(4)]
    runs += [run_engine(seed, num_blocks=9, preemption="recompute") for seed in range(4)]
    late: dict = {}
    run_engine(1, num_blocks=9, preemption="swap", late=late)
    runs.append(([late[9][1]], {}))
    found = {e["event"]: e for events, _ in runs for e in as_json(events)}
    found["pin"] = {**found["cache"], "event": "pin"}
    found["ranks"] = {**found["schedule"], **as_json([RANKS])[0]}
    found["out_of_memory"] = {**found["preempt"], "event": "out_of_memory"}
    return list(found.values())


def test_python_and_the_page_use_the_same_fields_and_traces_have_them_all():
    kinds = one_of_each_kind()
    assert {event["event"] for event in kinds} == FIELDS.keys()
    for event in kinds:
        assert find_fault(event) is None
        assert event.keys() >= {"v", "step", "time", *FIELDS[event["event"]]}


def test_python_and_the_page_refuse_the_same_fields_in_the_same_words():
    changed = []
    for event in one_of_each_kind():
        fields = ["event", "step", "time", *FIELDS[event["event"]]]
        changed += [{k: v for k, v in event.items() if k != field} for field in fields]
        changed += [event | {field: value} for field in fields for value in ODD_VALUES]
    ours = [find_fault(event) for event in changed]
    assert sum(fault is not None for fault in ours) > 1000
    played = play_in_node([[event] for event in changed])  # what is accepted plays, too
    for event, fault, one in zip(changed, ours, played, strict=True):
        theirs = one.get("refused")
        assert (theirs is None) == (fault is None), event
        if fault is not None:  # numbers such as 1e308 are written otherwise
            before, _, after = fault.partition(" is ")
            assert f"since {before}" in theirs
            assert after.partition("and must be")[2] in theirs


@pytest.mark.parametrize(
    ("event", "sentence"),
    [
        ({"event": "init", "num_blocks": BILLION}, "num_blocks of init is 1000000000, and must"),
        ({"event": "evict", "block": BILLION}, "block of evict is 1000000000, and must be a whole"),
        ({"event": "fork", "num_tokens": -1}, "num_tokens of fork is -1, and must be a whole"),
        ({"event": "preempt", "mode": "gone"}, 'mode of preempt is "gone", and must be "swap" or'),
        ({"event": "admit", "num_tokens": {}}, "num_tokens of admit lacks sequence"),
        (
            {"event": "ranks", "spans": 7},
            "spans of ranks is 7, and must be a list with message, comp",
        ),
        ({"event": "snapshot", "num_tokens": {}}, "num_tokens of snapshot lacks sequence"),
        ({"event": "snapshot", "ref_counts": {str(MOST_BLOCKS): 1}}, "ref_counts of snapshot is"),
    ],
)
def test_an_invalid_field_is_refused_with_what_it_must_be(tmp_path, event, sentence):
    whole = next(e for e in one_of_each_kind() if e["event"] == event["event"]) | event
    path = write_lines(tmp_path / "trace.jsonl", GOOD, json.dumps(whole))
    with pytest.raises(InvalidOption, match=f"line 2 cannot be replayed, since {sentence}"):
        Replay.read(path)
    [played] = play_in_node([[json.loads(GOOD), whole]])
    assert f"event 2 cannot be replayed, since {sentence}" in played["refused"]


def test_spans_that_do_not_fit_together_are_refused():
    [good, _] = RANKS.fields["spans"]
    damaged = [{name: times for name, times in good.items() if name != lost} for lost in good]
    damaged += [good | {name: odd} for name in good for odd in (None, -1, "1", [None], {})]
    damaged += [good | {"compute": [1, 2, 3]}, good | {"all_reduce": [1]}, 7, None]
    whole = as_json([RANKS])[0]
    traces = [whole | {"spans": [good, each]} for each in damaged]
    for event, played in zip(traces, play_in_node([[each] for each in traces]), strict=True):
        assert "spans of ranks is" in (find_fault(event) or ""), event
        assert "spans of ranks is" in played["refused"]


def test_unknown_events_may_have_any_fields(tmp_path):
    strange = {"v": SCHEMA_VERSION, "step": 1, "time": 0.5, "event": "new", "block": BILLION}
    path = write_lines(tmp_path / "trace.jsonl", GOOD, json.dumps(strange))
    assert len(Replay.read(path).events) == 2
    [played] = play_in_node([[json.loads(GOOD), strange, strange | {"pairs": 7, "blocks": {}}]])
    assert played["shape"]["numBlocks"] == 0


def test_the_largest_pool_allowed_can_be_replayed():
    init = {"num_blocks": MOST_BLOCKS, "num_swap_blocks": MOST_BLOCKS, "block_size": 16}
    [played] = play_in_node([as_json([Event("init", 0, 0.0, init), *hostile_events()[1:]])])
    assert played["shape"]["numBlocks"] == MOST_BLOCKS


# ---- the page ------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts.append(data)


def hostile_events() -> list[Event]:
    queues = {"running": [HOSTILE], "waiting": [], "swapped": []}
    admitted = {
        "request_id": HOSTILE,
        "block_tables": {0: [1]},
        "num_tokens": {0: 3},
        "num_cached_tokens": {0: 0},
    }
    return [
        Event("init", 0, 0.0, {"num_blocks": 4, "num_swap_blocks": 0, "block_size": 4}),
        Event("admit", 1, 0.1, admitted),
        Event("schedule", 1, 0.2, {**queues, "num_scheduled_tokens": {0: 3}}),
    ]


def test_names_of_requests_and_titles_cannot_become_markup():
    page = Elements(Replay(hostile_events(), title=HOSTILE).html())
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "img" not in {tag for tag, _ in page.tags}
    trace = json.loads(page.scripts[0])
    assert trace == as_json(hostile_events())


def test_the_page_refers_to_nothing_outside_itself():
    events, _ = run_engine(2, num_blocks=14)
    page = Replay(events).html()
    assert not [tag for tag, attributes in Elements(page).tags if {"src", "href"} & set(attributes)]
    assert "@import" not in page
    assert page.replace("http://www.w3.org/2000/svg", "").count("://") == 0
    assert "{{" not in page.replace("{{trace}}", "")


def test_in_a_notebook_the_page_is_a_frame_that_holds_all_of_it():
    shown = Replay(hostile_events(), title=HOSTILE)
    [(tag, attributes)] = Elements(shown._repr_html_()).tags
    assert tag == "iframe"
    assert attributes["class"] == "replay"
    assert attributes["title"] == HOSTILE
    assert attributes["srcdoc"] == shown.html()


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_a_trace_is_read_as_it_was_written(tmp_path):
    events, _ = run_engine(2, num_blocks=14)
    path = write_lines(tmp_path / "trace.jsonl", *(event.to_json() for event in events))
    read = Replay.read(path)
    assert read.title == "trace.jsonl"
    assert as_json(read.events) == as_json(events)
    assert Replay.read(str(path), title="Two").title == "Two"


GOOD = f'{{"v": {SCHEMA_VERSION}, "step": 1, "time": 0.5, "event": "free", "seq_id": 0}}'


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([], "is empty"),
        (["", "  "], "is empty"),
        ([GOOD, "{"], "line 2 is not JSON"),
        ([GOOD, GOOD[:-9]], "line 2 is not JSON"),
        (["[1]"], "line 1 is not an event"),
        (['{"a": 1}'], "line 1 is not an event"),
        ([GOOD, GOOD.replace('"step": 1, ', "")], "line 2 cannot be .* since free has no step"),
        ([GOOD.replace("0.5", '"x"')], 'line 1 cannot .* time of free is "x", and must be a num'),
        ([GOOD.replace("0.5", "NaN")], "time of free is NaN, and must be a number of seconds"),
        ([GOOD.replace('"seq_id": 0', '"seq_id": ' + "[" * 800 + "]" * 800)], "seq_id of free is"),
        (["[" * 100_000], "line 1 is not JSON"),
    ],
)
def test_a_damaged_trace_is_refused_with_its_line(tmp_path, lines, sentence):
    path = write_lines(tmp_path / "trace.jsonl", *lines)
    with pytest.raises(InvalidOption, match=sentence):
        Replay.read(path)


@pytest.mark.parametrize(("version", "named"), OTHER_VERSIONS)
def test_a_trace_of_another_version_is_refused_in_one_sentence(tmp_path, version, named):
    [old] = with_version([json.loads(GOOD)], version)
    path = write_lines(tmp_path / "trace.jsonl", json.dumps(old))
    with pytest.raises(InvalidOption) as refusal:
        Replay.read(path)
    assert str(refusal.value) == (
        f"{path} has events of {named} (line 1), but this minipaged reads only version "
        f"{SCHEMA_VERSION}: record the trace again with this minipaged."
    )


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff\xfe")
    for path in (tmp_path / "picture", tmp_path / "missing", tmp_path):
        with pytest.raises(InvalidOption, match=path.name):
            Replay.read(path)


def test_the_page_is_written_atomically(tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    shown = Replay(hostile_events(), title="old")
    shown.save(page)
    assert page.read_text(encoding="utf-8") == shown.html()

    def fail(*_: object, **__: object) -> None:
        (tmp_path / "page.html.part").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(InvalidOption, match="No space left"):
        Replay(hostile_events(), title="new").save(page)
    assert page.read_text(encoding="utf-8") == shown.html()
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_page_cannot_take_the_place_of_a_folder(tmp_path):
    with pytest.raises(InvalidOption, match="folder"):
        Replay(hostile_events()).save(tmp_path)
    with pytest.raises(InvalidOption, match="cannot be written"):
        Replay(hostile_events()).save(tmp_path / "no" / "page.html")


# ---- the event, and the command ------------------------------------------------------------------


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_a_trace_begins_with_the_sizes_of_its_pools(preemption):
    events, _ = run_engine(1, num_blocks=14, preemption=preemption)
    assert (events[0].event, events[0].step) == ("init", 0)
    assert events[0].fields == {
        "num_blocks": 14,
        "num_swap_blocks": CONFIG.num_swap_blocks,
        "block_size": CONFIG.block_size,
    }
    assert [event.event for event in events].count("init") == 1


def minipaged(capsys, monkeypatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["minipaged", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    captured = capsys.readouterr()
    return exit_info.value.code, captured.out, captured.err


@pytest.fixture
def trace_file(tmp_path) -> Path:
    events, _ = run_engine(2, num_blocks=14)
    return write_lines(tmp_path / "trace.jsonl", *(event.to_json() for event in events))


def test_the_command_writes_the_page_to_the_given_path(capsys, monkeypatch, tmp_path, trace_file):
    page = tmp_path / "page.html"
    monkeypatch.setattr("webbrowser.open", lambda _: pytest.fail("it was told not to"))
    command = ("trace", "view", str(trace_file), "--output", str(page), "--no-open")
    code, out, _ = minipaged(capsys, monkeypatch, *command)
    assert code == 0
    assert out.strip() == str(page)
    assert html.escape(trace_file.name) in page.read_text(encoding="utf-8")


def test_the_command_opens_a_page_in_a_temporary_folder(capsys, monkeypatch, tmp_path, trace_file):
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, out, _ = minipaged(capsys, monkeypatch, "trace", "view", str(trace_file))
    assert code == 0
    assert opened == [Path(out.strip()).as_uri()]
    assert Path(out.strip()).is_file()


def test_the_command_refuses_an_invalid_trace_and_leaves_no_page(capsys, monkeypatch, tmp_path):
    trace, page = write_lines(tmp_path / "trace.jsonl", GOOD, "{"), tmp_path / "page.html"
    command = ("trace", "view", str(trace), "--output", str(page), "--no-open")
    code, _, err = minipaged(capsys, monkeypatch, *command)
    assert code == 2
    assert "line 2 is not JSON" in err
    assert list(tmp_path.iterdir()) == [trace]


# ---- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("there is no Chromium on this machine: name one in CHROMIUM")
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens a replay; at the end there must have been no request and no error."""
    complaints: list[str] = []
    contexts = []

    def open_it(events, title="A trace", **options):
        path = tmp_path / "page.html"
        Replay(events, title).save(path)
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text))
        page.on("request", lambda one: one.url == path.as_uri() or complaints.append(one.url))
        page.goto(path.as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not complaints


def test_in_every_step_the_page_shows_the_memory(open_page):
    events, expected = run_engine(1, num_blocks=9, preemption="swap")
    page = open_page(events)
    for step, right in expected.items():
        page.evaluate("(step) => window.replay.goTo(step)", step)
        state = page.evaluate("window.replay.state()")
        assert {name: state[name] for name in right} == right
        shown = page.evaluate(
            "[...document.querySelectorAll('#pools .held')].map((b) => b.dataset.place)"
        )
        held = [f"{pool}:{block}" for pool, blocks in right["held"].items() for block in blocks]
        assert sorted(shown) == sorted(held)
        tables = page.evaluate(
            "[...document.querySelectorAll('.entry')].map((e) => e.dataset.place)"
        )
        entries = [
            f"{'swap' if table['swapped'] else 'pool'}:{block}"
            for table in right["sequences"].values()
            for block in table["blocks"]
        ]
        assert sorted(tables) == sorted(entries)


def test_a_hostile_name_is_shown_as_text(open_page):
    page = open_page(hostile_events(), title=HOSTILE)
    page.evaluate("window.replay.goTo(1)")
    assert page.locator("h1").text_content() == HOSTILE
    assert page.locator("#queues .id").first.text_content() == HOSTILE
    assert page.locator("img").count() == 0


def test_a_page_with_events_of_another_version_refuses_them(open_page, monkeypatch):
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 1)
    page = open_page(hostile_events())
    assert "events of version 1" in page.locator("#empty").inner_text()
    assert page.locator("#player").is_hidden()


def test_an_incomplete_trace_is_refused_in_a_sentence(open_page):
    page = open_page([*hostile_events(), Event("admit", 2, 0.3, {"request_id": "x"})])
    said = page.locator("#empty").inner_text()
    assert said == (
        "This trace is damaged: event 4 cannot be replayed, since admit has no block_tables. "
        "Record it again."
    )
    assert page.locator("#player").is_hidden()


def test_a_trace_with_invalid_times_is_refused_in_a_sentence(open_page):
    page = open_page([*hostile_events(), Event("free", 2, float("nan"), {"seq_id": 0})])
    assert page.locator("#empty").inner_text().startswith("This trace is no JSON")
    assert page.locator("#player").is_hidden()


@pytest.mark.parametrize("events", [[], hostile_events()[:1]], ids=["no events", "no steps"])
def test_a_trace_without_steps_is_reported(open_page, events):
    page = open_page(events)
    assert page.locator("#empty").is_visible()
    assert page.locator("#player").is_hidden()


def test_the_keys_and_the_buttons_move_through_the_steps(open_page):
    events, expected = run_engine(1, num_blocks=9, preemption="swap")
    page = open_page(events)
    last = max(expected)

    def step() -> int:
        return page.evaluate("window.replay.state().step")

    for key, there in [("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", last)]:
        page.keyboard.press(key)
        assert step() == there
    page.keyboard.press("Home")
    assert step() == 0
    page.get_by_role("button", name="One step forward").click()
    assert step() == 1
    page.locator("#place").fill("5")
    assert step() == 5
    page.locator("#finely").check()
    before = page.evaluate("window.replay.state().events")
    page.locator("#forward").click()
    assert page.evaluate("window.replay.state().events") > before
    assert step() in (5, 6)
    page.evaluate("window.replay.goTo(3)")
    page.locator("#speed").select_option("15")
    page.locator("h1").click()
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Space")
    page.wait_for_function("window.replay.state().step > 5")
    page.keyboard.press("Space")
    assert page.get_by_role("button", name="Play").count() == 1


def test_a_block_is_explained_by_pointer_focus_and_tap(open_page):
    page = open_page(hostile_events())
    page.evaluate("window.replay.goTo(1)")
    block = page.locator(".block[data-place='pool:1']")
    block.hover()
    assert "request A, 3 of 4 slots filled" in page.locator("#about").inner_text()
    assert page.locator(".entry.linked").count() == 1
    page.locator("h1").hover()
    page.locator(".block[data-place='pool:0']").focus()
    assert "Block 0: free" in page.locator("#about").inner_text()
    page.keyboard.press("ArrowRight")
    assert "Block 1: request A" in page.locator("#about").inner_text()


def test_each_rank_has_a_lane_in_the_order_of_time(open_page):
    page = open_page([*hostile_events(), RANKS])
    page.evaluate("window.replay.goTo(1)")
    lanes = page.locator(".lane")
    assert [lane.get_attribute("aria-label") for lane in lanes.all()] == [
        "Rank 0: message 0.1 ms, compute 1.8 ms, all-reduce 0.8 ms (4), gather 0.09 ms",
        "Rank 1: message 10,000,000 ms, compute 2.7 ms, all-reduce 0.4 ms (4), gather 0.01 ms",
    ]
    of_one = "(lane) => [...lane.querySelectorAll('.span')].map((span) => span.className)"
    kinds = ["message", "compute", "all_reduce", "compute", "all_reduce"]
    kinds += ["compute", "gather", "compute"]
    assert lanes.nth(0).evaluate(of_one) == [f"span {kind}" for kind in kinds]
    assert lanes.nth(1).evaluate(of_one)[0] == "span message cut"
    edges = """(lane) => [...lane.querySelectorAll('.span')].flatMap(({ style }) => {
        const [left, width] = [parseFloat(style.left), parseFloat(style.width)];
        return [left, left + width].map((edge) => Math.round(100 * edge) / 100);
    })"""
    for lane in lanes.all():
        begins_and_ends = lane.evaluate(edges)
        assert begins_and_ends == sorted(begins_and_ends)
        assert 0 <= begins_and_ends[0] < begins_and_ends[-1] <= 100
        after_the_message = lane.locator(".arrival").evaluate("(a) => parseFloat(a.style.left)")
        assert after_the_message == pytest.approx(25)  # a third of what comes after it
    for word in ("message", "compute", "all-reduce", "gather"):
        assert word in page.locator("#ranks-key").inner_text()
    assert "3.1 ms later" in page.locator("#ranks-axis").inner_text()
    assert "All-reduce: the ranks add up" in page.locator("#legend-body").text_content()


def test_lanes_are_empty_until_the_ranks_have_computed_the_step(open_page):
    page = open_page([*hostile_events(), RANKS])
    page.evaluate("window.replay.goToEvent(3)")
    assert page.locator(".lane").count() == 2
    assert page.locator(".lane .span").count() == 0
    assert "not computed this step yet" in page.locator("#ranks-axis").inner_text()


def test_a_trace_of_one_process_has_no_lanes(open_page):
    page = open_page(hostile_events())
    page.evaluate("window.replay.goTo(1)")
    assert page.locator("#ranks").is_hidden()
    assert "All-reduce" not in page.locator("#legend-body").text_content()


@pytest.mark.parametrize("width", [360, 700, 1280])
def test_the_page_is_as_wide_as_its_window(open_page, width):
    events, expected = run_engine(1, num_blocks=9, preemption="swap")
    events.append(replace(RANKS, step=max(expected)))
    page = open_page(events, title=HOSTILE * 3, viewport={"width": width, "height": 640})
    for step in expected:
        page.evaluate("(step) => window.replay.goTo(step)", step)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_colours_follow_the_embedding_page_or_else_the_system(open_page):
    page = open_page(hostile_events(), color_scheme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    page.evaluate("document.documentElement.dataset.scheme = 'light'")
    light = page.evaluate(colour)
    page.emulate_media(color_scheme="light")
    page.evaluate("document.documentElement.dataset.scheme = 'dark'")
    assert (page.evaluate(colour), light) == (dark, "rgb(255, 255, 255)")
    assert dark != light
