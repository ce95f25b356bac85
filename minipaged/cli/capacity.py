"""`minipaged capacity`: estimates the request rate that a server sustains, before you rent it."""

import json
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from minipaged.cli.options import (
    AsJson,
    BlockSize,
    LinkBandwidth,
    LinkLatency,
    MaxNumSeqs,
    refuse_beside,
    with_link,
)
from minipaged.config import EngineArgs
from minipaged.errors import InvalidOption
from minipaged.evaluation.sim.catalogue import GB, GPUS, MODELS, find_gpu, find_model
from minipaged.evaluation.sim.planner import KNEE, CapacityReport, Load, deploy, estimate_capacity
from minipaged.evaluation.sim.systems import Setting
from minipaged.evaluation.sim.traces import Lengths, mean_lengths, read_trace
from minipaged.utils.options import require_whole
from minipaged.utils.progress import progress_bar


def capacity(
    context: typer.Context,
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "llama-3-8b",
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.")] = "h100-80g",
    num_gpus: Annotated[
        int,
        typer.Option(
            "--num-gpus",
            "--tensor-parallel-size",
            help="GPUs in the server. The model is split over all of them.",
        ),
    ] = 1,
    link_bandwidth: LinkBandwidth = None,
    link_latency: LinkLatency = None,
    rate: Annotated[float, typer.Option(help="Requests per second.")] = 4.0,
    input_len: Annotated[float, typer.Option("--input", help="Mean tokens per prompt.")] = 1000.0,
    output_len: Annotated[float, typer.Option("--output", help="Mean tokens per output.")] = 300.0,
    spread: Annotated[
        float, typer.Option(help="Standard deviation of lengths, divided by their mean.")
    ] = 0.8,
    longest: Annotated[
        int, typer.Option(help="Maximum tokens per request, prompt and output.")
    ] = 8192,
    trace: Annotated[Path | None, typer.Option(help="Take mean lengths from this CSV.")] = None,
    block_size: BlockSize = EngineArgs.block_size,
    max_num_seqs: MaxNumSeqs = Setting.max_num_seqs,
    full: Annotated[
        bool, typer.Option("--full", help="Simulate ten minutes per rate. Takes minutes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Estimate by simulation how many requests a server sustains.

    Prints the size of the pool, the load at the given rate, the highest rate with acceptable
    latency (the knee), and the bottleneck there. The default takes seconds, and its highest rate
    is about 10 % above that of --full, or more if outputs are long.
    """
    if trace is not None:
        means = ("input_len", "output_len")
        refuse_beside(context, "--trace", "sets the mean lengths", means)
    least = {"num_gpus": num_gpus, "block_size": block_size, "max_num_seqs": max_num_seqs}
    for name, value in {**least, "longest": longest}.items():
        require_whole(name, value, 1)
    for name, mean in {"rate": rate, "input": input_len, "output": output_len}.items():
        if not (mean > 0 and isfinite(mean)):
            raise InvalidOption(f"--{name} is {mean:g}: give a number above 0.")
    if not 0 < spread <= 3:
        raise InvalidOption(f"--spread is {spread:g}: give a number above 0, and at most 3.")
    if trace is not None:
        input_len, output_len = mean_lengths(read_trace(trace, longest))
    if input_len + output_len > longest / 2:
        raise InvalidOption(
            f"requests have {input_len + output_len:.0f} tokens on average and at most {longest}: "
            "raise --longest to at least twice the mean, or shorten the requests."
        )
    server = deploy(find_model(model), find_gpu(gpu), num_gpus)
    server = with_link(server, link_bandwidth, link_latency)
    lengths = Lengths(input_len, output_len, spread, spread, longest)
    with progress_bar(desc="simulations", unit="") as bar:
        report = estimate_capacity(
            server,
            lengths,
            rate,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            full=full,
            on_simulation=bar.update,
        )
    if as_json:
        print(json.dumps(_without_infinity(asdict(report))))
    else:
        _show(report, lengths)


def _without_infinity(value: Any) -> Any:
    """Replace infinity by None, because JSON cannot express it."""
    if isinstance(value, dict):
        fields = cast(dict[str, Any], value)
        return {name: _without_infinity(field) for name, field in fields.items()}
    return None if value == float("inf") else value


def _show(report: CapacityReport, lengths: Lengths) -> None:
    server, model = report.server, report.server.model
    console = Console(width=max(100, Console().width))
    console.print(
        f"{model.name} on {server.num_gpus} x {server.gpu.name}, 16 bits: weights "
        f"{model.weight_bytes / GB:.1f} GB, keys and values {model.kv_bytes_per_token:,} bytes per "
        f"token.\nPool: {report.num_blocks:,} blocks of {report.block_size} tokens, room for "
        f"{server.num_slots:,} tokens or about {server.num_slots / _held(lengths):,.0f} requests.",
        highlight=False,
    )
    if server.num_gpus > 1:
        link = server.gpu.link
        console.print(
            f"Link: {link.bandwidth / GB:g} GB/s per GPU, latency of a collective "
            f"{1e6 * link.latency:g} us; the message of a step takes "
            f"{1e3 * server.sync_seconds:g} ms.",
            highlight=False,
        )
    table = Table(box=None, padding=(0, 2))
    for title in ("", "requested", "knee"):
        table.add_column(title, justify="right" if title else "left")
    for what, values in _rows(report.load, report.knee).items():
        table.add_row(what, *values)
    console.print(table)
    console.print(
        f"At the knee, a token takes {KNEE:g} times as long as on an idle server. The bottleneck "
        f"there: {report.bound}.",
        highlight=False,
    )
    if not isfinite(report.load.latency):
        console.print("The server cannot sustain the requested rate: its queue keeps growing.")


def _held(lengths: Lengths) -> float:
    """Slots of a request that has generated half of its output."""
    return lengths.input_mean + lengths.output_mean / 2


def _rows(*loads: Load) -> dict[str, list[str]]:
    return {
        "requests per second": [f"{load.rate:.2f}" for load in loads],
        "concurrent requests": [f"{load.batch:.1f}" for load in loads],
        "share of the pool in use": [f"{load.utilisation:.0%}" for load in loads],
        "preemptions": [f"{load.num_preemptions}" for load in loads],
        "milliseconds per token": [
            f"{1e3 * load.latency:.1f}" if isfinite(load.latency) else "too many" for load in loads
        ],
        "seconds to first token": [f"{load.first_token:.2f}" for load in loads],
    } | {
        f"share of a step, {part}": [
            f"{load.parts[part] / sum(load.parts.values()):.0%}" for load in loads
        ]
        for part in loads[0].parts
    }
