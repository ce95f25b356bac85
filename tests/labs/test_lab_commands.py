"""`minipaged lab ...` in a folder: its messages about wrong numbers, hints and damaged files."""

import json
import re
from pathlib import Path

import pytest
from stub_chapters import make_chapters
from typer.testing import CliRunner

from minipaged.cli.main import app
from minipaged.errors import InvalidOption
from minipaged.labs.catalogue import LABS
from minipaged.labs.progress import FILE, Progress


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """`lab("list")`: what `minipaged lab list` prints in an empty folder. Raises its errors."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> str:
        result = CliRunner().invoke(app, ["lab", *words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.stdout

    return call


@pytest.mark.parametrize(
    "command", ["start", "brief", "check", "watch", "hint", "diff", "reset", "grade"]
)
def test_an_unknown_lab_is_refused_with_the_numbers_of_the_list(lab, command):
    listed = re.findall(r"^ *(\d+) ", lab("list"), flags=re.MULTILINE)
    words = [command, "99", *["file.py"] * (command == "grade")]
    with pytest.raises(InvalidOption, match=f"no lab 99: .* labs {listed[0]} to {listed[-1]}"):
        lab(*words)


@pytest.mark.parametrize("words", [("check", "1"), ("hint", "1")])
def test_an_unknown_task_is_refused_in_the_same_words(lab, words):
    lab("start", "1")
    with pytest.raises(InvalidOption, match="lab 1 has no task 7: its tasks are 1 to 4"):
        lab(*words, "--task", "7")


def test_each_hint_is_given_once_and_then_all_of_them_again(lab):
    hints = LABS[0].tasks[0].hints
    told = [lab("hint", "1", "--task", "1") for _ in range(len(hints) + 1)]
    for hint, text in zip(hints, told, strict=False):
        assert hint in text
        assert text.count("Task 1, hint") == 1
    assert all(hint in told[-1] for hint in hints)


def test_brief_prints_the_page_of_a_lab(lab, tmp_path, monkeypatch):
    tutorials = make_chapters(tmp_path / "tutorials")
    monkeypatch.setattr("minipaged.labs.chapters.library.folder", lambda: tutorials)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    page = Path(lab("brief", "1", "--no-browser").strip())
    assert "Lab 1: count" in page.read_text(encoding="utf-8")
    assert "minipaged lab brief 1" in lab("start", "1")


def test_a_model_that_was_not_built_leaves_no_trace(lab, tmp_path):
    lab("start", "1")
    told = lab("check", "1", "--task", "4")
    assert "your turn: BlockAllocator.__init__" in told
    assert "replay it" not in told
    assert not list(tmp_path.glob("*.jsonl"))


def test_without_pytest_a_check_says_what_to_install(lab, monkeypatch):
    lab("start", "1")
    monkeypatch.setattr("minipaged.labs.grading.find_spec", lambda name: None)
    with pytest.raises(InvalidOption, match=r"need pytest.*: pip install 'minipaged\[labs\]'"):
        lab("check", "1")


DAMAGED = {
    "not_json": b"{",
    "not_utf8": b"\xff\xfe{}",
    "too_deep": b"[" * 100_000,
    "a_list": b"[]",
    "nothing_of_ours": b"{}",
    "points_in_words": b'{"points": {"1.1": "all"}, "hints": {}}',
    "points_in_a_list": b'{"points": {"1.1": [30]}, "hints": {}}',
    "points_that_are_no_number": b'{"points": {"1.1": NaN}, "hints": {}}',
    "points_beyond_all_numbers": b'{"points": {"1.1": 1' + b"0" * 400 + b'}, "hints": {}}',
    "hints_by_halves": b'{"points": {}, "hints": {"1.1": 0.5}}',
    "hints_below_zero": b'{"points": {}, "hints": {"1.1": -1}}',
    "no_task": b'{"points": {"first": 30}, "hints": {}}',
    "too_large": b'{"points": {}, "hints": {}}' + b" " * 2**20,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_progress_file_is_kept_and_a_new_one_begun(lab, tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    printed = lab("hint", "1", "--task", "1")
    assert f"{FILE} was damaged: it was renamed to {FILE}.damaged.1." in printed
    assert (tmp_path / f"{FILE}.damaged.1").read_bytes() == content
    assert json.loads((tmp_path / FILE).read_text()) == {"points": {}, "hints": {"1.1": 1}}


def test_a_second_damaged_progress_file_does_not_replace_the_first(lab, tmp_path):
    for content in (b"one", b"two"):
        (tmp_path / FILE).write_bytes(content)
        lab("list")
    kept = [(tmp_path / f"{FILE}.damaged.{number}").read_bytes() for number in (1, 2)]
    assert kept == [b"one", b"two"]


def test_a_folder_in_place_of_the_progress_file_is_refused(lab, tmp_path):
    (tmp_path / FILE).mkdir()
    with pytest.raises(InvalidOption, match="is not a file: move it away"):
        Progress.read(tmp_path)
