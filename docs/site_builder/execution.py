"""Runs a chapter, once: its outputs are kept until something changes that they come from."""

import copy
import os
import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from site_builder.chapters import Chapter
from site_builder.imports import fingerprint
from site_builder.markdown import CannotBuild

SECONDS = 300  # for one cell; a chapter aims at ten seconds in all
SETTINGS_OF_PICTURES = Path(__file__).with_name("matplotlibrc")
KERNEL_OPTIONS = [
    "--InlineBackend.figure_formats={'svg'}",
    "--log-level=CRITICAL",  # it tells of ports without encryption and of its own end
]
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def executed(chapter: Chapter, root: Path) -> NotebookNode:
    """The chapter's notebook with its outputs. Raises CannotBuild if a cell raises."""
    kept = root / ".cache" / "tutorials" / f"{chapter.name}-{_key(chapter, root)}.ipynb"
    if kept.exists():
        return nbformat.read(kept, as_version=4)
    notebook = _run(chapter, root)
    kept.parent.mkdir(parents=True, exist_ok=True)
    for old in kept.parent.glob(f"{chapter.name}-*.ipynb"):
        old.unlink()
    _write_atomically(kept, nbformat.writes(notebook))
    return notebook


def _key(chapter: Chapter, root: Path) -> str:
    """Of all that an output can come from: the chapter, what it imports, and what runs it."""
    assets = (root / "minipaged" / "assets").rglob("*")
    data = [SETTINGS_OF_PICTURES, *(path for path in assets if path.is_file())]
    return fingerprint([chapter.script, Path(__file__)], data, root)


def _run(chapter: Chapter, root: Path) -> NotebookNode:
    notebook = copy.deepcopy(chapter.notebook)
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        coalesce_streams=True,
        extra_arguments=KERNEL_OPTIONS,
        resources={"metadata": {"path": str(root / "tutorials")}},
    )
    # The library of this checkout, wherever it is installed; pictures without a date and with the
    # same identifiers in every build, whatever the user's own settings are.
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "SOURCE_DATE_EPOCH": "0",
        "MATPLOTLIBRC": str(SETTINGS_OF_PICTURES),
    }
    try:
        client.execute(env=environment)
    except CellExecutionError as raised:
        raise CannotBuild(_what_raised(chapter, notebook, raised)) from None
    except (CellTimeoutError, DeadKernelError) as stopped:
        message = str(stopped).strip().splitlines()[0]
        raise CannotBuild(f"{chapter.script.name} cannot be run: {message}") from None
    return notebook


def _what_raised(chapter: Chapter, notebook: NotebookNode, raised: CellExecutionError) -> str:
    """The chapter, the cell, the error, in a few lines."""
    for index, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                name = cell.metadata.get("title") or f"cell {index}"
                lines = [line for line in ANSI.sub("", str(raised)).splitlines() if "-->" in line]
                code = cell.source.strip().splitlines()[:1]
                where = "".join(f"\n    {line.strip()}" for line in (lines[:1] or code))
                return (
                    f"{chapter.script.name}, {name}, raised{where}\n"
                    f"    {output.ename}: {ANSI.sub('', output.evalue)}"
                )
    return f"{chapter.script.name} raised {raised.ename}: {raised.evalue}"


def _write_atomically(path: Path, text: str) -> None:
    """Write the file completely or not at all, even if interrupted."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(temporary).replace(path)
