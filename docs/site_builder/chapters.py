"""A chapter: a percent script of tutorials/, read as a notebook."""

import re
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from site_builder.markdown import CannotBuild


@dataclass(frozen=True)
class Chapter:
    """A script, and what the list of chapters says of it. The notebook has no outputs yet."""

    script: Path
    notebook: NotebookNode
    title: str
    summary: str

    @property
    def name(self) -> str:
        return self.script.stem


def chapters_of(root: Path) -> list[Chapter]:
    """All scripts of tutorials/ whose name begins with a number, in their order."""
    return [read(script) for script in sorted((root / "tutorials").glob("[0-9]*_*.py"))]


def read(script: Path) -> Chapter:
    """Raises CannotBuild unless the chapter begins with a heading and a sentence."""
    notebook = jupytext.read(script, fmt="py:percent")
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index}"  # else random: the notebook would differ in every build
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    first = notebook.cells[0].source if notebook.cells else ""
    heading = re.match(r"# (.+)", first)
    if heading is None:
        raise CannotBuild(f"{script.name}: a chapter begins with a cell of text and its `# title`.")
    return Chapter(script, notebook, heading[1].strip(), _summary(script, first))


def notebook_text(notebook: NotebookNode) -> str:
    return nbformat.writes(notebook) + "\n"


def _summary(script: Path, markdown: str) -> str:
    """The first sentence below the heading; of a list, that of its first item."""
    for paragraph in re.split(r"\n\s*\n|\n(?=[-*] )", markdown)[1:]:
        text = " ".join(paragraph.split()).removeprefix("- ").removeprefix("* ")
        if text and not text.startswith("#") and not text.endswith(":"):
            sentence = re.match(r".+?[.!?](?=\s|$)", text)
            return sentence[0] if sentence else text
    raise CannotBuild(f"{script.name}: below its title a chapter says what it is about.")
