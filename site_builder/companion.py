"""`{{ lines dotted.name }}` in a page becomes a link to that name: file and lines.

The page that leads from the paper to the code names hundreds of places; their line numbers are
counted anew in every build, and a name that is gone fails it.
"""

import re
from pathlib import Path

from site_builder.errors import CannotBuild
from site_builder.fences import numbered_lines
from site_builder.names import NameIsGone, find

_MARKER = re.compile(r"\{\{ *lines +([\w.]+) *\}\}")


def with_places(markdown: str, root: Path, page: str) -> str:
    """The page with its places filled in. Raises CannotBuild for a name that is gone."""
    lines: list[str] = []
    up = "../" * (page.count("/") + 1)  # from the page to the root of the repository
    for number, line, is_text in numbered_lines(markdown):
        try:
            found = _MARKER.sub(lambda match: place(match[1], root, up), line) if is_text else line
        except NameIsGone as gone:
            raise CannotBuild(f"{page}, line {number}: cannot place {gone}") from gone
        lines.append(found)
    return "\n".join(lines) + "\n" if lines else ""


def place(dotted: str, root: Path, up: str) -> str:
    """A link to file and lines of a name, to the file of a module. Raises NameIsGone."""
    source = find(root, dotted)
    file = f"{up}{source.path}"
    first, last = source.first, source.last
    if source.is_module:
        return f"[`{source.path}`]({file})"
    lines = f"line {first}" if first == last else f"lines {first}-{last}"
    return f"[`{source.path}, {lines}`]({file}#L{first}-L{last})"
