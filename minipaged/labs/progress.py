"""A student's progress: the best points of each task, and the hints that were shown.

It is stored in one small readable file in the student's folder. If that file has other content, it
is renamed, and a new one is started.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minipaged.errors import InvalidOption
from minipaged.labs.lab import Lab
from minipaged.labs.verdict import Result
from minipaged.utils.files import write_atomically

FILE = "minipaged_labs.json"
_LONGEST_FILE = 2**20  # bytes


@dataclass
class Progress:
    """The progress file of a folder.

    Args:
        note: a message for the student about a damaged file.
    """

    folder: Path
    # By "lab.task"; None: not testable on this machine, so it does not count.
    points: dict[str, float | None] = field(default_factory=dict[str, float | None])
    hints: dict[str, int] = field(default_factory=dict[str, int])  # shown so far
    note: str = ""

    @classmethod
    def read(cls, folder: Path) -> "Progress":
        """Read the folder's file. Raises InvalidOption if it is not a file."""
        file = folder / FILE
        if not file.exists() and not file.is_symlink():
            return cls(folder)
        if not file.is_file():
            raise InvalidOption(f"{file} is not a file: move it away.")
        try:
            if file.stat().st_size > _LONGEST_FILE:
                raise ValueError("too large")
            known = json.loads(file.read_text(encoding="utf-8"))
            return cls(folder, _numbers(known["points"], True), _numbers(known["hints"], False))
        except OSError as error:
            raise InvalidOption(f"{file} cannot be read ({error.strerror}).") from error
        except (ValueError, KeyError, TypeError, RecursionError):
            backup = next_free(file, ".damaged.")
            shutil.move(file, backup)
            return cls(folder, note=f"{FILE} was damaged: it was renamed to {backup.name}.")

    def keep(self, lab: Lab, result: Result) -> None:
        """Store the points of a task; keep the old ones if it could not be tested."""
        key = f"{lab.number}.{result.task.number}"
        if result.counts:
            self.points[key] = result.points
        else:
            self.points.setdefault(key, None)

    def points_of(self, lab: Lab) -> float | None:
        """The points of a lab so far; None if it was never checked."""
        known = [self.points.get(f"{lab.number}.{task.number}") for task in lab.tasks]
        return None if set(known) == {None} else sum(points or 0.0 for points in known)

    def most(self, lab: Lab) -> float:
        """The maximum points, without the tasks that could not be tested."""
        untested = {task for task, points in self.points.items() if points is None}
        counting = [t for t in lab.tasks if f"{lab.number}.{t.number}" not in untested]
        return sum(task.points for task in counting)

    def is_full(self, lab: Lab) -> bool:
        return self.points_of(lab) == self.most(lab)

    def next_hint(self, lab: Lab, task: int) -> int:
        """Return the number of a task's next hint, from 0, and record that it was shown."""
        key = f"{lab.number}.{task}"
        number = self.hints.get(key, 0)
        self.hints[key] = number + 1
        return number

    def save(self) -> None:
        known = {"points": self.points, "hints": self.hints}
        write_atomically(self.folder / FILE, json.dumps(known, indent=2) + "\n")


def next_free(file: Path, ending: str) -> Path:
    """A free name for a backup: `file.py.1`, `file.py.2` and so on."""
    names = (file.with_name(f"{file.name}{ending}{number}") for number in range(1, 10_000))
    return next(name for name in names if not name.exists())


def _numbers(known: Any, is_points: bool) -> dict[str, Any]:
    """Check that it maps tasks to finite numbers. Raises ValueError, TypeError."""
    for task, number in dict(known).items():
        lab, _, rest = str(task).partition(".")
        if not (lab.isdecimal() and rest.isdecimal()) or isinstance(number, bool):
            raise ValueError(f"{task}: {number}")
        if number is None and is_points:
            continue
        if not isinstance(number, (int, float) if is_points else int):
            raise TypeError(f"{task}: {number}")
        if not 0 <= number < 10**6:  # nor NaN
            raise ValueError(f"{task}: {number}")
    return dict(known)
