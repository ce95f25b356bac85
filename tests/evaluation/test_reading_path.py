"""The marked path: short enough to read, and the one that the architecture page shows."""

import re
from pathlib import Path

from minipaged.cli import path as command
from minipaged.evaluation.reading_path import PACKAGE, READING_PATH, as_markdown, lines_of_code
from minipaged.evaluation.token_trace import TokenTrace, trace_token

ROOT = Path(__file__).parents[2]


def test_the_path_has_at_most_4000_lines_of_code():
    assert sum(lines_of_code(file) for file, _ in READING_PATH) <= 4000


def test_lines_of_code_leave_out_blank_lines_comments_and_docstrings(tmp_path, monkeypatch):
    text = '"""Module,\ntwo lines."""\n\nx = """a\nstring"""  # two lines\n# none\n\n\ndef f():\n'
    (tmp_path / "a.py").write_text(text + '    """None."""\n    return (\n        x\n    )\n')
    monkeypatch.setattr("minipaged.evaluation.reading_path.PACKAGE", tmp_path)
    assert lines_of_code("a.py") == 6


def test_the_architecture_page_shows_the_path_as_the_command_prints_it():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert as_markdown("../minipaged") in page, (
        "replace its table by the output of `minipaged path --markdown ../minipaged`"
    )


def test_one_decode_token_crosses_few_files_and_functions():
    trace = trace_token()
    assert trace.num_files <= 18
    assert len(trace.functions) <= 70
    assert trace.num_jumps_back <= 15
    files = {file for file, _ in trace.functions}
    assert files <= {file for file, _ in READING_PATH} | {"utils/device.py"}


def test_a_jump_back_is_a_move_to_a_file_seen_before():
    trace = TokenTrace([("a", "f"), ("a", "g"), ("b", "h"), ("a", "i"), ("c", "j"), ("b", "k")])
    assert [file for file, _ in trace.visits] == ["a", "b", "a", "c", "b"]
    assert (trace.num_files, trace.num_jumps_back) == (3, 2)


def test_the_command_prints_files_and_their_lines(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    command.path()
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines())
    for file, _ in READING_PATH:
        assert re.search(
            rf"^{file} +{lines_of_code(file)} ", printed.replace(" " + file, file), re.M
        )
        assert (PACKAGE / file).is_file()
