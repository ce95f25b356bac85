"""The picture that opens a chapter: a line `![caption](openings/03.svg)` of its first cell.

A page contains the picture itself, whose text then has the page's colour. A notebook contains it as
the data of an image, because Jupyter shows no SVG in text. Both work without any other file.
"""

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from minipaged.errors import InvalidOption

_LINE = re.compile(r"^!\[([^\]]+)\]\((openings/\d\d\.svg)\)$", re.MULTILINE)
_GROUND = re.compile(r'<g class="ground">.*?</g>\n', re.DOTALL)  # of a picture on its own


@dataclass(frozen=True)
class Opening:
    """The caption, and the text of the SVG file."""

    caption: str
    svg: str

    @property
    def inline(self) -> str:
        """The picture as a part of a page: without a ground, in the colour of the page's text."""
        return _GROUND.sub("", self.svg)


def opening_of(markdown: str, folder: Path) -> Opening | None:
    """The opening that a text names, or None. Raises InvalidOption if `folder` lacks its file."""
    line = _LINE.search(markdown)
    if line is None:
        return None
    file = folder / line[2]
    try:
        return Opening(line[1], file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidOption(
            f"{file} cannot be read ({error.strerror}), and a chapter begins with it: install "
            "minipaged again or, in a checkout, run python tutorials/openings/draw.py."
        ) from error


def with_opening(markdown: str, opening: Opening | None, show: Callable[[Opening], str]) -> str:
    """The text with what `show` makes of the chapter's opening, in place of the line."""
    return markdown if opening is None else _LINE.sub(lambda _: show(opening), markdown)


def as_figure(opening: Opening) -> str:
    """HTML for a page."""
    caption = f"<figcaption>{escape(opening.caption)}</figcaption>"
    return f'<figure class="opening" data-search-exclude>\n{opening.inline}{caption}\n</figure>'


def as_thumbnail(opening: Opening) -> str:
    """HTML for a list of chapters: the picture alone."""
    return f'<figure class="thumbnail" data-search-exclude>\n{opening.inline}</figure>'


def as_image(opening: Opening) -> str:
    """HTML for a notebook."""
    data = base64.b64encode(opening.svg.encode()).decode()
    caption = escape(opening.caption)
    return f'<img alt="{caption}" width="600" src="data:image/svg+xml;base64,{data}">'
