"""Lab 9: a better policy is shown to be better, and one that cheats is refused by a sentence."""

import json
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from minipaged.cli import lab_challenge
from minipaged.cli.main import app
from minipaged.errors import CheckFailed, InvalidOption
from minipaged.evaluation.sim.traces import TraceRequest
from minipaged.labs import challenge
from minipaged.labs.challenge import parts_of, read_leaderboard, serve, traces
from minipaged.memory import BlockAllocator, BlockManager, PrefixCache
from minipaged.scheduler.fcfs import FCFSScheduler

BUSY = [TraceRequest(0.0, 300 + 7 * i % 90, 40 + i % 50, 48) for i in range(80)]
"""More than the pool holds, all at once: the last ones are preempted."""


class ShortestPromptFirst(FCFSScheduler):
    def schedule(self):
        self.waiting.sort(key=lambda group: group.sequences[0].num_tokens)
        return super().schedule()


def largest(candidates):
    return max(candidates, key=lambda group: group.sequences[0].num_computed_tokens)


def test_a_policy_can_beat_the_default_one():
    trace = traces(seed=0)["chat"]
    library = serve("chat", trace, {})
    better = serve("chat", trace, {"scheduler": ShortestPromptFirst, "select_victim": largest})
    assert better.mean < 0.95 * library.mean
    assert better.p90 < library.p90
    assert library == serve("chat", trace, parts={})  # nothing of it is left to chance


def test_the_starter_scores_exactly_as_the_default_policy(tmp_path):
    file = tmp_path / challenge.FILE_NAME
    file.write_text(challenge.STARTER)
    parts = parts_of(file)
    assert set(parts) == {"scheduler", "select_victim"}
    assert serve("busy", BUSY, parts) == serve("busy", BUSY, {})


def test_a_policy_may_swap_and_use_a_custom_memory():
    class Swaps(FCFSScheduler):
        def __init__(self, config, *others):
            super().__init__(replace(config, preemption="swap"), *others)

    class LowestFirst(BlockAllocator):
        def __init__(self, num_blocks):
            super().__init__(num_blocks)
            self._free.reverse()

    parts = {"scheduler": Swaps, "memory": BlockManager, "allocator": LowestFirst}
    assert serve("busy", BUSY, parts).num_preemptions > 0


# ---- what is refused -----------------------------------------------------------------------------


class LosesRequests(FCFSScheduler):
    def add(self, group):
        if group.request_id != "7":
            super().add(group)


class EndsRequests(FCFSScheduler):
    def schedule(self):
        output = super().schedule()
        if self.running:
            self.abort(group := self.running[-1])
            output = replace(output, ended=(group,))
        return output


class GivesTokensItself(FCFSScheduler):
    def commit(self, output):
        super().commit(output)
        for scheduled in output.sequences:
            scheduled.seq.append(0)


class ClaimsToHaveComputed(FCFSScheduler):
    def schedule(self):
        output = super().schedule()
        sequences = list(output.sequences)
        for number, scheduled in enumerate(sequences):
            if scheduled.num_new_tokens > 20:
                scheduled.seq.mark_computed(scheduled.num_new_tokens - 1)
                sequences[number] = scheduled._replace(num_new_tokens=1)
        return replace(output, sequences=tuple(sequences))


class SamplesTooEarly(FCFSScheduler):
    def schedule(self):
        output = super().schedule()
        one_each = tuple(s._replace(num_new_tokens=1) for s in output.sequences)
        return replace(output, sequences=one_each)


class ComputesTooMuch(FCFSScheduler):
    def __init__(self, config, *others):
        super().__init__(replace(config, max_num_batched_tokens=10**6), *others)


class SwapsForNothing(FCFSScheduler):
    def __init__(self, config, *others):
        super().__init__(replace(config, preemption="swap"), *others)

    def schedule(self):
        return replace(super().schedule(), swap_in=())


class RunsTwice(FCFSScheduler):
    def schedule(self):
        output = super().schedule()
        return replace(output, sequences=output.sequences + output.sequences[:1])


class Stumbles(FCFSScheduler):
    def schedule(self):
        return super().schedule() if not self.running else 1 // 0


class TwiceThePool(BlockManager):
    def __init__(self, *, num_blocks, **options):
        super().__init__(num_blocks=2 * num_blocks, **options)


class BlocksForTwo(BlockAllocator):
    """Hands out what is taken once nothing is free."""

    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self.num_real = num_blocks

    @property
    def num_free(self):
        return 10**6

    def allocate(self):
        if not self._free:
            self._free = list(range(self.num_real))
        block = self._free.pop()
        self._ref_counts[block] += 1
        return block

    def free(self, block):
        pass


class NegativeBlocks(BlockAllocator):
    def allocate(self):
        return super().allocate() - 1

    def share(self, block):
        super().share(block + 1)

    def free(self, block):
        super().free(block + 1)

    def ref_count(self, block):
        return super().ref_count(block + 1)


class FindsWhatIsNotThere(PrefixCache):
    def find(self, seq):
        found = super().find(seq)
        return found * 2 if len(found) * 2 * 16 < seq.num_tokens else found


class LosesBlocks(BlockManager):
    def free(self, seq):
        self.tables[seq.seq_id].blocks.pop()
        super().free(seq)


@pytest.mark.parametrize(
    ("role", "part", "complaint"),
    [
        (
            "scheduler",
            LosesRequests,
            "nothing is scheduled, but 1 request waits: request 7 came first",
        ),
        ("scheduler", EndsRequests, "step 1: request 0 is ended before its"),
        ("scheduler", GivesTokensItself, "has 302 tokens, but should have 301"),
        ("scheduler", ClaimsToHaveComputed, "never written there"),
        ("scheduler", SamplesTooEarly, "request 0 has 300 tokens left to compute, but 1 are"),
        ("scheduler", ComputesTooMuch, "tokens are scheduled, but at most 2560 are allowed"),
        ("scheduler", SwapsForNothing, "never written there, or that were overwritten"),
        ("scheduler", RunsTwice, "a sequence is scheduled twice"),
        ("scheduler", Stumbles, "ZeroDivisionError: .*test_challenge.py, line"),
        ("memory", TwiceThePool, "but the pool has 983 blocks, numbered from 0"),
        ("memory", LosesBlocks, "all requests have finished, but .* blocks are not free"),
        ("allocator", BlocksForTwo, "two sequences write to|which another one reads|never written"),
        ("allocator", NegativeBlocks, "but the pool has 983 blocks, numbered from 0"),
        ("prefix_cache", FindsWhatIsNotThere, "never written there"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_part_that_cheats_is_refused(role, part, complaint):
    with pytest.raises(CheckFailed, match=complaint):
        serve("busy", BUSY, {role: part})


def test_no_policy_sees_how_much_a_request_will_generate():
    told = []

    class Curious(FCFSScheduler):
        def add(self, group):
            told.append(group.sequences[0].max_output_len)
            super().add(group)

    serve("busy", BUSY[:3], {"scheduler": Curious})
    assert told == [None] * 3


GOOD = {"name": "x", "date": "2026-01-01", "seed": 0, "score": 1.0, "served": []}
DAMAGED = (
    "not JSON",
    "[]",
    "7",
    '{"name": "nobody"}',
    "[" * 100_000,
    *(json.dumps(GOOD | {name: wrong}) for name, wrong in (
        ("name", 3), ("date", None), ("seed", "0"), ("seed", True), ("score", "1"),
        ("score", [1]), ("score", float("nan")), ("score", 10**400), ("served", {}),
    )),
)  # fmt: skip


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """`minipaged lab ...` in an empty folder, with traces of some seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(challenge, "SECONDS", 10.0)

    def call(*words):
        result = CliRunner().invoke(app, ["lab", *words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output

    return call


def test_a_run_adds_a_line_to_the_leaderboard_and_shows_it_sorted(lab, tmp_path):
    assert "then run minipaged lab challenge" in lab("start", "9")
    board = tmp_path / "board.jsonl"
    best = {"name": "best", "date": "2026-01-01", "seed": 0, "score": 0.5, "served": []}
    worst = {"name": "worst", "date": "2026-01-01", "seed": 0, "score": 1.5, "served": []}
    board.write_text(f"{json.dumps(worst)}\n{json.dumps(best)}")
    printed = lab("challenge", "--leaderboard", str(board), "--name", "me")
    assert "score 1.000: your mean latency / the library's; lower is better." in printed
    assert [entry.name for entry in read_leaderboard(board)] == ["best", "me", "worst"]
    shown = [line.split()[1] for line in printed.splitlines()[-3:]]
    assert shown == ["best", "me", "worst"]
    mine = json.loads(board.read_text().splitlines()[-1])
    assert {served["workload"] for served in mine["served"]} == {"assistant", "chat"}
    assert not list(tmp_path.glob("*.part"))


def test_a_damaged_leaderboard_is_left_as_it_is(lab, tmp_path):
    lab("start", "9")
    board = tmp_path / "board.jsonl"
    for damaged in DAMAGED:
        board.write_text(damaged)
        with pytest.raises(InvalidOption, match="line 1, is not an entry of a leaderboard"):
            lab("challenge", "--leaderboard", str(board))
        assert board.read_text() == damaged


def test_a_leaderboard_that_is_not_text_is_refused_in_a_sentence(lab, tmp_path, monkeypatch):
    lab("start", "9")
    board = tmp_path / "board.jsonl"
    board.write_bytes(b"\xff\xfe{}")
    with pytest.raises(InvalidOption, match="is not text in UTF-8"):
        lab("challenge", "--leaderboard", str(board))
    with pytest.raises(InvalidOption, match="cannot be read"):
        lab("challenge", "--leaderboard", str(tmp_path))
    monkeypatch.setattr(challenge, "LONGEST_LEADERBOARD", 2)
    with pytest.raises(InvalidOption, match="a leaderboard has at most 2"):
        lab("challenge", "--leaderboard", str(board))


def test_a_name_on_a_leaderboard_is_shown_as_it_is_written():
    one = challenge.Entry("[/red] [bold]x", "2026-01-01", 0, 1.0, [])
    console = Console(width=80)
    with console.capture() as shown:
        console.print(lab_challenge._sorted([one]))
    assert "[/red] [bold]x" in shown.get()


def test_a_file_without_parts_is_refused_with_the_names_to_use(lab, tmp_path):
    with pytest.raises(InvalidOption, match="begin with `minipaged lab start 9`"):
        lab("challenge")
    (tmp_path / "mine.py").write_text("class Scheduler: ...\n")
    with pytest.raises(InvalidOption, match=r"mine.py defines none of MyScheduler, my_victim"):
        lab("challenge", "mine.py")


def test_the_list_marks_the_challenge_as_open(lab):
    assert "the open challenge" in lab("list")
    with pytest.raises(InvalidOption, match="lab 9 is the open challenge, which has no tasks"):
        lab("check", "9")


def test_starting_again_keeps_a_copy_of_the_old_file(lab, tmp_path):
    lab("start", "9")
    file = tmp_path / challenge.FILE_NAME
    file.write_text("mine")
    with pytest.raises(InvalidOption, match="exists already"):
        lab("start", "9")
    lab("reset", "9")
    assert file.read_text() == challenge.STARTER
    assert (tmp_path / "lab9_challenge.py.1").read_text() == "mine"
