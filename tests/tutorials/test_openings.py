"""The pictures that open the chapters: one family, readable by all, and as the script draws."""

import ast
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tutorials" / "openings"
CHAPTERS = sorted((ROOT / "tutorials").glob("[0-9][0-9]_*.py"))
NUMBERS = [chapter.name[:2] for chapter in CHAPTERS]
SVG = "{http://www.w3.org/2000/svg}"
PAGES = {"page.css": "minipaged/assets/chapters", "slides.html": "minipaged/assets/chapters"}


@pytest.fixture
def script(monkeypatch):
    """tutorials/openings/draw.py, as a module."""
    monkeypatch.syspath_prepend(FOLDER)
    import draw

    return draw


@pytest.fixture(scope="module")
def colours() -> list[str]:
    """Those of drawing.py, which sets up matplotlib if it is imported."""
    text = (ROOT / "tutorials" / "drawing.py").read_text(encoding="utf-8")
    return list(ast.literal_eval(re.search(r"^COLOURS = (\(.+\))$", text, re.MULTILINE)[1]))


def picture(number: str) -> ElementTree.Element:
    return ElementTree.fromstring((FOLDER / f"{number}.svg").read_text(encoding="utf-8"))


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(part * weight for part, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


def contrast(one: str, other: str) -> float:
    """As WCAG computes it, from 1 to 21."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def numbers(element: ElementTree.Element, *names: str) -> list[float]:
    return [float(element.get(name, 0)) for name in names]


def extent(text: ElementTree.Element) -> tuple[float, float]:
    """The left and the right end of a text, in a font wider than most."""
    size, x = float(text.get("font-size", 16)), float(text.get("x"))
    width = 0.6 * size * len(text.text)
    left = x - {"start": 0, "end": width}.get(text.get("text-anchor", ""), width / 2)
    return left, left + width


def box_around(text: ElementTree.Element, root: ElementTree.Element) -> ElementTree.Element | None:
    """The last box that was drawn at the place of a text."""
    left, right = extent(text)
    middle, y = (left + right) / 2, float(text.get("y")) - 5
    found = None
    for box in root.findall(f"{SVG}rect"):
        x, top, width, height = numbers(box, "x", "y", "width", "height")
        if x < middle < x + width and top < y < top + height:
            found = box
    return found


def test_every_chapter_has_an_opening_and_every_opening_a_chapter():
    assert sorted(file.stem for file in FOLDER.glob("*.svg")) == NUMBERS


@pytest.mark.parametrize("number", NUMBERS)
def test_the_committed_file_is_what_the_script_draws(number, script):
    file = FOLDER / f"{number}.svg"
    assert file.read_text(encoding="utf-8") == script.svg(int(number)), (
        "run: python tutorials/openings/draw.py"
    )
    assert file.stat().st_size < 12_000


@pytest.mark.parametrize("number", NUMBERS)
def test_a_screen_reader_finds_a_title_and_a_description(number):
    root = picture(number)
    title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert root.get("role") == "img"
    assert root.get("aria-labelledby").split() == [title.get("id"), description.get("id")]
    assert len(description.text) > len(title.text) > 40
    assert number in title.get("id")  # several pictures share a page


@pytest.mark.parametrize("chapter", CHAPTERS, ids=NUMBERS)
def test_the_chapter_shows_it_before_its_goals_with_the_same_caption(chapter):
    title = picture(chapter.name[:2]).find(f"{SVG}title").text
    line = f"# ![{title}](openings/{chapter.name[:2]}.svg)\n"
    before, _, after = chapter.read_text(encoding="utf-8").partition(line)
    assert after.startswith("#\n# ## Goals\n")
    assert "# **Time**" in before or "**Needs**" in before


@pytest.mark.parametrize("number", NUMBERS)
def test_text_is_large_enough_and_fits(number):
    root = picture(number)
    _, _, width, height = map(float, root.get("viewBox").split())
    for text in root.findall(f"{SVG}text"):
        size = float(text.get("font-size", root.get("font-size")))
        assert size * 720 / width >= 12
        assert size * 358 / width >= 10, f"{text.text!r} is too small on a phone"
        left, right = extent(text)
        assert left >= 0, text.text
        assert right <= width, text.text
        assert size / 2 <= float(text.get("y")) <= height - 4
        box = box_around(text, root)
        if box is not None:
            x, across = numbers(box, "x", "width")
            assert x <= left, f"{text.text!r} is wider than its box"
            assert right <= x + across, f"{text.text!r} is wider than its box"


@pytest.mark.parametrize("number", NUMBERS)
def test_text_on_a_coloured_box_has_a_contrast_of_4_5(number):
    root = picture(number)
    for text in root.findall(f"{SVG}text"):
        box = box_around(text, root)
        fill = "none" if box is None else box.get("fill")
        if fill == "none":
            assert text.get("fill") is None, f"{text.text!r} has not the colour of the page"
        else:
            assert contrast(text.get("fill"), fill) >= 4.5, text.text


def test_text_without_a_box_has_a_contrast_of_4_5_in_light_and_dark(script):
    light, dark = re.findall(r"svg\{color:(#\w+)\}", script.svg(0))
    light_ground, dark_ground = "#fff", re.search(r"rect\{fill:(#\w+)\}", script.svg(0))[1]
    assert f'fill="{light_ground}"' in script.svg(0)
    assert contrast(light, light_ground) >= 4.5
    assert contrast(dark, dark_ground) >= 4.5
    for name, folder in PAGES.items():
        css = (ROOT / folder / name).read_text(encoding="utf-8")
        pairs = re.findall(r"--ground: (#\w+); --text: (#\w+);", css)
        assert len(pairs) == 2, f"{name} has a light and a dark page"
        assert all(contrast(*pair) >= 4.5 for pair in pairs)


@pytest.mark.parametrize("number", NUMBERS)
def test_only_the_colours_of_the_chapters_appear(number, colours, script):
    import shapes

    allowed = {"none", shapes.SHARED, *shapes.OWNERS.values()}
    assert {box.get("fill") for box in picture(number).findall(f"{SVG}rect")} <= allowed
    assert set(shapes.OWNERS.values()) <= set(colours)


def test_owners_have_the_colours_of_the_chapters_and_differ_in_grey(colours, script):
    import shapes

    assert [shapes.OWNERS[owner] for owner in "ABC"] == colours[:3]
    a, b, c = (shapes.OWNERS[owner] for owner in "ABC")
    assert min(contrast(a, b), contrast(a, c), contrast(b, c)) > 1.4
