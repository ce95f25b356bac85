"""A newcomer's path through lab 1, as in its guide: every command, and what it prints.

A comment of the guide gives the content of the student's file before the next command.
"""

import re
import shlex
from pathlib import Path

from lab_variants.lab1 import BEGINNING, WRONG
from typer.testing import CliRunner

from minipaged.cli.main import app
from minipaged.labs.catalogue import find_lab
from minipaged.labs.starter import library_text

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "first_lab.md"
STEP = re.compile(
    r"<!-- the file: (?P<file>[\w ]+) -->|^```console\n(?P<block>.*?)^```", re.M | re.S
)


def commands(block: str) -> list[tuple[str, list[str]]]:
    """Each command of a block, and the lines that it prints; `...` leaves some out."""
    told = [part.splitlines() for part in re.split(r"^\$ minipaged ", block, flags=re.M)[1:]]
    return [(first, printed) for first, *printed in told]


def readable(lines: list[str]) -> list[str]:
    """Without the numbers of lines, and the notes: the wrong solutions here are subclasses."""
    numbered = (re.sub(r"line \d+ of", "line N of", line.rstrip()) for line in lines)
    return [line for line in numbered if not line.startswith("note: ")]


def test_the_first_lab_works_as_its_guide_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lab, num_commands = find_lab(1), 0
    right = library_text(lab).replace("_ref_counts", "_owners")  # not exactly the library's text
    texts = {"right": right} | {
        name: library_text(lab) + BEGINNING + text for name, (_, text) in WRONG.items()
    }
    guard = re.compile(r"^        if not self\._free:\n.*?(?=^        block)", re.M | re.S)
    texts["runs_out_with_another_error"] = guard.sub("", right)
    assert texts["runs_out_with_another_error"] != right
    for step in STEP.finditer(GUIDE.read_text(encoding="utf-8")):
        if step["file"] in texts:
            Path(lab.file_name).write_text(texts[step["file"]], encoding="utf-8")
        for words, expected in commands(step["block"] or ""):
            result = CliRunner().invoke(app, shlex.split(words))
            lines = readable(result.stdout.splitlines())
            if "..." in expected:
                expected = expected[expected.index("...") + 1 :]
                lines = lines[-len(expected) :]
            assert lines == readable(expected), words
            num_commands += 1
    assert num_commands == 8
