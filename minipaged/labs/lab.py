"""The structure of a lab: parts of the library, with some bodies for the student to write."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A task of a lab, with its own tests and points.

    Args:
        holes: the bodies to write, as "BlockAllocator.free" or, for a function, "gather". None: the
            task tests the work of the other tasks together.
        hints: from a nudge to nearly the answer; shown one at a time.
        seconds: the time limit of its tests; beyond it, the task has no points.
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
        sources: dotted names of the classes and functions in the starter file.
        parts: maps each part of `Parts` to the name of the student's class or function.
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
        """The pytest options that test this file's parts."""
        return [f"--part={part}={file}:{name}" for part, name in self.parts.items()]


def no_such_task(lab: Lab, number: int | None) -> str:
    """The error message for a task number that the lab does not have."""
    return f"lab {lab.number} has no task {number}: its tasks are 1 to {len(lab.tasks)}."
