"""Turns the rows of a run into tables: for a terminal, and in Markdown for docs/kernels.md."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

Row = Mapping[str, Any]
COMMON = ("run", "dry_run", "after", "stage", "status", "part", "failure", "trace", "took")
LONGEST_TEXT = 60  # letters of a cell


def measured(rows: Iterable[Row], stage: str) -> list[Row]:
    """The measured rows of this stage."""
    return [row for row in rows if row["stage"] == stage and row["status"] == "measured"]


# -- Tables for a terminal --------------------------------------------------------------------


def as_table(rows: Sequence[Row]) -> Table:
    """The measured rows of one stage, each field a column."""
    table = Table(box=None, padding=(0, 2))
    names = dict.fromkeys(name for row in rows for name in row if name not in COMMON)
    shown = [name for name in names if any(row.get(name) not in (None, "") for row in rows)]
    for name in shown:
        is_text = any(isinstance(row.get(name), str) for row in rows)
        title = name.replace("_", " ")
        table.add_column(title, justify="left" if is_text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(name, row.get(name)) for name in shown))
    return table


def cell(name: str, value: Any) -> str:
    """A value as text; the name of its column says what it is."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value if len(value) <= LONGEST_TEXT else value[: LONGEST_TEXT - 3] + "..."
    if name.endswith("seconds") or "seconds_" in name:
        return seconds(value)
    if name.startswith("percent"):
        return f"{value:.1f} %"
    if "error" in name:
        return f"{value:.1e}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def seconds(value: float) -> str:
    """A time in its unit."""
    return f"{1e3 * value:,.2f} ms" if value >= 1e-2 else f"{1e6 * value:,.1f} us"


def failures(rows: Iterable[Row]) -> list[str]:
    """One line for each failure, and for each stage that was cut short."""
    return [
        f"{row['stage']}, {row['part']}: {row['status']}: {row['failure']}"
        for row in rows
        if row["status"] in ("failed", "cut short")
    ]
