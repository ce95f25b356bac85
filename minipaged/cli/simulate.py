"""`minipaged simulate`: compares systems on one trace, synthetic or real."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from minipaged.cli.options import (
    AsJson,
    BlockSize,
    LinkBandwidth,
    LinkLatency,
    refuse_beside,
    with_link,
)
from minipaged.config import EngineArgs
from minipaged.errors import InvalidOption
from minipaged.evaluation.sim.catalogue import DEPLOYMENTS
from minipaged.evaluation.sim.cost_model import CostModel
from minipaged.evaluation.sim.simulator import Simulation
from minipaged.evaluation.sim.systems import (
    LONGEST,
    SYSTEMS,
    VATTENTION,
    Setting,
    System,
    find_system,
)
from minipaged.evaluation.sim.traces import (
    WORKLOADS,
    TraceRequest,
    chat_trace,
    mean_lengths,
    poisson_trace,
    read_trace,
)
from minipaged.utils.options import require_one_of, require_whole
from minipaged.utils.progress import progress_bar

MOST_REQUESTS = 1_000_000  # more would take too long


@dataclass(frozen=True)
class Row:
    """The results of one system."""

    system: str
    seconds: float  # until the last token of the last request
    seconds_a_token: float  # normalised latency, mean over requests
    seconds_to_first_token: float
    requests_at_a_time: float
    used: float  # share of all slots that held a token
    reserved: float  # share of all slots that were reserved
    num_preemptions: int


def simulate(
    context: typer.Context,
    systems: Annotated[
        list[str] | None, typer.Argument(help="Systems to compare. Default: the paper's.")
    ] = None,
    server: Annotated[str, typer.Option(help=f"One of {', '.join(DEPLOYMENTS)}.")] = "opt-13b",
    workload: Annotated[str, typer.Option(help="One of sharegpt, alpaca, chat.")] = "sharegpt",
    rate: Annotated[float, typer.Option(help="Requests per second.")] = 1.0,
    seconds: Annotated[float, typer.Option(help="Seconds during which requests arrive.")] = 300.0,
    trace: Annotated[
        Path | None, typer.Option(help="Serve the requests in this CSV instead.")
    ] = None,
    link_bandwidth: LinkBandwidth = None,
    link_latency: LinkLatency = None,
    block_size: BlockSize = EngineArgs.block_size,
    seed: Annotated[int, typer.Option(help="Random seed for arrival times and lengths.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare paging with the baselines on a trace, simulated."""
    if trace is not None:
        drawn = ("workload", "rate", "seconds", "seed")
        refuse_beside(context, "--trace", "sets the requests", drawn)
    require_one_of("server", server, tuple(DEPLOYMENTS))
    require_one_of("workload", workload, (*WORKLOADS, "chat"))
    require_whole("block_size", block_size, 1)
    require_whole("seed", seed, 0)
    deployed = with_link(DEPLOYMENTS[server], link_bandwidth, link_latency)
    chosen = [find_system(name) for name in systems or SYSTEMS]
    requests = _read(trace) if trace is not None else _make(workload, rate, seconds, seed)
    setting = Setting(deployed.num_slots, block_size, model=deployed.model)
    costs = CostModel(deployed)
    rows = [_serve(s, setting, costs, requests) for s in progress_bar(chosen, desc="systems")]
    if as_json:
        print(*(json.dumps(asdict(row)) for row in rows), sep="\n")
        return
    inputs, outputs = mean_lengths(requests)
    Console(width=max(120, Console().width)).print(
        f"{len(requests)} requests in {requests[-1].arrival:.0f} s, on average {inputs:.0f} prompt "
        f"and {outputs:.0f} output tokens; {server}, {deployed.num_slots:,} token slots.",
        _as_table(rows),
        sep="\n",
        highlight=False,
    )


def _make(workload: str, rate: float, seconds: float, seed: int) -> list[TraceRequest]:
    if not (rate > 0 and seconds > 0 and rate * seconds <= MOST_REQUESTS):
        raise InvalidOption(
            f"--rate is {rate:g} and --seconds is {seconds:g}: give numbers above 0 that result in "
            f"at most {MOST_REQUESTS:,} requests."
        )
    if workload == "chat":
        requests = chat_trace(rate, seconds, seed)
    else:
        requests = poisson_trace(WORKLOADS[workload], rate, seconds, seed)
    if not requests:
        raise InvalidOption(
            f"no request arrives in {seconds:g} s at a rate of {rate:g}: raise --rate or --seconds."
        )
    return requests


def _read(file: Path) -> list[TraceRequest]:
    return read_trace(file, LONGEST)


def _serve(system: System, setting: Setting, costs: CostModel, trace: list[TraceRequest]) -> Row:
    report = Simulation(system, setting, costs, trace).run()
    return Row(
        system.name,
        report.seconds,
        report.normalized_latency,
        sum(report.waits) / len(report.waits),
        report.mean_batch,
        report.share(lambda usage: usage.used),
        report.share(lambda usage: usage.reserved),
        report.num_preemptions,
    )


def _as_table(rows: list[Row]) -> Table:
    table = Table(box=None, padding=(0, 2))
    table.add_column("")
    titles = "s/token|s to first|concurrent requests|used|reserved|preemptions|total s"
    for title in titles.split("|"):
        table.add_column(title, justify="right")
    known = SYSTEMS | VATTENTION
    for row in rows:
        table.add_row(
            known[row.system].title,
            f"{row.seconds_a_token:.3f}",
            f"{row.seconds_to_first_token:.2f}",
            f"{row.requests_at_a_time:.1f}",
            f"{row.used:.1%}",
            f"{row.reserved:.1%}",
            str(row.num_preemptions),
            f"{row.seconds:.0f}",
        )
    return table
