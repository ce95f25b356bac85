"""Figure 12 by really serving the embedded model: paged memory and its baselines.

Five servers of this library, which differ in nothing but how they manage the same pool (section
6.1). The workload is ShareGPT's at a quarter of its length, because the context is 512 tokens here
and was 2,048 there. Rates go up, and at each the servers take turns; one whose latency has left the
picture rests. The pool holds 3 requests of the longest length, and that of the paper's OPT-13B held
7: batches above 16 gain little on a processor, where on a GPU they gain until memory ends them.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from typing import Any

from rich.table import Table

from minipaged.evaluation.bench.serve import How, run_once
from minipaged.evaluation.bench.serve_client import Client, run_load
from minipaged.evaluation.bench.serve_http import Target, ask_for_model
from minipaged.evaluation.bench.serve_load import Workload
from minipaged.evaluation.bench.serve_process import running_server
from minipaged.evaluation.bench.serve_report import Line, Row
from minipaged.evaluation.paper.drawing import COLOURS
from minipaged.evaluation.sim.fitted import SHAREGPT_OUTPUT_CV
from minipaged.evaluation.sim.systems import SYSTEMS

MEMORY = {  # of each of the simulator's systems
    "vllm": "paged",
    "orca-oracle": "contiguous-oracle",
    "orca-pow2": "contiguous-pow2",
    "orca-max": "contiguous-max",
    "fastertransformer": "static",
}
CONTEXT = 512  # tokens
SHRUNK = CONTEXT / 2048
ENGINE: dict[str, Any] = {
    "model": "storyteller",
    "max_model_len": CONTEXT,
    "num_blocks": 3
    * CONTEXT
    // 16,  # with the paper's 7, the processor and not memory is the limit
    "block_size": 16,
    "max_num_seqs": 64,
    "enable_prefix_caching": False,  # the paper had none
}
RATES = (4.0, 8.0, 12.0, 16.0, 20.0, 24.0, 28.0)
TOP = 0.1  # s per token: the picture's upper end; a server above it rests
AT = 0.05  # s per token, at which request rates are compared
PATIENCE = 2.0  # a run ends after its arrivals and as many times their duration


def describe(seconds: float) -> str:
    """What the table shows, in a few sentences."""
    return (
        "Normalised latency (mean seconds per output token) by request rate and memory. "
        f"storyteller in servers of its own, {ENGINE['num_blocks']} blocks of "
        f"{ENGINE['block_size']} tokens each, context {CONTEXT}; lengths as ShareGPT's, times "
        f"{SHRUNK:g}; arrivals during {seconds:g} s at each rate. A server above {TOP:g} rests at "
        f'higher rates ("-"). ">": a lower bound, since some requests had not finished '
        f"{PATIENCE * seconds:g} s after the last arrival."
    )


def workload(rate: float, seconds: float, seed: int) -> Workload:
    """The requests that arrive in so many seconds."""
    return Workload(
        num_requests=max(2, round(rate * seconds)),
        input_len=161.31 * SHRUNK,
        output_len=337.99 * SHRUNK,
        spread=SHAREGPT_OUTPUT_CV,
        max_model_len=CONTEXT,
        seed=seed,
    )


async def measure(
    rates: Sequence[float],
    seconds: float,
    seed: int = 0,
    note: Callable[[str], object] = lambda _: None,
    systems: Sequence[str] = tuple(MEMORY),
) -> dict[str, list[Row]]:
    """Rows by system, in ascending order of rates.

    Args:
        seconds: in which requests arrive, at each rate.
        note: told what runs next.
    """
    rows: dict[str, list[Row]] = {system: [] for system in systems}
    with ExitStack() as stack:
        targets: dict[str, Target] = {}
        for system in systems:
            note(f"starting {SYSTEMS[system].title}")
            target = stack.enter_context(running_server({**ENGINE, "memory": MEMORY[system]}))
            facts = await ask_for_model(target, None)
            targets[system] = replace(target, model=facts.name)
            await run_load(Client(targets[system]), workload(1, 8, seed).requests(1e9))
        for run, rate in enumerate(sorted(rates), 1):
            requests = workload(rate, seconds, seed).requests(rate, run)
            how = How(give_up=PATIENCE * seconds)
            for system in systems:
                if rows[system] and is_out_of_the_picture(rows[system][-1]):
                    continue
                note(f"{rate:g} requests per second, {SYSTEMS[system].title}")
                memory = MEMORY[system]
                row, _ = await run_once(targets[system], requests, how, rate=rate, memory=memory)
                rows[system].append(row)
    return rows


def is_out_of_the_picture(row: Row) -> bool:
    """Whether a server at this rate is so overloaded that higher rates add no information."""
    return row.seconds_per_token is None or row.seconds_per_token > TOP


def sustained(rows: Sequence[Row], at: float = AT) -> float | None:
    """The request rate at which the latency crosses so many seconds per token.

    On the straight line between two measured rates; None where it is not crossed.
    """
    points = [(r.rate, r.seconds_per_token) for r in rows if r.rate and r.seconds_per_token]
    for (rate, low), (next_rate, high) in pairwise([(0.0, 0.0), *points]):
        if low <= at < high:
            return rate + (next_rate - rate) * (at - low) / (high - low)
    return None


def as_table(rows: dict[str, list[Row]]) -> Table:
    """Seconds per token by rate and memory, and the rates that are sustained."""
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("rate /s", no_wrap=True)
    for system in rows:
        table.add_column(MEMORY[system].replace("contiguous-", ""), justify="right", no_wrap=True)
    rates = sorted({row.rate for each in rows.values() for row in each if row.rate})
    for rate in rates:
        cells = [_cell(next((r for r in each if r.rate == rate), None)) for each in rows.values()]
        table.add_row(f"{rate:g}", *cells)
    found = {system: sustained(each) for system, each in rows.items()}
    paged, more = found.get("vllm"), ""
    if paged is None and rates:  # it sustains even the highest
        paged, more = rates[-1], ">"
    sustained_rates = [
        f">{rates[-1]:g}" if rate is None else f"{rate:.1f}" for rate in found.values()
    ]
    ratios = [f"{more}{paged / rate:.2f} x" if paged and rate else "" for rate in found.values()]
    table.add_section()
    table.add_row(f"at {AT:g} s/token", *sustained_rates)
    table.add_row("paged over it", *ratios)
    return table


def _cell(row: Row | None) -> str:
    if row is None or row.seconds_per_token is None:
        return "-"
    return f"{'>' if row.is_lower_bound else ''}{row.seconds_per_token:.4f}"


def lines(rows: dict[str, list[Row]]) -> list[Line]:
    """For the picture: the paper's titles and colours."""
    return [
        Line(f"{SYSTEMS[system].title}: {MEMORY[system]}", COLOURS[system], each)
        for system, each in rows.items()
    ]
