"""`minipaged trace view`: shows a recorded trace in the browser."""

import tempfile
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="View a trace recorded with --trace.", rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def trace(context: typer.Context) -> None:
    """View a trace recorded with --trace."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def view(
    file: Annotated[Path, typer.Argument(help="A file recorded with --trace.")],
    output: Annotated[
        Path | None, typer.Option(help="Write the page to this file. Default: a temporary file.")
    ] = None,
    no_open: Annotated[
        bool, typer.Option("--no-open", help="Write the page without opening it.")
    ] = False,
) -> None:
    """Replay a trace in the browser, step by step.

    Shows blocks, block tables and queues. The page is a single file and works offline.
    """
    from minipaged.tracing.replay import Replay

    replay = Replay.read(file)
    page = Path(tempfile.mkdtemp(prefix="minipaged-")) / "replay.html" if output is None else output
    replay.save(page)
    print(page)
    if not no_open:
        webbrowser.open(page.resolve().as_uri())
