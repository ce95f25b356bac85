"""A chapter of tutorials/ as a notebook, and what the list of chapters says of it."""

from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from minipaged.errors import InvalidOption
from minipaged.labs.chapters import reading
from minipaged.labs.chapters.openings import Opening
from site_builder.markdown import CannotBuild


@dataclass(frozen=True)
class Chapter:
    """A script, and what the list of chapters says of it. The notebook has no outputs yet."""

    script: Path
    notebook: NotebookNode
    title: str
    summary: str
    opening: Opening | None

    @property
    def name(self) -> str:
        return self.script.stem


def chapters_of(root: Path) -> list[Chapter]:
    """All scripts of tutorials/ whose name begins with a number, in their order."""
    return [read(script) for script in sorted((root / "tutorials").glob("[0-9]*_*.py"))]


def read(script: Path) -> Chapter:
    """Raises CannotBuild unless the chapter begins with a heading and a sentence."""
    try:
        chapter = reading.read(script)
    except InvalidOption as error:
        raise CannotBuild(str(error)) from None
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = new_notebook(metadata={"kernelspec": kernel})
    for index, cell in enumerate(chapter.cells):
        new_cell = new_code_cell if cell.is_code else new_markdown_cell
        # The id is else random: the notebook would differ in every build.
        metadata = {"title": cell.title} if cell.title else {}
        notebook.cells.append(new_cell(cell.source, id=f"cell-{index}", metadata=metadata))
    return Chapter(script, notebook, chapter.heading, chapter.summary, chapter.opening)


def notebook_text(notebook: NotebookNode) -> str:
    return nbformat.writes(notebook) + "\n"
