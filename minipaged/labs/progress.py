"""What a student has so far: the best points of each task, and the hints that were given.

Kept in one small file beside the student's own, to be read by them as well.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minipaged.labs.grading import Result
from minipaged.labs.lab import Lab
from minipaged.utils.files import write_atomically

FILE = "minipaged_labs.json"


@dataclass
class Progress:
    """The progress file of a folder. A damaged one is begun anew: it holds nothing precious."""

    folder: Path
    # By "lab.task"; None: it could not be tested on this machine, so it does not count.
    points: dict[str, float | None] = field(default_factory=dict[str, float | None])
    hints: dict[str, int] = field(default_factory=dict[str, int])  # given so far

    @classmethod
    def read(cls, folder: Path) -> "Progress":
        try:
            known: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
            return cls(folder, dict(known["points"]), dict(known["hints"]))
        except (OSError, ValueError, KeyError, TypeError):
            return cls(folder)

    def note(self, lab: Lab, result: Result) -> None:
        """Keep the points of a task, as they are now; as they were, if it could not be tested."""
        key = f"{lab.number}.{result.task.number}"
        if result.counts:
            self.points[key] = result.points
        else:
            self.points.setdefault(key, None)

    def points_of(self, lab: Lab) -> float | None:
        """What a lab has given so far; None if it was never checked."""
        known = [self.points.get(f"{lab.number}.{task.number}") for task in lab.tasks]
        return None if set(known) == {None} else sum(points or 0.0 for points in known)

    def most(self, lab: Lab) -> float:
        """The points that there are to win, without the tasks that could not be tested."""
        untested = {task for task, points in self.points.items() if points is None}
        counting = [t for t in lab.tasks if f"{lab.number}.{t.number}" not in untested]
        return sum(task.points for task in counting)

    def is_full(self, lab: Lab) -> bool:
        return self.points_of(lab) == self.most(lab)

    def next_hint(self, lab: Lab, task: int) -> int:
        """The number of the next hint of a task, from 0; and note that it is given."""
        key = f"{lab.number}.{task}"
        number = self.hints.get(key, 0)
        self.hints[key] = number + 1
        return number

    def save(self) -> None:
        known = {"points": self.points, "hints": self.hints}
        write_atomically(self.folder / FILE, json.dumps(known, indent=2) + "\n")
