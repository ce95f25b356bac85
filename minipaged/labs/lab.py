"""What a lab is: parts of the library, with some bodies for the student to write."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A part of a lab, with its own tests and points.

    Args:
        holes: the bodies to write, as "BlockAllocator.free" or, for a function, "gather". None: the
            task puts together what the others have brought.
        hints: from a nudge to nearly the answer; given one at a time.
        seconds: after so long its tests are stopped, and the task has no points.
    """

    number: int
    title: str
    points: float
    holes: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    seconds: float = 60.0


@dataclass(frozen=True)
class Lab:
    """One lab.

    Args:
        name: the student's file is `lab<number>_<name>.py`.
        sources: dotted names of the classes and functions that the file begins with.
        parts: by part of `Parts`, the name of the student's class or function.
    """

    number: int
    name: str
    title: str
    sources: tuple[str, ...]
    parts: dict[str, str]
    tasks: tuple[Task, ...]

    @property
    def file_name(self) -> str:
        return f"lab{self.number}_{self.name}.py"

    @property
    def points(self) -> float:
        return sum(task.points for task in self.tasks)

    @property
    def holes(self) -> list[str]:
        return [hole for task in self.tasks for hole in task.holes]

    def part_options(self, file: str) -> list[str]:
        """What to pass to pytest, so that this file's parts are tested."""
        return [f"--part={part}={file}:{name}" for part, name in self.parts.items()]


def no_such_task(lab: Lab, number: int | None) -> str:
    """What to say when a task is asked for that the lab does not have."""
    return f"lab {lab.number} has no task {number}: its tasks are 1 to {len(lab.tasks)}."
