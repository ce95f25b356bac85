"""The command line, run in this process."""

import sys

import pytest

from minipaged.cli import main as cli


def minipaged(capsys, monkeypatch, *arguments: str, stdin: str | None = None):
    """Run a command in this process: (exit code, standard output, standard error)."""
    import io

    monkeypatch.setattr(sys, "argv", ["minipaged", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin or ""))
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    captured = capsys.readouterr()
    return exit_info.value.code, captured.out, captured.err
