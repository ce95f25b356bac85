"""Links from a page to the code by its name: the lines are counted anew in every build.

    {{ lines minipaged.llm.LLM.generate }}   becomes `minipaged/llm.py, lines 125-155`
    {{ name minipaged.llm.LLM.generate }}    becomes `LLM.generate`, and leads to the same lines

The page that leads from the paper to the code names hundreds of places; a name that is gone fails
the build.
"""

import re
from pathlib import Path

from site_builder.errors import CannotBuild
from site_builder.fences import numbered_lines
from site_builder.names import NameIsGone, Source, find

_MARKER = re.compile(r"\{\{ *(lines|name) +([\w.]+) *\}\}")


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


def place(source: Source) -> str:
    """File and lines of a name, the file alone of a module."""
    if source.is_module:
        return source.path
    one = source.first == source.last
    lines = f"line {source.first}" if one else f"lines {source.first}-{source.last}"
    return f"{source.path}, {lines}"
