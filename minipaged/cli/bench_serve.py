"""`minipaged bench serve`: load on a server. torch is imported only to describe the machine."""

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType

from minipaged.cli.bench_load import read_groups, read_rates, refuse_what_cannot_be
from minipaged.cli.bench_options import Save, describe_machine
from minipaged.cli.options import AsJson, takes_engine_options
from minipaged.utils.files import write_atomically
from minipaged.utils.progress import progress_bar

if TYPE_CHECKING:
    from minipaged.evaluation.bench.serve_http import Target
    from minipaged.evaluation.bench.serve_load import Workload
    from minipaged.evaluation.bench.serve_report import Row


@takes_engine_options(leave_out=("seed",))
def serve(
    *,
    context: typer.Context,
    url: Annotated[
        str | None, typer.Option(help="Address of a server. Default: start one.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="API key of --url. Default: the environment variable MINIPAGED_API_KEY."),
    ] = None,
    request_rate: Annotated[
        float | None, typer.Option(help="Mean requests per second. Default: all at once.")
    ] = None,
    request_rates: Annotated[
        str | None, typer.Option(help="Several rates, one run each: 1,2,4,8.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Keep this many requests in flight instead.", min=1)
    ] = None,
    num_requests: Annotated[
        int | None, typer.Option(help="Requests per run. Default: 100, or all of --trace.", min=1)
    ] = None,
    input_len: Annotated[int, typer.Option(help="Tokens per prompt.", min=1)] = 64,
    output_len: Annotated[int, typer.Option(help="Tokens per output.", min=1)] = 128,
    spread: Annotated[
        float,
        typer.Option(help="Standard deviation of lengths, divided by their mean.", min=0, max=5),
    ] = 0.0,
    shared_prefix: Annotated[
        str | None, typer.Option(help="8x100: 8 groups, each sharing a prefix of 100 tokens.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Take arrival times and lengths from this CSV.")
    ] = None,
    speed_up: Annotated[
        float, typer.Option(help="Divide the arrival times of --trace.", min=1e-9, max=1e9)
    ] = 1.0,
    vocab_size: Annotated[
        int, typer.Option(help="Prompts are random token ids below this.", min=11)
    ] = 500,
    seed: Annotated[int, typer.Option(help="Random seed for the load.", min=0)] = 0,
    slo_ttft_ms: Annotated[
        float | None, typer.Option(help="Goodput: maximum TTFT in milliseconds.", min=0.001)
    ] = None,
    slo_tpot_ms: Annotated[
        float | None, typer.Option(help="Goodput: maximum TPOT in milliseconds.", min=0.001)
    ] = None,
    keep_alive: Annotated[bool, typer.Option("--keep-alive", help="Reuse connections.")] = False,
    give_up: Annotated[
        float | None,
        typer.Option(help="Abort the rest this many seconds after the last arrival.", min=0.001),
    ] = None,
    against_offline: Annotated[
        bool, typer.Option("--against-offline", help="Compare with LLM.generate.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Rounds of --against-offline.", min=1)] = 5,
    figure_12: Annotated[
        bool, typer.Option("--figure-12", help="Compare memory managers, as Figure 12 does.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(help="Seconds of arrivals per rate of --figure-12.", min=1)
    ] = 4.0,
    plot: Annotated[
        Path | None, typer.Option(help="Plot latency against rate to this file.")
    ] = None,
    save: Save = None,
    as_json: AsJson = False,
    options: dict[str, Any],
) -> None:
    """Measure latency, throughput and goodput of a server.

    Exits with code 1 if a request fails or a response is wrong. A response of 429 is only counted.
    """
    refuse_what_cannot_be(context)
    rates = read_rates(request_rate, request_rates)
    from minipaged.evaluation.bench import serve_load, serve_process

    serve_process.allow_many_files()
    groups, prefix_len = read_groups(shared_prefix)
    if figure_12:
        return _figure_12(None if rates == [inf] else rates, seconds, seed, plot, save, as_json)
    few = 32 if against_offline else 100
    workload = serve_load.Workload(
        num_requests or few, input_len, output_len, spread, groups, prefix_len, vocab_size,
        seed=seed,
    )  # fmt: skip
    if against_offline:
        return _against_offline(options, workload, rounds, save, as_json)
    return _load(context, options, workload, rates)


@takes_engine_options()
def health(
    *,
    num_streams: Annotated[int, typer.Option(help="Concurrent streams.", min=0)] = 32,
    num_bodies: Annotated[int, typer.Option(help="Large request bodies of each kind.", min=1)] = 8,
    save: Save = None,
    as_json: AsJson = False,
    options: dict[str, Any],
) -> None:
    """Measure /health while a server handles bodies of 1 MB."""
    from minipaged.evaluation.bench import serve_health
    from minipaged.evaluation.bench.serve_process import running_server

    with running_server(options) as target:
        rows = serve_health.measure(target, num_streams, num_bodies)
    found = {"rows": [asdict(row) for row in rows]}
    note = (
        f"{num_streams} concurrent streams. The 99th percentile should be below "
        f"{serve_health.BOUND_MS:.0f} ms."
    )
    report_tables(found, [serve_health.as_table(rows)], note, _machine(options), save, as_json)


# ---- the runs ------------------------------------------------------------------------------------


def _load(
    context: typer.Context, options: dict[str, Any], workload: "Workload", rates: list[float]
) -> None:
    from minipaged.evaluation.bench.serve_http import Target
    from minipaged.evaluation.bench.serve_process import running_server

    given = context.params
    source = context.get_parameter_source("model")
    named = str(options["model"]) if source and source.name == "COMMANDLINE" else None
    with ExitStack() as stack:
        if given["url"] is not None:
            key = given["api_key"] or os.environ.get("MINIPAGED_API_KEY")
            target = Target.of_url(given["url"], key)
        else:
            target = stack.enter_context(running_server(options))
        rows, note = asyncio.run(_measure(target, named, workload, rates, given))
    if given["plot"] is not None:
        from minipaged.evaluation.bench.serve_report import Line, plot_lines

        plot_lines([Line(note, "#2a7f62", rows)], given["plot"], _machine(options))
    from minipaged.evaluation.bench.serve_report import as_tables

    found = {"rows": [asdict(row) for row in rows]}
    report_tables(found, as_tables(rows), note, _machine(options), given["save"], given["as_json"])
    _exit_if_wrong(rows)


async def _measure(
    target: "Target", model: str | None, workload: "Workload", rates: list[float], given: Any
) -> tuple[list["Row"], str]:
    from minipaged.evaluation.bench import serve as serving
    from minipaged.evaluation.bench.serve_http import ask_for_model
    from minipaged.evaluation.bench.serve_load import requests_of_trace
    from minipaged.evaluation.bench.serve_report import Slo

    facts = await ask_for_model(target, model)
    target = replace(target, model=facts.name)
    workload = replace(workload, max_model_len=facts.max_model_len)
    trace: Path | None = given["trace"]

    def requests(rate: float, run: int) -> Any:
        if trace is None:
            return workload.requests(rate, run)
        return requests_of_trace(trace, workload, given["num_requests"], given["speed_up"], run)

    ttft, tpot = given["slo_ttft_ms"], given["slo_tpot_ms"]
    slo = None if ttft is None and tpot is None else Slo(ttft, tpot)
    how = serving.How(given["concurrency"], given["keep_alive"], given["give_up"], slo)
    runs = [None] if trace is not None or how.concurrency is not None else rates
    count = len(requests(inf, 0))
    with progress_bar(total=count * len(runs), desc="requests") as bar:
        measured = serving.measure(target, runs, requests, how, bar.update)
        rows = [row async for row in measured]
    shape = f"{trace.name}" if trace is not None else workload.describe()
    return rows, f"{facts.name} at {target.url}; {count} requests per run: {shape}."


def _against_offline(
    options: dict[str, Any], workload: "Workload", rounds: int, save: Path | None, as_json: bool
) -> None:
    from minipaged.evaluation.bench import serve_offline
    from minipaged.evaluation.bench.asked_process import AskedProcess
    from minipaged.evaluation.bench.serve_http import ask_for_model
    from minipaged.evaluation.bench.serve_process import running_server

    async def compare() -> serve_offline.Comparison:
        facts = await ask_for_model(server, None)
        target = replace(server, model=facts.name)
        fitting = replace(workload, max_model_len=facts.max_model_len)
        with progress_bar(total=rounds + 1, desc="rounds") as bar:
            return await serve_offline.compare(target, offline, fitting, rounds, bar.update)

    offline_process = AskedProcess(serve_offline.__name__, options)
    with offline_process as offline, running_server(options) as server:
        found = asyncio.run(compare())
    note = (
        f"{workload.num_requests} requests at once, over HTTP and with LLM.generate. Each side has "
        f"its own process, and the two take turns; the client's time is not included. "
        f"{workload.describe()}. The tokens of {found.num_requests} requests are equal"
        f"{f', except for rounding in {found.num_close}' if found.num_close else ''}."
    )
    described = {"comparison": {**asdict(found), "within_bounds": found.is_within_bounds}}
    report_tables(described, [found.as_table()], note, _machine(options), save, as_json)


def _figure_12(
    rates: list[float] | None,
    seconds: float,
    seed: int,
    plot: Path | None,
    save: Path | None,
    as_json: bool,
) -> None:
    from minipaged.evaluation.bench import serve_fig12 as figure
    from minipaged.evaluation.bench.serve_report import plot_lines

    with progress_bar(desc="runs") as bar:

        def note_run(what: str) -> None:
            bar.set_postfix_str(what)
            bar.update()

        rows = asyncio.run(figure.measure(rates or figure.RATES, seconds, seed, note_run))
    note = figure.describe(seconds)
    machine = _machine(figure.ENGINE | {"device": "cpu"})
    if plot is not None:
        plot_lines(figure.lines(rows), plot, f"storyteller, served: {machine}", figure.TOP)
    flat = [row for each in rows.values() for row in each]
    found = {
        "rows": [asdict(row) for row in flat],
        "sustained": {system: figure.sustained(each) for system, each in rows.items()},
    }
    report_tables(found, [figure.as_table(rows)], note, machine, save, as_json)
    _exit_if_wrong(flat)


def _exit_if_wrong(rows: Sequence["Row"]) -> None:
    wrong = sum(row.num_faulty + row.num_errors for row in rows)
    problem = next((row.first_error for row in rows if row.first_error), None)
    if problem is not None:
        print(f"minipaged: {problem}", file=sys.stderr)
    if wrong or not any(row.num_served for row in rows):
        raise typer.Exit(1)


def _machine(options: dict[str, Any]) -> str:
    from minipaged.utils.device import choose_device

    return describe_machine(str(choose_device(options["device"])))


def report_tables(
    found: dict[str, Any],
    tables: Sequence[RenderableType],
    note: str,
    machine: str,
    save: Path | None,
    as_json: bool,
) -> None:
    """Print tables for 80 columns, or JSON; write the JSON to a file if asked to."""
    text = json.dumps({"machine": machine, "note": note, **found})
    if save is not None:
        write_atomically(save, text + "\n")
    if as_json:
        print(text)
        return
    parts = [part for each in (note, *tables, machine) for part in (each, "")]
    Console(highlight=False).print(*parts[:-1], sep="\n")
