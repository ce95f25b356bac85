"""`minipaged lab challenge`: a student's policy against the library's, and the leaderboard."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minipaged.errors import InvalidOption
from minipaged.labs.challenge import (
    FILE_NAME,
    NUMBER,
    SERVER,
    Entry,
    Served,
    add_to_leaderboard,
    entry,
    parts_of,
    read_leaderboard,
    serve,
    traces,
)
from minipaged.utils.options import require_whole
from minipaged.utils.progress import progress_bar

console = Console(highlight=False, soft_wrap=True)


def challenge(
    file: Annotated[Path, typer.Argument(help="Your file.")] = Path(FILE_NAME),
    leaderboard: Annotated[
        Path | None, typer.Option(help="Add the result to this file and print the ranking.")
    ] = None,
    name: Annotated[str, typer.Option(help="Your name. Default: the file's name.")] = "",
    seed: Annotated[int, typer.Option(help="Random seed for arrival times and lengths.")] = 0,
) -> None:
    """Lab 9: compare the latency of your policy with the library's."""
    require_whole("seed", seed, 0)
    if name and leaderboard is None:
        raise InvalidOption(
            "--name appears only in a leaderboard: add --leaderboard, or leave out --name."
        )
    if not file.is_file():
        raise InvalidOption(f"there is no {file}: begin with `minipaged lab start {NUMBER}`.")
    parts = parts_of(file)
    if leaderboard is not None:
        read_leaderboard(leaderboard)  # report a damaged file before the long run
    requests = traces(seed)
    for workload, trace in requests.items():
        console.print(f"{workload}: {len(trace)} requests in {trace[-1].arrival:.0f} s, {SERVER}")
    library = _serve_all("library", requests, {})
    yours = _serve_all("yours", requests, parts)
    console.print(_comparison(library, yours))
    mine = entry(name or file.stem, seed, library, yours)
    console.print(f"score {mine.score:.3f}: your mean latency / the library's; lower is better.")
    if leaderboard is not None:
        console.print(_sorted(add_to_leaderboard(leaderboard, mine)))


def _serve_all(who: str, requests: dict[str, Any], parts: dict[str, Any]) -> list[Served]:
    bar = progress_bar(requests.items(), desc=f"serving: {who}", unit="trace", leave=False)
    return [serve(workload, trace, parts) for workload, trace in bar]


def _comparison(library: list[Served], yours: list[Served]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("seconds per token", "", "mean", "p50", "p90", "preemptions"):
        table.add_column(title, justify="left" if title in ("seconds per token", "") else "right")
    for pair in zip(library, yours, strict=True):
        for who, one in zip(("library", "yours"), pair, strict=True):
            latencies = (f"{number:.4f}" for number in (one.mean, one.p50, one.p90))
            first = one.workload if who == "library" else ""
            table.add_row(first, who, *latencies, str(one.num_preemptions))
    return table


def _sorted(entries: list[Entry]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("", "name", "score", "seed", "date"):
        table.add_column(title)
    for place, one in enumerate(entries, start=1):
        name, date = escape(one.name), escape(one.date)  # the file may be edited by hand
        table.add_row(str(place), name, f"{one.score:.3f}", str(one.seed), date)
    return table
