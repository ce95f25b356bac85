"""The results of `minipaged bench serve`: figures of a run, tables for 80 columns, a picture."""

import io
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path
from typing import Any

from rich.table import Table

from minipaged.evaluation.bench.serve_client import TOO_MANY, UNFINISHED, Served
from minipaged.utils.files import write_atomically


@dataclass(frozen=True)
class Distribution:
    """A distribution of times, in milliseconds."""

    mean: float
    median: float
    p90: float
    p99: float

    @classmethod
    def of_seconds(cls, seconds: Iterable[float]) -> "Distribution | None":
        """None where there are no values."""
        values = sorted(1000 * each for each in seconds)
        if not values:
            return None
        p90, p99 = (values[ceil(share * len(values)) - 1] for share in (0.9, 0.99))
        return cls(statistics.fmean(values), statistics.median(values), p90, p99)


@dataclass(frozen=True)
class Slo:
    """A service level objective: the maximum times of a good request, in milliseconds."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def is_met_by(self, served: Served) -> bool:
        """Whether a served request met the objective."""
        ttft, tpot = 1000 * served.ttft, 1000 * (served.tpot or 0.0)
        return ttft <= (self.ttft_ms or inf) and tpot <= (self.tpot_ms or inf)


@dataclass(frozen=True)
class Row:
    """The figures of one run. Times are measured by the client."""

    rate: float | None  # offered requests per second; None: all at once, or a trace
    concurrency: int | None  # of a closed load
    num_requests: int
    num_served: int
    num_rejected: int  # answered with 429
    num_unfinished: int  # aborted at the end of the run
    num_errors: int  # any other
    num_faulty: int  # served, but not with the tokens that were asked for
    first_error: str | None  # or fault
    seconds: float  # from the first arrival to the last token
    requests_per_second: float
    output_tokens_per_second: float
    tokens_per_second: float  # with those of the prompts
    goodput: float | None  # requests per second within the SLO; None: there is none
    seconds_per_token: float | None  # normalised latency: a mean over requests
    is_lower_bound: bool  # of that latency, since some requests had not finished
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    lateness_ms: float  # largest delay of the client in sending a request
    prompt_tokens: int
    cached_tokens: int  # of these, found in the prefix cache
    max_concurrency: int  # concurrent requests
    client_cpu_seconds: float
    server_cpu_seconds: float | None  # None where the server does not report it
    memory: str | None = None  # the memory system, if several are compared


def summarize(
    results: Sequence[Served],
    slo: Slo | None = None,
    *,
    rate: float | None = None,
    concurrency: int | None = None,
    client_cpu_seconds: float = 0.0,
    server_cpu_seconds: float | None = None,
    memory: str | None = None,
) -> Row:
    """Compute the figures of a run.

    Requests aborted at the end of the run count in the normalised latency with their time until
    then: leaving them out would leave out the slowest.
    """
    good = [each for each in results if each.is_good]
    unfinished = [each for each in results if each.error == UNFINISHED]
    rejected = [each for each in results if each.status == TOO_MANY]
    faulty = [each for each in results if each.fault is not None]
    start = min(each.due for each in results)
    seen = [time for each in results for time in (each.due, each.finished or each.due)]
    seen += [time for each in unfinished for time in each.chunk_times]
    seconds = max(max(seen) - start, 1e-9)
    counted_in = [*good, *unfinished]
    latencies = [each.normalized_latency(max(seen)) for each in counted_in]
    outputs = sum(each.request.output_len for each in good)
    prompts = sum(len(each.request.prompt) for each in good)
    problems = (each.fault or each.error for each in results if each.error != UNFINISHED)
    num_failed = len(results) - len(good)
    return Row(
        rate=rate,
        concurrency=concurrency,
        num_requests=len(results),
        num_served=len(good),
        num_rejected=len(rejected),
        num_unfinished=len(unfinished),
        num_errors=num_failed - len(rejected) - len(unfinished) - len(faulty),
        num_faulty=len(faulty),
        first_error=next((problem for problem in problems if problem), None),
        seconds=seconds,
        requests_per_second=len(good) / seconds,
        output_tokens_per_second=outputs / seconds,
        tokens_per_second=(prompts + outputs) / seconds,
        goodput=None if slo is None else sum(map(slo.is_met_by, good)) / seconds,
        seconds_per_token=statistics.fmean(latencies) if latencies else None,
        is_lower_bound=bool(unfinished),
        ttft=Distribution.of_seconds(each.ttft for each in good),
        tpot=Distribution.of_seconds(each.tpot for each in good if each.tpot is not None),
        itl=Distribution.of_seconds(gap for each in good for gap in each.itl),
        lateness_ms=1000 * max((r.sent - r.due for r in results if r.sent is not None), default=0),
        prompt_tokens=prompts,
        cached_tokens=sum(each.num_cached for each in good),
        max_concurrency=_most_at_once(results),
        client_cpu_seconds=client_cpu_seconds,
        server_cpu_seconds=server_cpu_seconds,
        memory=memory,
    )


def _most_at_once(results: Sequence[Served]) -> int:
    spans = [(r.sent, r.finished) for r in results if r.sent is not None and r.finished is not None]
    # At the same moment, an end comes before a start.
    changes = sorted([(sent, 1) for sent, _ in spans] + [(end, -1) for _, end in spans])
    most = current = 0
    for _, change in changes:
        current += change
        most = max(most, current)
    return most


# ---- tables --------------------------------------------------------------------------------------


def as_tables(rows: Sequence[Row]) -> list[Table]:
    """The figures as tables: of one run, or of several rates."""
    if len(rows) > 1:
        return [rates_table(rows)]
    [row] = rows
    latencies = _table("latency, ms", "mean", "median", "p90", "p99")
    for name in ("ttft", "tpot", "itl"):
        found: Distribution | None = getattr(row, name)
        times = (found.mean, found.median, found.p90, found.p99) if found else ()
        latencies.add_row(name.upper(), *(f"{time:.2f}" for time in times))
    facts = Table(box=None, padding=(0, 1), pad_edge=False, show_header=False)
    facts.add_column(no_wrap=True)
    facts.add_column(justify="right", no_wrap=True)
    for what, figure in _facts(row):
        facts.add_row(what, figure)
    return [latencies, facts]


def _facts(row: Row) -> list[tuple[str, str]]:
    per_token = _shown(row.seconds_per_token, "{:.4f} s per output token", row.is_lower_bound)
    facts = [
        ("normalised latency", per_token),
        ("requests", f"{row.num_served} of {row.num_requests} served in {row.seconds:.2f} s"),
        ("most at once", f"{row.max_concurrency}"),
        ("request throughput", f"{row.requests_per_second:.2f} per second"),
        ("output tokens", f"{row.output_tokens_per_second:.1f} per second"),
        ("tokens, with prompts", f"{row.tokens_per_second:.1f} per second"),
    ]
    if row.goodput is not None:
        facts.append(("goodput within the SLO", f"{row.goodput:.2f} requests per second"))
    if row.cached_tokens:
        facts.append(("prompt tokens cached", f"{row.cached_tokens / row.prompt_tokens:.1%}"))
    for number, what in (
        (row.num_rejected, "rejected (429)"),
        (row.num_unfinished, "not finished"),
        (row.num_errors, "errors"),
        (row.num_faulty, "wrong responses"),
    ):
        if number:
            facts.append((what, str(number)))
    if row.server_cpu_seconds is not None:
        facts.append(("processor time, server", f"{row.server_cpu_seconds:.2f} s"))
    facts.append(("processor time, client", f"{row.client_cpu_seconds:.2f} s"))
    facts.append(("sent late by at most", f"{row.lateness_ms:.1f} ms"))
    return facts


def rates_table(rows: Sequence[Row]) -> Table:
    """One row per rate."""
    has_goodput = any(row.goodput is not None for row in rows)
    titles = ("req/s", "tok/s", "TTFT ms", "p99", "TPOT ms", "s/token", "failed")
    table = _table("rate /s", *titles, *(("goodput",) if has_goodput else ()))
    table.caption = "req/s, tok/s: requests and output tokens served. TTFT, TPOT: medians."
    table.caption_justify = "left"
    for row in rows:
        failed = row.num_requests - row.num_served
        table.add_row(
            "all" if row.rate is None else f"{row.rate:g}",
            f"{row.requests_per_second:.2f}",
            f"{row.output_tokens_per_second:.0f}",
            _shown(row.ttft and row.ttft.median, "{:.1f}"),
            _shown(row.ttft and row.ttft.p99, "{:.1f}"),
            _shown(row.tpot and row.tpot.median, "{:.2f}"),
            _shown(row.seconds_per_token, "{:.4f}", row.is_lower_bound),
            str(failed) if failed else "",
            *([_shown(row.goodput, "{:.2f}")] if has_goodput else []),
        )
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column(first, no_wrap=True)
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _shown(value: float | None, form: str, is_lower_bound: bool = False) -> str:
    return "" if value is None else (">" if is_lower_bound else "") + form.format(value)


# ---- a picture -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A curve of the picture: rates, and the normalised latency at each."""

    title: str
    colour: str
    rows: Sequence[Row]


def plot_lines(lines: Sequence[Line], file: Path, title: str, top: float | None = None) -> None:
    """Normalised latency against request rate. A triangle is a lower bound.

    Args:
        top: seconds per token at the upper end of the axis.
    """
    from matplotlib.figure import Figure as Canvas

    # A white background, so that the picture is readable on a dark page.
    canvas: Any = Canvas(figsize=(7.0, 4.0), layout="constrained", facecolor="white")
    axes = canvas.add_subplot()
    for line in lines:
        points = [r for r in line.rows if r.rate is not None and r.seconds_per_token is not None]
        rates = [row.rate for row in points]
        latencies = [row.seconds_per_token for row in points]
        axes.plot(rates, latencies, "-", color=line.colour, label=line.title)
        for row in points:
            marker = "^" if row.is_lower_bound else "o"
            axes.plot(row.rate, row.seconds_per_token, marker, markersize=4, color=line.colour)
    axes.set_ylim(0, top)
    axes.set_xlim(left=0)
    axes.set_xlabel("requests per second")
    axes.set_ylabel("normalised latency, s per token")
    axes.set_title(textwrap.fill(title, 100), fontsize=8, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes.legend(fontsize=8, frameon=False)
    picture = io.BytesIO()
    kind: Mapping[str, Any] = {"format": file.suffix.removeprefix("."), "dpi": 120}
    canvas.savefig(picture, **kind)
    write_atomically(file, picture.getvalue())
