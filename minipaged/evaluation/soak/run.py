"""Shared by all soaks: count cases and mismatches, show progress, handle Ctrl-C."""

from abc import ABC, abstractmethod
from typing import Any

from minipaged.utils.progress import progress_bar


class Mismatch(Exception):
    """A result differs from the model's prediction."""


def describe(error: Exception) -> str:
    """Describe an error in one line."""
    return str(error) if isinstance(error, Mismatch) else f"{type(error).__name__}: {error}"


class Soak(ABC):
    """A long run of random cases. Ctrl-C ends it early and keeps the results so far.

    The same seed draws the same cases, for any count.
    """

    command: str  # name of the subcommand of `minipaged soak`
    unit: str  # the counted unit, in the plural

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self.num_done = 0
        self.num_mismatches = 0
        self.first_mismatch: str | None = None
        self.reproduce: str | None = None  # the command that reproduces the first mismatch
        self.was_interrupted = False

    def run(self) -> None:
        """Run all cases; the attributes then contain the results."""
        with progress_bar(total=self.count, desc=self.unit) as bar:
            try:
                while self.num_done < self.count:
                    before = self.num_done
                    self.run_some()
                    bar.update(self.num_done - before)
                self.finish()
            except KeyboardInterrupt:
                self.was_interrupted = True

    @abstractmethod
    def run_some(self) -> None:
        """Run one case or a few, at most up to `count`, and add them to `num_done`."""

    def finish(self) -> None:  # noqa: B027
        """Final checks; not called after Ctrl-C."""

    def note(self, mismatch: str, seed: int, count: int) -> None:
        """Count a mismatch that the first `count` cases of this seed reproduce."""
        self.num_mismatches += 1
        if self.first_mismatch is None:
            self.first_mismatch = mismatch
            self.reproduce = f"minipaged soak {self.command} --seed {seed} --count {count}"

    def details(self) -> list[str]:
        """Sentences to print before the last line."""
        return []

    def counts(self) -> str:
        """The number of cases so far, as text."""
        return f"{self.num_done:,} {self.unit}"

    def last_line(self) -> str:
        """The count and the number of mismatches."""
        noun = "mismatch" if self.num_mismatches == 1 else "mismatches"
        return f"{self.counts()}, {self.num_mismatches:,} {noun}"

    def as_dict(self) -> dict[str, Any]:
        """The results as data."""
        return {
            "soak": self.command,
            "seed": self.seed,
            "count": self.num_done,
            "mismatches": self.num_mismatches,
            "first_mismatch": self.first_mismatch,
            "reproduce": self.reproduce,
            "interrupted": self.was_interrupted,
        }
