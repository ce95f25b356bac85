"""What a student has so far: the best points of each task, and the hints that were given.

Kept in one small file beside the student's own, to be read by them as well.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minipaged.labs.grading import Result
from minipaged.labs.lab import Lab
from minipaged.whole_file import write_whole

FILE = "minipaged_labs.json"


@dataclass
class Progress:
    """The progress file of a folder. A damaged one is begun anew: it holds nothing precious."""

    folder: Path
    points: dict[str, float] = field(default_factory=dict[str, float])  # by "lab.task"
    hints: dict[str, int] = field(default_factory=dict[str, int])  # given so far

    @classmethod
    def read(cls, folder: Path) -> "Progress":
        try:
            known: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
            return cls(folder, dict(known["points"]), dict(known["hints"]))
        except (OSError, ValueError, KeyError, TypeError):
            return cls(folder)

    def note(self, lab: Lab, result: Result) -> None:
        """Keep the points of a task, as they are now."""
        self.points[f"{lab.number}.{result.task.number}"] = result.points

    def points_of(self, lab: Lab) -> float | None:
        """What a lab has given so far; None if it was never checked."""
        known = [self.points.get(f"{lab.number}.{task.number}") for task in lab.tasks]
        return None if set(known) == {None} else sum(points or 0.0 for points in known)

    def is_full(self, lab: Lab) -> bool:
        return self.points_of(lab) == lab.points

    def next_hint(self, lab: Lab, task: int) -> int:
        """The number of the next hint of a task, from 0; and note that it is given."""
        key = f"{lab.number}.{task}"
        number = self.hints.get(key, 0)
        self.hints[key] = number + 1
        return number

    def save(self) -> None:
        known = {"points": self.points, "hints": self.hints}
        write_whole(self.folder / FILE, json.dumps(known, indent=2) + "\n")
