"""Links from a page to a file of the repository, which GitHub can follow and a site cannot.

../minipaged/llm.py#L20-L31    leads to that line of a page with the source (sources.py)
../tutorials/00_first_run.py   to the chapter's page
../docs/speed.md               to that page of the site
../README.md                   nowhere: it becomes text that names the file
"""

import posixpath
import re
from pathlib import Path

from site_builder.fences import numbered_lines

SOURCE = "source/"  # the folder of the site with the pages of source files
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


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
