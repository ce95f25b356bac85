"""The results of `minipaged bench engine`: rows, a table, a caption, a picture."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from minipaged.errors import InvalidOption
from minipaged.evaluation.bench.engine_workload import Workload

READ = "a read of all weights"  # no step at batch 1 can be faster
MIXED = "mixed trace"
PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Row:
    """One case on one side. Times are medians of all rounds."""

    case: str
    by: str
    num_tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens_per_second: float = 0.0
    tokens_per_cpu_second: float = 0.0
    times_seconds: float | None = None  # over minipaged's of the same round
    times_cpu_seconds: float | None = None
    num_requests: int = 0
    num_alike: int | None = None  # requests with the same tokens as transformers' first run
    num_close: int = 0  # requests in which rounding decided
    percent_of_read: float | None = None  # percent of the speed at which the weights can be read
    peak_bytes: int | None = None
    failure: str | None = None  # why it could not run
    rounds: list[tuple[float, float]] = field(default_factory=list)  # seconds, CPU seconds


def refuse_what_cannot_be(
    against: str | None, dtype: str, save: Path | None, plot: Path | None
) -> None:
    """Raise InvalidOption before the run starts, not at its end."""
    if dtype not in ("float32", "bfloat16"):
        raise InvalidOption(f"dtype is {dtype!r}: choose float32 or bfloat16.")
    if against not in (None, "transformers"):
        raise InvalidOption(f"--against is {against!r}: give transformers, or leave it out.")
    if against is not None and find_spec("transformers") is None:
        raise InvalidOption(
            "transformers is not installed: pip install 'minipaged[test]', or leave out --against."
        )
    if plot is not None and plot.suffix not in PICTURES:
        raise InvalidOption(f"--plot is {plot}: give a file that ends in {', '.join(PICTURES)}.")
    if plot is not None and find_spec("matplotlib") is None:
        raise InvalidOption("--plot draws with matplotlib: pip install 'minipaged[plot]'.")
    for file in (save, plot):
        if file is not None and not file.parent.is_dir():
            raise InvalidOption(f"there is no folder {file.parent} for {file.name}: create it.")


def describe(workload: Workload, dtype: str, rounds: int, against: str | None) -> str:
    """The caption of the table."""
    hf, requests = workload.hf, workload.mixed_requests()
    note = (
        f"A LLaMA with random weights ({hf['num_hidden_layers']} layers, hidden size "
        f"{hf['hidden_size']}), {dtype}, greedy; all in turn, median of rounds: {rounds}. Decode: "
        f"{workload.new_tokens} tokens of each sequence, after a prompt of {workload.prompt_len} "
        f"and a first token that are not timed. Mixed trace: {len(requests)} requests at once, "
        f"{sum(len(prompt) for prompt, _ in requests):,} tokens of prompts and "
        f"{sum(output for _, output in requests):,} new ones; all of it is timed. "
        '"Of the read": of the speed at which weights alone can be read. Peak: resident memory on '
        "the mixed trace, model included, over that after the imports."
    )
    if against is not None:
        note += (
            f" transformers {version('transformers')}, SDPA. Static: batches formed beforehand, "
            "padded, each until its longest request ends; only tokens that were asked for count. "
            'Continuous: its own paged cache. "minipaged is": how many times as fast; "by CPU '
            'time": the same by processor time; both are medians of the ratios within each round. '
            "Same tokens: requests that agree with transformers' first run; in close calls, "
            "rounding chose between two tokens."
        )
    return note


def as_table(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(box=None, padding=(0, 2))
    for title in ("", "by"):
        table.add_column(title, no_wrap=True)
    titles = ("tokens/s", "per CPU second", "minipaged is", "by CPU time", "of the read", "peak")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("same tokens")
    for row in rows:
        if row.failure is not None:
            table.add_row(row.case, row.by, *[""] * len(titles), f"cannot run: {row.failure}")
            continue
        table.add_row(
            row.case,
            row.by,
            f"{row.tokens_per_second:.1f}",
            f"{row.tokens_per_cpu_second:.1f}",
            _if_any(row.times_seconds, lambda x: f"{x:.2f} x"),
            _if_any(row.times_cpu_seconds, lambda x: f"{x:.2f} x"),
            _if_any(row.percent_of_read, lambda x: f"{x:.0f} %"),
            _if_any(row.peak_bytes, lambda x: f"{x / 1e6:.0f} MB"),
            _same_tokens(row),
        )
    return table


def _if_any(value: float | None, text: Callable[[float], str]) -> str:
    return "" if value is None else text(value)


def _same_tokens(row: Row) -> str:
    parts: list[str] = []
    if row.num_alike is not None:
        parts.append(f"{row.num_alike} of {row.num_requests}")
    if row.num_close:
        parts.append(f"close calls in {row.num_close}")
    return ", ".join(parts)


def plot_rows(rows: list[Row], path: Path) -> None:
    """Draw tokens per second as bars, one panel per case, to an image file."""
    import_module("matplotlib").use("Agg")  # draws to files without a screen
    pyplot: Any = import_module("matplotlib.pyplot")
    cases = list(dict.fromkeys(row.case for row in rows))
    figure, panels = pyplot.subplots(
        len(cases), 1, figsize=(8, 1.6 * len(cases)), squeeze=False, layout="constrained"
    )
    for panel, case in zip(panels[:, 0], cases, strict=True):
        shown = [row for row in rows if row.case == case and row.failure is None][::-1]
        colors = ["tab:blue" if row.by == "minipaged" else "tab:gray" for row in shown]
        bars = panel.barh(
            [row.by for row in shown], [row.tokens_per_second for row in shown], color=colors
        )
        panel.bar_label(bars, fmt="%.1f", padding=3)
        panel.margins(x=0.12)
        panel.set_title(case, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("tokens per second, median of rounds")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
