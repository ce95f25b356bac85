"""Chapters as notebooks, in the format of Jupyter (nbformat 4.5), without outputs."""

import json
import re
from pathlib import Path

from minipaged.labs.chapters.openings import as_image, with_opening
from minipaged.labs.chapters.reading import Cell, Chapter, with_links, with_quotes


def notebook_files(chapters: list[Chapter], drawing: Path, folder: Path) -> dict[Path, str]:
    """A notebook for each chapter, and drawing.py, which they import, next to them."""
    contents = {folder / f"{each.name}.ipynb": notebook(each) for each in chapters}
    contents[folder / drawing.name] = drawing.read_text(encoding="utf-8")
    return contents


def notebook(chapter: Chapter) -> str:
    """The JSON of a notebook."""
    content = {
        "cells": [_cell(chapter, number, cell) for number, cell in enumerate(chapter.cells)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _cell(chapter: Chapter, number: int, cell: Cell) -> dict[str, object]:
    text = cell.source
    if not cell.is_code:
        text = with_quotes(with_links(text, _address))
        text = with_opening(text, chapter.opening, as_image)
    common = {
        "id": f"cell-{number}",
        "metadata": {"title": cell.title} if cell.title else {},
        "source": text.splitlines(keepends=True),
    }
    if cell.is_code:
        return {"cell_type": "code", "execution_count": None, "outputs": [], **common}
    return {"cell_type": "markdown", **common}


def _address(target: str) -> str | None:
    chapter = re.fullmatch(r"(\d\d_\w+)\.md", target)
    return f"{chapter[1]}.ipynb" if chapter else None
