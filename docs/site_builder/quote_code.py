"""A line `@@ dotted.name` becomes the source of that name, with the place where it stands.

Pages and chapters quote code by its name, so it cannot be out of date: a name that is gone fails
the build.
"""

import re
import textwrap
from pathlib import Path

from site_builder.companion import place
from site_builder.errors import CannotBuild
from site_builder.fences import fenced, numbered_lines
from site_builder.names import NameIsGone, find

_QUOTE = re.compile(r"(\s*)@@ +([\w.]+)\s*")


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
