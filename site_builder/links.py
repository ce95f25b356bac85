"""Links from a page to a file of the repository, which GitHub can follow and the site cannot.

`[the allocator](../minipaged/memory/allocator.py)` becomes text that names the file.
"""

import posixpath
import re
from pathlib import Path

from site_builder.fences import numbered_lines

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def with_files_named(markdown: str, root: Path, page: str) -> str:
    """The page with links to files of the repository turned into their names."""

    def named(match: re.Match[str]) -> str:
        path = file_of_the_repository(match[2], root, page)
        if path is None:
            return match[0]
        label = match[1]
        return label if label.strip("`") in path and "`" in label else f"{label} (`{path}`)"

    lines = [
        _LINK.sub(named, line) if is_text else line for _, line, is_text in numbered_lines(markdown)
    ]
    return "\n".join(lines) + "\n" if lines else ""


def file_of_the_repository(target: str, root: Path, page: str) -> str | None:
    """Its path from the root if a link of `page` leads to one, and not to a page of the site.

    A page of docs/ says ../minipaged/llm.py, and so does a chapter in tutorials/, whose page lies
    one folder deeper on the site.
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    if not path.startswith("../") and (root / "docs" / path).exists():
        return None
    path = re.sub(r"^(\.\./)+", "", path)
    is_of_the_site = path.startswith(("docs/", "tutorials/"))
    return path if (root / path).exists() and not is_of_the_site else None
