"""Links from a page to a file of the repository, which GitHub can follow and a site cannot.

A link to Python, as in `[the allocator](../minipaged/memory/allocator.py#L20-L31)`, leads to a page
with its source (site_builder/sources.py). One to any other file becomes text that names it.
"""

import posixpath
import re
from pathlib import Path

from site_builder.fences import numbered_lines

SOURCE = "source/"  # the folder of the site with the pages of source files
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s:]+)(?:#L(\d+)[^)\s]*)?\)")


def with_files_linked(markdown: str, root: Path, page: str) -> str:
    """The page with its links to files of the repository led to pages of the site."""

    def led(match: re.Match[str]) -> str:
        label, target, line = match.groups()
        path = file_of_the_repository(target, root, page)
        if path is None:
            return match[0]
        if path.endswith(".py"):
            up = "../" * page.count("/")
            return f"[{label}]({up}{SOURCE}{path}.md{line_anchor(int(line)) if line else ''})"
        return label if label.strip("`") == path else f"{label} (`{path}`)"

    lines = [
        _LINK.sub(led, line) if is_text else line for _, line, is_text in numbered_lines(markdown)
    ]
    return "\n".join(lines) + "\n" if lines else ""


def line_anchor(line: int) -> str:
    """The anchor that the highlighter gives a line of the first block of a page."""
    return f"#__span-0-{line}"


def file_of_the_repository(target: str, root: Path, page: str) -> str | None:
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
    is_of_the_site = path.startswith(("docs/", "tutorials/"))
    return path if (root / path).exists() and not is_of_the_site else None
