"""The results of `minipaged bench engine`: rows, a table, a caption, a picture."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from minipaged.errors import InvalidOption
from minipaged.evaluation.bench.engine_workload import Workload
from minipaged.utils.threads import describe_waiting

READ = "a read of all weights"  # no step at batch 1 can be faster
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
    num_alike: int | None = None  # requests with minipaged's tokens (its own: the first peer's)
    num_close: int = 0  # requests in which rounding decided
    percent_of_read: float | None = None  # percent of the speed at which the weights can be read
    peak_bytes: int | None = None
    cores: float | None = None  # kept busy: CPU seconds per second
    weights: str = ""  # the type they are kept in
    keys: str = ""
    version: str = ""
    failure: str | None = None  # why it could not run
    rounds: list[tuple[float, float]] = field(default_factory=list)  # seconds, CPU seconds


def refuse_what_cannot_be(dtype: str, save: Path | None, plot: Path | None) -> None:
    """Raise InvalidOption before the run starts, not at its end."""
    if dtype not in ("float32", "bfloat16"):
        raise InvalidOption(f"dtype is {dtype!r}: choose float32 or bfloat16.")
    if plot is not None and plot.suffix not in PICTURES:
        raise InvalidOption(f"--plot is {plot}: give a file that ends in {', '.join(PICTURES)}.")
    if plot is not None and find_spec("matplotlib") is None:
        raise InvalidOption("--plot draws with matplotlib: pip install 'minipaged[plot]'.")
    for file in (save, plot):
        if file is not None and not file.parent.is_dir():
            raise InvalidOption(f"there is no folder {file.parent} for {file.name}: create it.")


def describe(workload: Workload, dtype: str, rounds: int, rows: list[Row]) -> str:
    """The caption of the table."""
    hf, requests = workload.hf, workload.mixed_requests()
    note = (
        f"A LLaMA with random weights ({hf['num_hidden_layers']} layers, hidden size "
        f"{hf['hidden_size']}), {dtype}, greedy; all in turn, each in its own process, median of "
        f"rounds: {rounds}. Waiting threads: {describe_waiting()}.\n"
        f"Decode: {workload.new_tokens} tokens of each sequence, after a prompt of "
        f"{workload.prompt_len} and a first token that are not timed. Prefill: tokens of the "
        f"prompts. Prefix: {workload.num_sharing} requests at once, whose prompts begin with the "
        f"same {workload.prefix_len} tokens, with {workload.own_len} tokens of their own and "
        f"{workload.new_tokens} new ones. Mixed trace: {len(requests)} requests at once, "
        f"{sum(len(prompt) for prompt, _ in requests):,} tokens of prompts and "
        f"{sum(output for _, output in requests):,} new ones. All of it is timed, and new tokens "
        "count. Prompts are fresh in every round, and prefix caches are on.\n"
        '"cores": CPU seconds per second; "peak GB": resident memory of the process in the case.'
    )
    if any(row.times_seconds is not None for row in rows):
        note += (
            ' "ours is": how many times as fast minipaged is; "by CPU": the same by processor '
            'time; both are medians of the ratios within each round. "same": requests with '
            "minipaged's tokens, or, in its own row, with the first peer's; in close calls, "
            "rounding chose between two tokens."
        )
    if any("static" in row.by for row in rows):
        note += (
            " transformers uses SDPA. Static: batches formed beforehand, padded, each until its "
            "longest request ends; only tokens that were asked for count. Continuous: its own "
            "paged cache."
        )
    engines = {
        row.by.split(", static")[0].split(", continuous")[0]: row for row in rows if row.version
    }
    kept = [
        f"{name} {row.version}: weights in {row.weights}, keys in {row.keys}"
        for name, row in engines.items()
    ]
    return "\n".join([note, *kept])


def as_table(rows: list[Row]) -> Table:
    """The rows as a table of 80 columns; a case has a line of its own above its rows."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for title in ("tokens/s", "cores", "ours is", "by CPU", "peak GB"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("same", overflow="fold")
    case = None
    for row in rows:
        if row.case != case:
            case = row.case
            table.add_row(f"[bold]{case}[/bold]")
        if row.failure is not None:
            table.add_row(f"  {row.by}", "none")
            continue
        table.add_row(
            f"  {row.by}",
            f"{row.tokens_per_second:.1f}",
            _if_any(row.cores, lambda x: f"{x:.2f}"),
            _if_any(row.times_seconds, lambda x: f"{x:.2f} x"),
            _if_any(row.times_cpu_seconds, lambda x: f"{x:.2f} x"),
            _if_any(row.peak_bytes, lambda x: f"{x / 1e9:.2f}"),
            _same_tokens(row),
        )
    return table


def failures(rows: list[Row]) -> list[str]:
    """Why some rows have no figures, each reason once."""
    found = (f"{row.by} has no figures: {row.failure}" for row in rows if row.failure is not None)
    return list(dict.fromkeys(found))


def _if_any(value: float | None, text: Callable[[float], str]) -> str:
    return "" if value is None else text(value)


def _same_tokens(row: Row) -> str:
    parts: list[str] = []
    if row.num_alike is not None:
        parts.append(f"{row.num_alike}/{row.num_requests}")
    if row.num_close:
        parts.append(f"{row.num_close} close")
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
