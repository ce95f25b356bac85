"""The event stream in a file, for other programs to read."""

import stat
from pathlib import Path

from minipaged.errors import InvalidOption
from minipaged.tracing.events import Event


class TraceFile:
    """Writes events as JSON lines, atomically: the file appears only when it is complete.

    A regular file is written under a temporary name and renamed at the end. A pipe or a terminal
    cannot be renamed, so events are written to it directly. Raises InvalidOption if the path cannot
    be written.
    """

    def __init__(self, path: Path) -> None:
        if path.is_dir() or not path.name:
            raise InvalidOption(f"trace is {str(path)!r}, a folder: give the name of a file.")
        special = path.exists() and not stat.S_ISREG(path.stat().st_mode)
        self._path = path
        self._part = path if special else path.with_name(path.name + ".part")
        try:
            self._file = self._part.open("w", encoding="utf-8")
        except OSError as error:
            raise InvalidOption(
                f"trace is {str(path)!r}, which cannot be written ({error.strerror}): give "
                "another path."
            ) from error

    def write(self, event: Event) -> None:
        """Write one line."""
        print(event.to_json(), file=self._file)

    def close(self, keep: bool) -> None:
        """Rename the file to its final name, or delete it."""
        self._file.close()
        if self._part == self._path:
            return
        if keep:
            self._part.replace(self._path)
        else:
            self._part.unlink()
