"""`minipaged learn`: lists the chapters, opens one in the browser, writes them as notebooks."""

import sys
import webbrowser
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minipaged.cli.options import refuse_beside
from minipaged.errors import InvalidOption
from minipaged.utils.counts import counted

if TYPE_CHECKING:
    from minipaged.labs.chapters.library import Library

SHOWN = ("Time", "Lab")  # of a chapter's facts
console = Console(highlight=False, soft_wrap=True)


def learn(
    context: typer.Context,
    number: Annotated[
        int | None, typer.Argument(help="The chapter to open. Default: list all chapters.")
    ] = None,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Print the path of the page instead of opening it.")
    ] = False,
    notebooks: Annotated[
        Path | None, typer.Option(help="Write the chapters as Jupyter notebooks to this folder.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing notebooks.")] = False,
) -> None:
    """List the chapters, or open one in the browser with its outputs."""
    from minipaged.labs.chapters.library import Library

    if notebooks is None and force:
        raise InvalidOption("--force overwrites notebooks: give --notebooks as well.")
    library = Library()
    if notebooks is not None:
        does = "writes notebooks and opens no page"
        refuse_beside(context, "--notebooks", does, ["no_browser"])
        _write_notebooks(library, number, notebooks, force)
    elif number is not None:
        _open(library, number, no_browser)
    elif no_browser:
        raise InvalidOption("--no-browser prints the path of one page: give a chapter's number.")
    else:
        _list(library)


def _list(library: "Library") -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right")
    table.add_column()
    for each in library.chapters:
        lines = [f"[bold]{escape(each.title)}[/]", escape(each.summary)]
        facts = [f"{name.lower()}: {value}" for name, value in each.facts.items() if name in SHOWN]
        lines += [f"[dim]{escape('; '.join(facts))}[/]"] if facts else []
        table.add_row(str(each.number), "\n".join(lines))
    console.print(table)
    first = library.chapters[0].number
    console.print(f"\nRead one: minipaged learn {first}. All of them as notebooks: --notebooks DIR")


def _open(library: "Library", number: int, no_browser: bool) -> None:
    """Open the page as soon as it has text; the outputs follow when the chapter has run."""
    chapter = library.chapter(number)
    opened: list[Path] = []

    def show(page: Path) -> None:
        if not no_browser and not opened:
            opened.append(page)
            can_open = webbrowser.open(page.as_uri())
            print("Opened" if can_open else "No browser can be opened here. The page is", page)

    def start(page: Path) -> None:
        show(page)
        _say(f"The code of chapter {number} is running. Its outputs are kept for the next time.")

    if find_spec("matplotlib") is None:
        _say(
            "The page has text and code, but no outputs: the chapters draw with matplotlib, which "
            "is not installed. Install it: pip install 'minipaged[plot]'"
        )
    elif error := library.run(chapter, start):
        _say(f"Chapter {number} stopped, and its page has the outputs up to there: {error}")
    show(library.page(chapter))
    if no_browser:
        print(library.page(chapter))


def _write_notebooks(library: "Library", number: int | None, folder: Path, force: bool) -> None:
    from minipaged.labs.chapters.notebooks import write_notebooks

    chapters = library.chapters if number is None else [library.chapter(number)]
    write_notebooks(chapters, library.folder / "drawing.py", folder, force)
    print(f"{folder}: {counted(len(chapters), 'notebook')}, and drawing.py, which they import.")


def _say(sentence: str) -> None:
    """On standard error, so that standard output has only the path."""
    print(sentence, file=sys.stderr)
