"""What every soak shares: count cases and mismatches, show progress, survive Ctrl-C."""

from abc import ABC, abstractmethod
from typing import Any

from minipaged.utils.progress import progress_bar


class Mismatch(Exception):
    """Something happened that the model of it does not predict."""


def describe(error: Exception) -> str:
    """What went wrong, in one line."""
    return str(error) if isinstance(error, Mismatch) else f"{type(error).__name__}: {error}"


class Soak(ABC):
    """A long run of random cases. Ctrl-C ends it early and keeps what was found so far.

    The same seed draws the same cases, whatever the count.
    """

    command: str  # its name below `minipaged soak`
    unit: str  # what is counted, in the plural

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self.num_done = 0
        self.num_mismatches = 0
        self.first_mismatch: str | None = None
        self.reproduce: str | None = None  # the command that shows the first mismatch again
        self.was_interrupted = False

    def run(self) -> None:
        """Run all cases; afterwards the attributes say what was found."""
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
        """Check what can be checked only at the end; not called after Ctrl-C."""

    def note(self, mismatch: str, seed: int, count: int) -> None:
        """Count a mismatch that the first `count` cases of this seed show again."""
        self.num_mismatches += 1
        if self.first_mismatch is None:
            self.first_mismatch = mismatch
            self.reproduce = f"minipaged soak {self.command} --seed {seed} --count {count}"

    def details(self) -> list[str]:
        """Sentences to print before the last line."""
        return []

    def counts(self) -> str:
        """How many cases have run."""
        return f"{self.num_done:,} {self.unit}"

    def last_line(self) -> str:
        """The count and the number of mismatches."""
        noun = "mismatch" if self.num_mismatches == 1 else "mismatches"
        return f"{self.counts()}, {self.num_mismatches:,} {noun}"

    def as_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "soak": self.command,
            "seed": self.seed,
            "count": self.num_done,
            "mismatches": self.num_mismatches,
            "first_mismatch": self.first_mismatch,
            "reproduce": self.reproduce,
            "interrupted": self.was_interrupted,
        }
