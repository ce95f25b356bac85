"""Pages with the source of those files that other pages lead to."""

import re
from collections.abc import Iterable
from pathlib import Path

from site_builder.markdown import SOURCE, fenced, line_anchor

_LEADS_TO_SOURCE = re.compile(rf"\]\((?:\.\./)*{SOURCE}([^)#\s]+\.py)\.md")


def source_files(root: Path, pages: Iterable[str]) -> dict[str, bytes]:
    """Path below docs/ -> page, for each file that one of the (expanded) pages leads to."""
    paths = {path for page in pages for path in _LEADS_TO_SOURCE.findall(page)}
    return {f"{SOURCE}{path}.md": _page(root, path).encode() for path in sorted(paths)}


def line_anchors(markdown: str) -> set[str]:
    """The anchors of the lines of such a page."""
    return {line_anchor(line).removeprefix("#") for line in range(1, markdown.count("\n") + 1)}


def _page(root: Path, path: str) -> str:
    """Not to be found by the search, which would find every word of the code twice."""
    name = path.rpartition("/")[2].replace("__", "\\_\\_")
    block = fenced((root / path).read_text(encoding="utf-8"), 'python linenums="1"')
    head = f"---\ntitle: {path}\nsearch:\n  exclude: true\nhide:\n  - navigation\n  - toc\n---\n"
    return f"{head}\n# {name}\n\n`{path}`\n\n{block}\n"
