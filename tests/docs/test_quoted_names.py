"""Every name of the library that a page quotes or links to exists."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def named(page: Path) -> list[str]:
    """What the page quotes or places, by dotted name."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"\{\{ *(?:lines|name) +([\w.]+) *\}\}", text) + re.findall(
        r"^@@ ([\w.]+)$", text, re.M
    )


NAMES = sorted({name for page in PAGES for name in named(page)})


def find(dotted: str) -> object:
    """The object of a dotted name: the longest module, then attributes."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = inspect.getattr_static(found, part)
        return found
    raise LookupError(dotted)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_quoted_on_a_page_exists(name):
    if ".triton" in name:
        pytest.importorskip("triton")
    found = find(name)
    for inner in ("fn", "fget", "__func__"):  # of a Triton kernel, a property, a class method
        found = getattr(found, inner, found)
    found = inspect.unwrap(found) if callable(found) else found
    lines, first = inspect.getsourcelines(found)
    assert lines
    file = Path(inspect.getsourcefile(found) or "")
    assert file.is_relative_to(ROOT / "minipaged")
    if not inspect.ismodule(found):
        assert name.rpartition(".")[2] in "".join(lines[:6]), f"{name} at line {first}"
