"""What is done to the Markdown of every page and chapter before a site builder sees it.

Places, by name; the lines are looked up in every build:

    {{ lines minipaged.llm.LLM.generate }}   becomes `minipaged/llm.py, lines 125-155`
    {{ name minipaged.llm.LLM.generate }}    becomes `LLM.generate`, with a link to the same lines

Links to files of the repository, which GitHub can follow and a site cannot:

    ../minipaged/llm.py#L20-L31    becomes that line of a page with the source (sources.py)
    ../tutorials/00_first_run.py   the chapter's page
    ../tutorials/labs/01.md        the lab's page
    ../docs/speed.md               that page of the site
    ../README.md                   no link: text that names the file

Quotes: a line `@@ dotted.name` becomes the source of that name, with its place. A name that does
not exist fails the build, so what a page quotes is never out of date.
"""

import posixpath
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from mkdocs.exceptions import PluginError

from minipaged.labs.chapters.names import NameIsGone, find
from minipaged.labs.chapters.reading import place

SOURCE = "source/"  # the folder of the site with the pages of source files
_FENCE = re.compile(r"\s*(`{3,}|~{3,})")
_MARKER = re.compile(r"\{\{ *(lines|name) +([\w.]+) *\}\}")
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s:]+)(#[^)\s]*)?\)")
_QUOTE = re.compile(r"(\s*)@@ +([\w.]+)\s*")


class CannotBuild(PluginError):
    """What stops a build, and where. MkDocs prints its message without a traceback, and ends."""


def expanded(markdown: str, root: Path, page: str) -> str:
    """Raises CannotBuild, naming the page, for a name that is gone."""
    markdown = with_places(markdown, root, page)
    markdown = with_files_linked(markdown, root, page)
    return with_quotes(markdown, root, page)


# ---- places --------------------------------------------------------------------------------------


def with_places(markdown: str, root: Path, page: str) -> str:
    """The page with its places filled in. Raises CannotBuild for a name that is gone."""
    up = "../" * (page.count("/") + 1)  # from the page to the root of the repository

    def link(match: re.Match[str]) -> str:
        source = find(root, match[2])
        label = place(source) if match[1] == "lines" else source.name
        lines = "" if source.is_module else f"#L{source.first}-L{source.last}"
        return f"[`{label}`]({up}{source.path}{lines})"

    lines: list[str] = []
    for number, line, is_text in numbered_lines(markdown):
        try:
            lines.append(_MARKER.sub(link, line) if is_text else line)
        except NameIsGone as gone:
            raise CannotBuild(f"{page}, line {number}: cannot place {gone}") from gone
    return "\n".join(lines) + "\n" if lines else ""


# ---- links ---------------------------------------------------------------------------------------


def with_files_linked(markdown: str, root: Path, page: str) -> str:
    """The page with its links to files of the repository led to pages of the site."""

    def led(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        path = _file_of_the_repository(target, root, page)
        if path is None:
            return match[0]
        address = _page_of(path, anchor)
        if address is None:
            return label if label.strip("`") == path else f"{label} (`{path}`)"
        return f"[{label}]({'../' * page.count('/')}{address})"

    lines = [
        _LINK.sub(led, line) if is_text else line for _, line, is_text in numbered_lines(markdown)
    ]
    return "\n".join(lines) + "\n" if lines else ""


def line_anchor(line: int) -> str:
    """The anchor that the highlighter gives a line of the first block of a page."""
    return f"#__span-0-{line}"


def _page_of(path: str, anchor: str) -> str | None:
    """Where the site has a file of the repository, if it has it."""
    if path == "tutorials":
        return "tutorials/index.md"
    if re.match(r"tutorials/\d.*\.py$", path):
        return path.removesuffix(".py") + ".md" + anchor
    if re.match(r"tutorials/labs/\d.*\.md$", path):
        return path + anchor
    if path.startswith("docs/"):
        return path.removeprefix("docs/") + anchor
    if not path.endswith(".py"):
        return None
    line = re.match(r"#L(\d+)", anchor)
    return f"{SOURCE}{path}.md{line_anchor(int(line[1])) if line else ''}"


def _file_of_the_repository(target: str, root: Path, page: str) -> str | None:
    """Its path from the root if a link of `page` leads to one, and not to a page of the site.

    A page of docs/ says ../minipaged/llm.py, and so does a chapter in tutorials/, whose page lies
    one folder deeper on the site. A package is its __init__.py.
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    if not path.startswith("../") and (root / "docs" / path).exists():
        return None
    path = re.sub(r"^(\.\./)+", "", path)
    if (root / path / "__init__.py").exists():
        path += "/__init__.py"
    return path if (root / path).exists() else None


# ---- quotes --------------------------------------------------------------------------------------


def with_quotes(markdown: str, root: Path, page: str) -> str:
    """The page with its quotes filled in. Raises CannotBuild for a name that is gone."""
    lines: list[str] = []
    for number, line, is_text in numbered_lines(markdown):
        match = _QUOTE.fullmatch(line) if is_text else None
        if match is None:
            lines.append(line)
            continue
        try:
            quote = quoted(match[2], root)
        except NameIsGone as gone:
            raise CannotBuild(f"{page}, line {number}: cannot quote {gone}") from gone
        lines.append(textwrap.indent(quote, match[1]))
    return "\n".join(lines) + "\n" if lines else ""


def quoted(dotted: str, root: Path) -> str:
    """A fenced block with the source of `dotted`. Raises NameIsGone."""
    source = find(root, dotted)
    return fenced(source.text, f'python title="{place(source)}"')


# ---- fenced blocks -------------------------------------------------------------------------------


def numbered_lines(markdown: str) -> Iterator[tuple[int, str, bool]]:
    """Each line with its number, and whether it is text; the fences themselves are none."""
    fence = ""
    for number, line in enumerate(markdown.splitlines(), 1):
        match = _FENCE.match(line)
        if not fence and match:
            fence = match[1]
            yield number, line, False
        elif fence:
            ends = match is not None and match[1].startswith(fence) and not line.strip(" `~\t")
            yield number, line, False
            fence = "" if ends else fence
        else:
            yield number, line, True


def fenced(code: str, heading: str) -> str:
    """`code` in a fence that is longer than any in it."""
    longest = max((len(ticks) for ticks in re.findall(r"`+", code)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{heading}\n{code.rstrip()}\n{ticks}"
