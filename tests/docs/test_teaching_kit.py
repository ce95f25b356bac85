"""The teaching kit: its syllabi name real chapters and labs, its sums and its set-up are right."""

import json
import re
from pathlib import Path

import pytest

from minipaged.labs.catalogue import LABS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guides" / "teach_with_the_labs.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text below a heading, up to the next one."""
    [body] = re.findall(rf"^##+ {title}\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
    return body


def weeks(title: str) -> list[tuple[str, str, str, str]]:
    return re.findall(r"^\| (\d+) \| (.+) \| (.+) \| (\d+) \|$", section(title), re.M)


def linked(cell: str) -> list[int]:
    """The chapters or labs of a cell; each label is the number in its link."""
    pairs = re.findall(r"\[(\d+)\]\([./a-z]+/(\d\d)\w*\.md\)", cell)
    assert all(int(label) == int(number) for label, number in pairs), cell
    return [int(label) for label, _ in pairs]


@pytest.mark.parametrize(("title", "count"), [("Six weeks", 6), ("Twelve weeks", 12)])
def test_a_syllabus_has_one_row_per_week_and_adds_up_its_hours(title, count):
    rows = weeks(title)
    assert [int(week) for week, *_ in rows] == list(range(1, count + 1))
    assert f"About {sum(int(hours) for *_, hours in rows)} hours" in section(title)


@pytest.mark.parametrize("title", ["Six weeks", "Twelve weeks"])
def test_a_syllabus_has_the_chapter_of_a_lab_before_the_lab(title):
    read: set[int] = set()
    for _, chapters, labs, _ in weeks(title):
        read |= set(linked(chapters))
        for lab in linked(labs):
            brief = (ROOT / "tutorials" / "labs" / f"{lab:02}.md").read_text(encoding="utf-8")
            asked = " ".join(re.findall(r"^Read (.*?) first\b", brief, re.M | re.S))
            needed = {int(number) for number in re.findall(r"\.\./(\d\d)_", asked)}
            assert needed <= read, lab


def test_twelve_weeks_have_every_chapter_and_every_lab():
    rows = weeks("Twelve weeks")
    chapters = [each for _, cell, *_ in rows for each in linked(cell)]
    files = sorted((ROOT / "tutorials").glob("[0-9]*.py"))
    assert sorted(chapters) == [int(file.name[:2]) for file in files]
    labs = [each for _, _, cell, _ in rows for each in linked(cell)]
    assert sorted(labs) == sorted({lab.number for lab in LABS} | {9})


def test_the_points_of_the_rubric_add_up_to_one_hundred():
    points = re.findall(r"^\| [^|]+ \| (\d+) \|", section("Rubric"), re.M)
    assert sum(map(int, points)) == 100


def test_the_dev_container_installs_with_a_command_from_readme():
    text = (ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8")
    command = json.loads(text)["postCreateCommand"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"\n{command} && pytest\n" in readme
    assert f"`{command}`" in PAGE
