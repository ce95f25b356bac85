"""A notebook with its outputs -> a page in Markdown, and the files of its pictures.

Nothing is run here and nothing is written.
"""

import base64
import html
from dataclasses import dataclass, field
from pathlib import Path

from nbformat import NotebookNode

from minipaged.labs.chapters.openings import as_figure, with_opening
from site_builder.chapters import Chapter
from site_builder.execution import ANSI
from site_builder.markdown import CannotBuild, expanded, fenced

PICTURES = {"image/svg+xml": "svg", "image/png": "png"}


@dataclass
class Page:
    """A chapter's page; its pictures by their path beside the page."""

    markdown: str
    pictures: dict[str, bytes] = field(default_factory=dict[str, bytes])


def page_of(chapter: Chapter, notebook: NotebookNode, root: Path) -> Page:
    """Raises CannotBuild for a picture without a title and for a name that is gone."""
    pictures: dict[str, bytes] = {}
    parts: list[str] = []
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            text = with_opening(cell.source, chapter.opening, as_figure)
            parts.append(expanded(text, root, f"tutorials/{chapter.name}.md").rstrip())
        elif cell.cell_type == "code" and cell.source.strip():
            parts.append(fenced(cell.source, "python"))
            parts += _outputs(chapter, cell, index, pictures)
    heading, _, text = parts[0].partition("\n")
    parts[0] = f"{heading}\n\n{_downloads(chapter)}\n{text}"
    return Page("\n\n".join(parts) + "\n", pictures)


def _downloads(chapter: Chapter) -> str:
    name = chapter.name
    return (
        f"[Notebook]({name}.ipynb){{ download }} or [script]({name}.py){{ download }}; both import "
        f"[drawing.py](drawing.py){{ download }}, which must be next to them. In a checkout, with "
        f'`pip install -e ".[plot]"`: `python tutorials/{name}.py`\n{{ .downloads }}\n'
    )


def _outputs(
    chapter: Chapter, cell: NotebookNode, index: int, pictures: dict[str, bytes]
) -> list[str]:
    """What a cell showed. Its pictures go into `pictures`; what it wrote to stderr is left out."""
    parts: list[str] = []
    drawn = _pictures(cell)
    for output in cell.get("outputs", []):
        if output.output_type == "stream" and output.name == "stdout":
            parts.append(_block(output.text))
        elif "data" in output and not _is_picture(output):
            # A cell that draws often ends in an axis or a label, which nobody wants to read.
            parts += [] if drawn and set(output.data) == {"text/plain"} else [_shown(output)]
    title = cell.metadata.get("title", "").strip()
    if drawn and not title:
        raise CannotBuild(
            f"{chapter.script.name}: cell {index} draws a picture and has no title: begin it with "
            f"`# %% What the picture shows`."
        )
    for number, (suffix, content) in enumerate(drawn, 1):
        path = f"pictures/{chapter.name}-{index}-{number}.{suffix}"
        pictures[path] = content
        parts.append(_figure(path, title, caption=number == len(drawn)))
    return [part for part in parts if part]


def _is_picture(output: NotebookNode) -> bool:
    return any(kind in output.data for kind in PICTURES)


def _pictures(cell: NotebookNode) -> list[tuple[str, bytes]]:
    """Suffix and content of each picture, once: a figure that a cell returns is shown twice."""
    found: list[tuple[str, bytes]] = []
    for output in cell.get("outputs", []):
        for kind, suffix in PICTURES.items():
            content = output.get("data", {}).get(kind)
            if content is not None:
                data = content.encode() if suffix == "svg" else base64.b64decode(content)
                found += [(suffix, data)] if (suffix, data) not in found else []
                break
    return found


def _figure(path: str, title: str, caption: bool) -> str:
    alternative = title.replace("[", "\\[").replace("]", "\\]")
    below = f"\n<figcaption>{html.escape(title)}</figcaption>" if caption else ""
    return f'<figure class="picture" markdown="1">\n![{alternative}]({path}){below}\n</figure>'


def _block(text: str) -> str:
    text = ANSI.sub("", text).strip("\n")
    fence = fenced(text, "text")
    return f'<div class="output" markdown="1">\n\n{fence}\n\n</div>' if text.strip() else ""


def _shown(output: NotebookNode) -> str:
    data = output.data
    if "text/html" in data:
        return f'<div class="output">\n{data["text/html"].strip()}\n</div>'
    if "text/markdown" in data:
        return data["text/markdown"].strip()
    return _block(data.get("text/plain", ""))
