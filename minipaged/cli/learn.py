"""`minipaged learn`: lists the chapters, opens one in the browser, writes notebooks and slides."""

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
from minipaged.utils.files import write_new_files

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
    slides: Annotated[
        Path | None,
        typer.Option(
            help="Write slides.html, one slide per chapter, and its pictures to a folder."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
) -> None:
    """List the chapters, or open one in the browser with its outputs."""
    from minipaged.labs.chapters.library import Library

    library = Library()
    if notebooks is not None or slides is not None:
        flag = "--slides" if notebooks is None else "--notebooks"
        refuse_beside(context, flag, "writes files and opens no page", ["no_browser"])
        _write(library, number, notebooks, slides, force)
    elif force:
        raise InvalidOption("--force overwrites files: give --notebooks or --slides as well.")
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
    console.print(
        f"\nRead one: minipaged learn {first}. Get it as a notebook, to do its exercise: "
        f"minipaged learn {first} --notebooks DIR"
    )


def _open(library: "Library", number: int, no_browser: bool) -> None:
    """Open the page as soon as it has text; the outputs follow when the chapter has run."""
    chapter = library.chapter(number)
    opened: list[Path] = []

    def show(page: Path) -> None:
        if not no_browser and not opened:
            opened.append(page)
            open_page(page)

    def start(page: Path) -> None:
        show(page)
        _say(
            f"The code of chapter {number} is running. It may take a minute; its outputs are kept "
            "for the next time."
        )

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


def open_page(page: Path) -> None:
    """Open a page in the browser, or print where it is."""
    can_open = webbrowser.open(page.as_uri())
    print("Opened" if can_open else "No browser can be opened here. The page is", page)


def _write(
    library: "Library", number: int | None, notebooks: Path | None, slides: Path | None, force: bool
) -> None:
    from minipaged.labs.chapters.notebooks import notebook_files
    from minipaged.labs.chapters.slides import slide_files

    chapters = library.chapters if number is None else [library.chapter(number)]
    count = len(chapters)
    contents: dict[Path, str] = {}
    if notebooks is not None:
        contents |= notebook_files(chapters, library.folder / "drawing.py", notebooks)
    if slides is not None:
        contents |= slide_files(chapters, slides)
    write_new_files(contents, force)
    if notebooks is not None:
        print(f"{notebooks}: {counted(count, 'notebook')}, and drawing.py, which they import.")
    if slides is not None:
        print(f"{slides / 'slides.html'}: {counted(count, 'slide')}. Open it in a browser.")


def _say(sentence: str) -> None:
    """On standard error, so that standard output has only the path."""
    print(sentence, file=sys.stderr)
