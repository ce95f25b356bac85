"""Shared by all figures: published numbers, ours, tolerances, data and a drawing."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

# The origin of the number.
EXACT, SIMULATED, MEASURED = "arithmetic", "simulated", "measured"


@dataclass(frozen=True)
class Check:
    """A published number, ours, and bounds for ours.

    Without bounds it is shown only for comparison, because the paper gives too little information
    for a bound, or because the number was used for fitting.
    """

    what: str
    paper: str  # as printed in the paper
    ours: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    remark: str = ""  # the reason for a miss, or the note that the number is fitted

    @property
    def is_met(self) -> bool | None:
        """Whether ours is within the bounds; None: there are none."""
        if self.low is None and self.high is None:
            return None
        above = self.low is None or self.ours >= self.low
        return above and (self.high is None or self.ours <= self.high)


def near(
    what: str,
    paper: float,
    ours: float,
    *,
    percent: float | None = None,
    points: float | None = None,
    unit: str = "",
    remark: str = "",
) -> Check:
    """A check that ours equals the paper's number within a tolerance in percent or in points."""
    slack = points if points is not None else paper * (percent or 0.0) / 100
    # Bounds are compared in the printed digits: 7.0004 is 7.00.
    low, high = paper - slack - 0.005, paper + slack + 0.005
    return Check(what, f"{paper:g}", ours, low, high, unit, remark)


@dataclass(frozen=True)
class Result:
    """The result of a figure."""

    name: str
    title: str
    how: str  # EXACT, SIMULATED, MEASURED, or several of them
    checks: list[Check]
    data: dict[str, Any]  # the data for the drawing
    notes: list[str] = field(default_factory=list[str])

    def as_dict(self) -> dict[str, Any]:
        checks = [{**asdict(check), "met": check.is_met} for check in self.checks]
        return {**asdict(self), "checks": checks}

    def as_table(self) -> Table:
        """The checks as a table."""
        table = Table(box=None, padding=(0, 2))
        for title in ("", "paper", "ours", "bar", ""):
            table.add_column(title, justify="left" if not title else "right")
        for check in self.checks:
            unit = f" {check.unit}" if check.unit else ""
            verdict = {None: "", True: "met", False: "MISSED"}[check.is_met]
            remark = f"{verdict}{', ' if verdict and check.remark else ''}{check.remark}"
            number = any(letter.isdigit() for letter in check.paper)
            paper = f"{check.paper}{unit}" if number else check.paper
            table.add_row(check.what, paper, f"{_figure(check.ours)}{unit}", _bar(check), remark)
        return table


def _bar(check: Check) -> str:
    if check.low is None and check.high is None:
        return ""
    if check.low == check.high:
        return _figure(check.low or 0.0)
    if check.high is None:
        return f"from {_figure(check.low or 0.0)}"
    if check.low is None:
        return f"to {_figure(check.high)}"
    return f"{_figure(check.low)} to {_figure(check.high)}"


def _figure(number: float) -> str:
    return f"{number:.4g}" if abs(number) < 1e4 else f"{number:,.0f}"


@dataclass(frozen=True)
class Effort:
    """How long to simulate: `--quick` for a first look, `--full` as in the paper."""

    name: str
    seconds: float  # of a trace of conversations
    short_seconds: float  # of a trace of instructions, whose request rate is ten times as high
    num_requests: int  # for measurements with a real model
    widths: tuple[int, ...]  # sequences of a request, where each width takes long


QUICK = Effort("quick", 400.0, 100.0, 16, (2, 6))
FULL = Effort("full", 3600.0, 900.0, 128, (2, 4, 6))


@dataclass(frozen=True)
class Figure:
    """One figure of the paper: functions to run it and to draw the result."""

    name: str
    title: str
    run: Callable[[Effort], Result]
    draw: Callable[[Result, "Canvas"], None]
    size: tuple[float, float] = (8.0, 4.0)  # inches
