"""`minipaged lab brief`: opens a lab's brief in the browser."""

from typing import Annotated

import typer

from minipaged.cli.learn import open_page
from minipaged.labs.catalogue import find_lab
from minipaged.labs.challenge import NUMBER


def brief(
    number: Annotated[int, typer.Argument(help="Number of the lab.")],
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Print the path of the page instead of opening it.")
    ] = False,
) -> None:
    """Open a lab's brief in the browser."""
    from minipaged.labs.chapters.library import Library

    if number != NUMBER:  # the challenge has a brief, but is no lab with tasks
        find_lab(number)
    page = Library().brief(number)
    print(page) if no_browser else open_page(page)
