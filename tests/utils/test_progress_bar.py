"""The progress bar: where it is shown, and TQDM_DISABLE."""

import io
import re
import sys
from pathlib import Path

import pytest

from minipaged import LLM, SamplingParams
from minipaged.utils.progress import progress_bar

PACKAGE = Path(sys.modules["minipaged"].__file__ or "").parent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("terminal", "shown", "is_seen"),
    [
        (True, None, True),
        (False, None, False),
        (True, True, True),
        (False, True, True),
        (True, False, False),
    ],
)
@pytest.mark.parametrize("disabled", ["", "1"])
def test_a_progress_bar_is_shown_only_where_it_is_enabled(
    terminal, shown, is_seen, disabled, monkeypatch
):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TQDM_DISABLE", disabled)
    assert list(progress_bar([1, 2], desc="things", shown=shown)) == [1, 2]
    assert ("things" in stream.getvalue()) == (is_seen and not disabled)


def test_generate_shows_no_bar_if_disabled(monkeypatch, capsys):
    llm, params = LLM(num_blocks=8), SamplingParams(max_tokens=2)
    llm.generate("Once", params)
    assert "prompts: 100%" in capsys.readouterr().err
    monkeypatch.setenv("TQDM_DISABLE", "1")
    llm.generate("Once", params)
    assert capsys.readouterr().err == ""


def test_every_bar_of_the_package_can_be_disabled():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "progress.py":
            assert not re.search(r"\btqdm\(", path.read_text(encoding="utf-8")), path
