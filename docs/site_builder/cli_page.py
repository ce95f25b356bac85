"""The page with the `--help` of every command."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = "api/cli.md"
WIDTH = 80  # columns, as in a terminal
BEGINNING = """\
# Command line

What each command prints with `--help`. The [guides](../guides/run_your_model.md) show them at work.
"""


def cli_files(root: Path) -> dict[str, bytes]:
    """Path below docs/ -> content."""
    has_commands = (root / "minipaged" / "cli" / "main.py").exists()
    return {PAGE: cli_page().encode()} if has_commands else {}


def cli_page() -> str:
    """In the order of `minipaged --help`, with a heading per command."""
    import typer

    from minipaged.cli.main import app

    return "\n".join([BEGINNING, *_sections(typer.main.get_command(app), "minipaged", None, 2)])


def _sections(command: Any, name: str, parent: Any, level: int) -> Iterator[str]:
    context = type(command).context_class(
        command, info_name=name, parent=parent, terminal_width=WIDTH, max_content_width=WIDTH
    )
    help_text = command.get_help(context).rstrip()
    yield f"{'#' * level} {context.command_path}\n\n```text\n{help_text}\n```\n"
    if hasattr(command, "list_commands"):
        for each in command.list_commands(context):
            yield from _sections(
                command.get_command(context, each), each, context, min(level + 1, 3)
            )
