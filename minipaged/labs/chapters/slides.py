"""The openings of the chapters as slides: one HTML file that loads nothing, and the pictures."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from minipaged.labs.chapters.pages import filled
from minipaged.labs.chapters.reading import Chapter


def slide_files(chapters: Sequence[Chapter], folder: Path) -> dict[Path, str]:
    """slides.html and, for other decks, each picture as a file of its own."""
    pictures = {folder / f"{c.name}.svg": c.opening.svg for c in chapters if c.opening}
    return {folder / "slides.html": slides_page(chapters), **pictures}


def slides_page(chapters: Sequence[Chapter]) -> str:
    """The HTML of all slides."""
    return filled("slides.html", {"slides": "\n".join(map(_slide, chapters))})


def _slide(chapter: Chapter) -> str:
    lab = chapter.facts.get("Lab", "")
    texts = {
        "number": str(chapter.number),
        "title": escape(chapter.title),
        "picture": chapter.opening.inline if chapter.opening else "",
        "summary": escape(chapter.summary),
        "lab": f"Lab {escape(lab)}" if lab else "",
    }
    return filled("slide.html", texts)
