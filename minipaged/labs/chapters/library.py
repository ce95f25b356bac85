"""The built pages of all chapters, in the user's cache folder.

Their folder is named after everything that a page can depend on: the chapters, this library and the
versions of what runs them. A page is built once. Pages of chapters that have not run yet have their
text and code, so that every link between chapters leads somewhere.
"""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock

from minipaged.errors import InvalidOption
from minipaged.labs.chapters.pages import chapter_page, file_of, lab_page
from minipaged.labs.chapters.reading import ROOT, Chapter, chapters_of, folder
from minipaged.labs.chapters.running import Output, run
from minipaged.utils.files import write_atomically

_KEPT = 3  # folders of pages: several versions of the library may be in use


class Library:
    """The chapters of this installation, and their pages."""

    def __init__(self, tutorials: Path | None = None) -> None:
        """`tutorials` is the folder of the chapters. Raises InvalidOption if it is missing."""
        self.folder = tutorials or folder()
        self.chapters = chapters_of(self.folder)

    def chapter(self, number: int) -> Chapter:
        """Return the chapter of this number. Raises InvalidOption if there is none."""
        for chapter in self.chapters:
            if chapter.number == number:
                return chapter
        first, last = self.chapters[0].number, self.chapters[-1].number
        raise InvalidOption(f"there is no chapter {number}: choose one from {first} to {last}.")

    @cached_property
    def pages(self) -> Path:
        """The folder of the pages, with a page for each chapter and each lab."""
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        pages = caches / "minipaged" / "learn" / self._key()
        try:
            pages.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidOption(
                f"{pages} cannot be created ({error.strerror}): set XDG_CACHE_HOME to a folder "
                "that you can write to."
            ) from error
        pages.touch()  # now the newest, so it is not deleted below
        for chapter in self.chapters:
            if not (page := pages / file_of(chapter.name)).exists():
                write_atomically(page, chapter_page(chapter, [], self.chapters))
        for brief in sorted((self.folder / "labs").glob("[0-9]*.md")):
            if not (page := pages / file_of(brief.stem)).exists():
                write_atomically(page, lab_page(brief, self.chapters))
        _forget_all_but_the_newest(pages.parent)
        return pages

    def page(self, chapter: Chapter) -> Path:
        """The page of a chapter in its present state. Runs nothing."""
        return self.pages / file_of(chapter.name)

    def brief(self, number: int) -> Path:
        """The page of a lab's brief."""
        return self.pages / file_of(f"{number:02}")

    def run(self, chapter: Chapter, on_start: Callable[[Path], None] = lambda _: None) -> str:
        """Run a chapter, unless its outputs are on its page already.

        The outputs of a chapter that fails are on its page, and it runs again the next time.

        Args:
            on_start: called with the page, which has text and code, before the chapter runs.

        Returns:
            The error that ended the chapter, or "".
        """
        page = self.page(chapter)
        done = page.with_suffix(".done")
        outputs: list[Output] = []
        with FileLock(page.with_suffix(".lock")):
            if done.exists():
                return ""
            write_atomically(page, chapter_page(chapter, [], self.chapters, running=True))
            on_start(page)
            try:
                outputs = run(chapter)
            finally:  # also after Ctrl-C: otherwise the page would keep waiting for outputs
                write_atomically(page, chapter_page(chapter, outputs, self.chapters))
            error = outputs[-1].error if outputs else ""
            if not error:
                write_atomically(done, "")
        return error

    def _key(self) -> str:
        """A hash of everything that a page can depend on."""
        key = hashlib.sha256(f"{ROOT} {sys.version}".encode())
        for library in ("torch", "triton", "numpy", "matplotlib", "markdown-it-py", "pygments"):
            with suppress(PackageNotFoundError):
                key.update(f"{library} {version(library)}".encode())
        package = [p for p in (ROOT / "minipaged").rglob("*") if "__pycache__" not in p.parts]
        ours = [file for kind in ("*.py", "*/*.md", "*/*.svg") for file in self.folder.glob(kind)]
        for file in sorted([*package, *ours]):
            if file.is_file():
                key.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
        return key.hexdigest()[:12]


def _forget_all_but_the_newest(caches: Path) -> None:
    folders = sorted(caches.iterdir(), key=lambda path: path.stat().st_mtime)
    for old in folders[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
