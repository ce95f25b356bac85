"""docs/companion.md has every section, equation, figure and table of the paper; its names exist."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPANION = (ROOT / "docs" / "companion.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "docs").rglob("*.md"))
SECTIONS = (
    "1 2 2.1 2.2 2.3 3 3.1 4 4.1 4.2 4.3 4.4 4.5 4.6 5 5.1 5.2 "
    "6 6.1 6.2 6.3 6.4 6.5 7 7.1 7.2 7.3 8 9 10"
).split()
CHAPTERS = (
    "01_attention_and_the_kv_cache 02_the_memory_problem 03_blocks_and_block_tables "
    "04_paged_attention 05_models_on_pages 06_continuous_batching 07_sharing 08_prefix_caching "
    "09_when_memory_runs_out 10_a_first_kernel 11_to_the_speed_of_light 12_one_tokens_journey"
).split()


def named(page: Path) -> list[str]:
    """What the page quotes or places, by dotted name."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"\{\{ *lines +([\w.]+) *\}\}", text) + re.findall(
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


def test_every_section_of_the_paper_has_a_heading_in_its_order():
    assert re.findall(r"^##+ Section ([\d.]+): ", COMPANION, re.M) == SECTIONS


def test_every_equation_figure_and_table_has_a_row():
    rows = re.findall(r"^\| (Equation|Figure|Table) (\d+)", COMPANION, re.M)
    for kind, last in (("Equation", 4), ("Figure", 19), ("Table", 1)):
        numbers = [int(number) for name, number in rows if name == kind]
        assert sorted(set(numbers)) == list(range(1, last + 1))
        assert numbers == sorted(numbers), f"{kind}: not in the paper's order"


def test_every_row_says_where_it_is_or_that_it_is_not_here():
    for row in re.findall(r"^\| (?:Equation|Figure|Table) .*$", COMPANION, re.M):
        assert "{{ lines" in row or "**not" in row, row


def test_every_chapter_is_named():
    for chapter in CHAPTERS:
        assert f"tutorials/{chapter}.md" in COMPANION, chapter


@pytest.mark.parametrize("name", NAMES)
def test_a_name_on_a_page_has_lines_in_a_file(name):
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
