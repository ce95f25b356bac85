"""`minipaged path`: what to read, in which order; and the way of one token through it."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from minipaged.errors import InvalidOption
from minipaged.evaluation.reading_path import READING_PATH, as_markdown, lines_of_code


def path(
    trace: Annotated[
        bool, typer.Option("--trace", help="Trace one decode token: each function it calls.")
    ] = False,
    markdown: Annotated[
        str | None, typer.Option(help="Print the path as Markdown; links begin with this.")
    ] = None,
) -> None:
    """Print the reading path through the library, in the order a token travels."""
    if trace and markdown is not None:
        raise InvalidOption("--trace prints no Markdown: leave out --trace or --markdown.")
    if trace:
        _print_trace()
    elif markdown is not None:
        print(as_markdown(markdown), end="")
    else:
        _print_path()


def _print_path() -> None:
    table = Table(box=None, padding=(0, 1), show_footer=True)
    lines = [lines_of_code(file) for file, _ in READING_PATH]
    table.add_column("file", footer=f"{len(READING_PATH)} files", no_wrap=True)
    table.add_column("lines of code", footer=f"{sum(lines):,}", justify="right", no_wrap=True)
    table.add_column("what it decides")
    for (file, purpose), count in zip(READING_PATH, lines, strict=True):
        table.add_row(file, str(count), purpose)
    Console().print(table)


def _print_trace() -> None:
    from minipaged.evaluation.token_trace import trace_token

    trace = trace_token()
    seen: set[str] = set()
    for file, functions in trace.visits:
        print(f"{file}{' (again)' if file in seen else ''}")
        print(*(f"    {function}" for function in functions), sep="\n")
        seen.add(file)
    print(
        f"\none decode token: {trace.num_files} files, {len(trace.functions)} functions, "
        f"{trace.num_jumps_back} jumps back to a file seen before"
    )
