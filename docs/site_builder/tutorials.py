"""Chapters and labs: their pages, pictures and downloads, and the pages that list them."""

import copy
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nbformat import NotebookNode

from minipaged.labs.chapters.openings import as_image, as_thumbnail, with_opening
from site_builder.chapters import Chapter, chapters_of, notebook_text
from site_builder.execution import executed
from site_builder.markdown import CannotBuild, expanded, with_quotes
from site_builder.tutorial_pages import page_of

LABS = "tutorials/labs"
WITHOUT_RUNNING = "MINIPAGED_DOCS_WITHOUT_RUNNING"

INDEX = """\
# Tutorials

From a first run to a serving engine: in most chapters you write a part of the engine yourself, and
the model runs on it. The outputs on each page were produced when the site was built. No chapter
needs a GPU or a network.

Three ways to follow:

- Read here. Chapters 0, 3, 6, 7, 8 and 9 replay what happened in the pool, block by block.
- Read on your own machine, without a network: `minipaged learn 3` opens chapter 3 in the browser,
  with the outputs that its code gives there (`pip install -e ".[plot]"`). Or run the script in a
  checkout, `python tutorials/00_first_run.py`; set `MINIPAGED_PICTURES=pictures` to save its
  pictures in that folder.
- Open the notebook in Jupyter: `minipaged learn --notebooks DIR` writes all of them, and each
  chapter links to its own at the top. Or open the script in an editor that supports cells
  (`# %%`), such as VS Code or Spyder.

Each chapter has the same form: goals, invariants, numbers to predict before you run anything, a
part to build, a check that fails if it is wrong, an exercise, questions with folded answers, and
results.
"""

LABS_INDEX = """\
# Labs

In a lab you write a part of the engine: you fill in the missing bodies of a file, tests tell you
what is missing, and in the end a language model runs on your code.

```sh
pip install -e ".[labs]"
minipaged lab list
minipaged lab start 1
minipaged lab check 1
```

"""


def tutorial_files(root: Path) -> dict[str, bytes]:
    """Path below docs/ -> content. With MINIPAGED_DOCS_WITHOUT_RUNNING set, pages lack outputs."""
    chapters = chapters_of(root)
    files: dict[str, bytes] = {}
    for chapter, notebook in zip(chapters, _notebooks(chapters, root), strict=True):
        page = page_of(chapter, notebook, root)
        folder = f"tutorials/{chapter.name}"
        files[f"{folder}.md"] = page.markdown.encode()
        files[f"{folder}.ipynb"] = notebook_text(_to_take_home(chapter, root)).encode()
        files[f"{folder}.py"] = chapter.script.read_bytes()
        files |= {f"tutorials/{path}": content for path, content in page.pictures.items()}
    drawing = root / "tutorials" / "drawing.py"
    if drawing.exists():
        files["tutorials/drawing.py"] = drawing.read_bytes()
    if chapters:
        files["tutorials/index.md"] = index_page(chapters).encode()
    return files | lab_files(root)


def _notebooks(chapters: list[Chapter], root: Path) -> list[NotebookNode]:
    """With their outputs, several chapters at once where there are cores for it."""
    if os.environ.get(WITHOUT_RUNNING):
        return [chapter.notebook for chapter in chapters]
    at_once = max(1, (os.cpu_count() or 1) // 2)
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda chapter: executed(chapter, root), chapters))


def index_page(chapters: list[Chapter]) -> str:
    return INDEX + "".join(map(_entry, chapters))


def _entry(chapter: Chapter) -> str:
    """A chapter in the list: its opening, small, and a paragraph."""
    picture = f"\n{as_thumbnail(chapter.opening)}\n" if chapter.opening else ""
    return f"{picture}\n[{chapter.title}]({chapter.name}.md): {chapter.summary}\n"


def _to_take_home(chapter: Chapter, root: Path) -> NotebookNode:
    """The notebook without outputs; it quotes the code that its page quotes."""
    notebook = copy.deepcopy(chapter.notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = with_quotes(cell.source, root, chapter.script.name).rstrip()
            cell.source = with_opening(text, chapter.opening, as_image)
    return notebook


def lab_files(root: Path) -> dict[str, bytes]:
    """Path below docs/ -> content: a page for each brief, and one that lists them."""
    files: dict[str, bytes] = {}
    titles: list[str] = []
    for brief in sorted((root / LABS).glob("[0-9]*.md")):
        text = brief.read_text(encoding="utf-8")
        title = re.match(r"# (.+)", text)
        if title is None:
            raise CannotBuild(f"{LABS}/{brief.name}: a brief begins with its `# title`.")
        titles.append(f"- [{title[1].strip()}]({brief.name})")
        page = f"{LABS}/{brief.name}"
        files[page] = expanded(text, root, page).encode()
    if files:
        files[f"{LABS}/index.md"] = (LABS_INDEX + "\n".join(titles) + "\n").encode()
    return files
