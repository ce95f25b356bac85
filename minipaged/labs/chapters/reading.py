"""A chapter, read from its script: cells of Markdown and of code in the percent format.

# %% [markdown]
# # 3. Blocks, block tables and the allocator

# %% What the picture of this cell shows
import drawing
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from minipaged.errors import InvalidOption
from minipaged.labs.chapters.names import Source, find
from minipaged.labs.chapters.openings import Opening, opening_of

ROOT = Path(str(files("minipaged"))).parent  # the folder that contains the package
_QUOTE = re.compile(r"^@@ +([\w.]+) *$", re.MULTILINE)
_LINK = re.compile(  # or code, which is left as it is
    r"```.*?```|`[^`\n]+`|(?<!!)\[([^\]]+)\]\(([^)#\s:]+\.\w+)(?:#[^)\s]*)?\)", re.DOTALL
)
_FACT = re.compile(r"\*\*(\w+)\*\* *(.+?)(?= *·| *$)")


@dataclass(frozen=True)
class Cell:
    """A cell of text or code. `line` is the number of its first line in the script."""

    is_code: bool
    title: str
    source: str
    line: int


@dataclass(frozen=True)
class Chapter:
    """A script, its cells, and what the list of chapters shows of it.

    `facts` are those of the line `**Needs** ... · **Time** ... · **Lab** ...` of the first cell, by
    name; a chapter without the line has none. `opening` is the picture of the first cell.
    """

    script: Path
    heading: str
    summary: str
    facts: dict[str, str]
    cells: tuple[Cell, ...]
    opening: Opening | None

    @property
    def name(self) -> str:
        return self.script.stem

    @property
    def number(self) -> int:
        return int(self.name.partition("_")[0])

    @property
    def title(self) -> str:
        """The heading without its number."""
        return re.sub(r"^\d+\. *", "", self.heading)


def folder() -> Path:
    """The folder of the chapters: in the installed package, else in the checkout.

    Raises InvalidOption if neither has one.
    """
    for place in (ROOT / "minipaged" / "assets" / "tutorials", ROOT / "tutorials"):
        if (place / "drawing.py").is_file():
            return place
    raise InvalidOption(
        f"the chapters are missing: neither {ROOT / 'minipaged' / 'assets'} nor {ROOT} contains "
        "tutorials/. Install minipaged again, or use a checkout of its repository."
    )


def chapters_of(place: Path) -> list[Chapter]:
    """All scripts of a folder whose name begins with a number, in their order."""
    return [read(script) for script in sorted(place.glob("[0-9]*_*.py"))]


def read(script: Path) -> Chapter:
    """Raises InvalidOption unless the chapter begins with a heading and a sentence, and if the file
    of its opening is missing.
    """
    cells = cells_of(script.read_text(encoding="utf-8"))
    first = cells[0].source if cells and not cells[0].is_code else ""
    heading = re.match(r"# (.+)", first)
    if heading is None:
        raise InvalidOption(
            f"{script.name} has no title: begin it with a Markdown cell whose first line is "
            "`# title`."
        )
    facts, summary = dict[str, str](), ""
    for paragraph in re.split(r"\n\s*\n|\n(?=[-*] )", first)[1:]:
        text = " ".join(paragraph.split()).removeprefix("- ").removeprefix("* ")
        if text.startswith(("**Needs**", "**Time**")):  # the first chapter needs none
            facts = dict(_FACT.findall(_LINK.sub(lambda link: link[1] or link[0], text)))
        elif text and not summary and not text.startswith("#") and not text.endswith(":"):
            sentence = re.match(r".+?[.!?](?=\s|$)", text)
            summary = sentence[0] if sentence else text
    if not summary:
        raise InvalidOption(
            f"{script.name} has no summary: add a sentence about its subject below its title."
        )
    opening = opening_of(first, script.parent)
    return Chapter(script, heading[1].strip(), summary, facts, tuple(cells), opening)


def cells_of(script: str) -> list[Cell]:
    """The cells of a script in the percent format."""
    before, *pieces = re.split(r"^# %%(.*)$", script, flags=re.MULTILINE)
    line = before.count("\n") + 1
    cells: list[Cell] = []
    for title, body in zip(map(str.strip, pieces[::2]), pieces[1::2], strict=True):
        first = line + len(body) - len(body.lstrip("\n"))
        line += body.count("\n")
        if title == "[markdown]":
            text = re.sub(r"^# ?", "", body.strip("\n"), flags=re.MULTILINE)
            cells.append(Cell(False, "", text.strip("\n"), first))
        elif body.strip():
            cells.append(Cell(True, title, body.strip("\n"), first))
    return cells


# ---- quotes and links in the Markdown of a chapter -----------------------------------------------


def with_quotes(markdown: str) -> str:
    """Replaces each line `@@ dotted.name` by the source of that name. Raises NameIsGone."""

    def quoted(match: re.Match[str]) -> str:
        source = find(ROOT, match[1])
        return f'```python title="{place(source)}"\n{source.text.rstrip()}\n```'

    return _QUOTE.sub(quoted, markdown)


def with_links(markdown: str, address: Callable[[str], str | None]) -> str:
    """Replaces the targets of links to other files.

    Args:
        address: returns the new target of a link, such as 04_paged_attention.md. If it returns
            None, the link becomes plain text, which names the file.
    """

    def led(match: re.Match[str]) -> str:
        label, target = match[1], match[2]
        if label is None:
            return match[0]
        to = address(target)
        path = re.sub(r"^(\.\./)+", "", target)
        return f"[{label}]({to})" if to else label if path in label else f"{label} (`{path}`)"

    return _LINK.sub(led, markdown)


def place(source: Source) -> str:
    """The file and lines of a name; for a module, only the file."""
    if source.is_module:
        return source.path
    one = source.first == source.last
    lines = f"line {source.first}" if one else f"lines {source.first}-{source.last}"
    return f"{source.path}, {lines}"
