"""docs/benchmarks.md has a row for each command of `minipaged bench`, and for no other."""

import re
from pathlib import Path

from minipaged.cli.bench import app

PAGE = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_every_command_has_a_row_and_every_row_a_command():
    rows = re.findall(r"^\| `(\w+)` \| .*\? \|", PAGE, re.M)
    commands = {
        c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands
    }
    assert sorted(rows) == sorted(commands)


def test_the_commands_that_are_shown_exist():
    commands = {
        c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands
    }
    assert set(re.findall(r"minipaged bench (\w+)", PAGE)) - {"NAME"} <= commands
