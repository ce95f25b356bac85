"""`minipaged path`: the files to read, in order, and the path of one decode token through them."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from minipaged.errors import InvalidOption
from minipaged.evaluation.reading_path import READING_PATH, as_markdown, lines_of_code


def path(
    trace: Annotated[
        bool, typer.Option("--trace", help="Print the functions that run for one decode token.")
    ] = False,
    markdown: Annotated[
        str | None, typer.Option(help="Print a Markdown table; links begin with this.")
    ] = None,
) -> None:
    """List the files to read, in the order a token visits them."""
    if trace and markdown is not None:
        raise InvalidOption("--trace cannot print Markdown: leave out --trace or --markdown.")
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
