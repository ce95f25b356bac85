"""Figure 12 with real servers of the embedded model: paged memory and its baselines.

Five servers of this library differ only in how they manage the same pool (section 6.1). The
workload is ShareGPT's at a quarter of its length, since the context is 512 tokens here, not 2,048.
Rates increase, and at each rate the servers take turns; a server whose latency exceeds the picture
is skipped. The pool fits 3 requests of maximum length; that of the paper's OPT-13B fit 7. On a CPU,
batches above 16 gain little, whereas on a GPU they gain until memory is full.
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
    "num_blocks": 3 * CONTEXT // 16,  # with the paper's 7, the CPU would be the limit, not memory
    "block_size": 16,
    "max_num_seqs": 64,
    "enable_prefix_caching": False,  # the paper had none
}
RATES = (4.0, 8.0, 12.0, 16.0, 20.0, 24.0, 28.0)
TOP = 0.1  # s per token: the picture's upper end; a server above it is skipped
AT = 0.05  # s per token, at which request rates are compared
PATIENCE = 2.0  # a run ends this many times the arrivals' duration after them


def describe(seconds: float) -> str:
    """The caption of the table."""
    return (
        "Normalised latency (mean seconds per output token) by request rate and memory. "
        f"storyteller in separate servers, {ENGINE['num_blocks']} blocks of "
        f"{ENGINE['block_size']} tokens each, context {CONTEXT}; lengths as ShareGPT's, times "
        f"{SHRUNK:g}; arrivals during {seconds:g} s at each rate. A server above {TOP:g} is "
        "skipped at "
        f'higher rates ("-"). ">": a lower bound, since some requests had not finished '
        f"{PATIENCE * seconds:g} s after the last arrival."
    )


def workload(rate: float, seconds: float, seed: int) -> Workload:
    """The requests that arrive in `seconds`."""
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
    """Measure rows by system, in ascending order of rates.

    Args:
        seconds: duration of arrivals at each rate.
        note: called with a description of the next run.
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
    """Whether a server is so overloaded at this rate that higher rates need not be measured."""
    return row.seconds_per_token is None or row.seconds_per_token > TOP


def sustained(rows: Sequence[Row], at: float = AT) -> float | None:
    """The request rate at which the latency crosses this many seconds per token.

    It is interpolated linearly between two measured rates; None if it is not crossed.
    """
    points = [(r.rate, r.seconds_per_token) for r in rows if r.rate and r.seconds_per_token]
    for (rate, low), (next_rate, high) in pairwise([(0.0, 0.0), *points]):
        if low <= at < high:
            return rate + (next_rate - rate) * (at - low) / (high - low)
    return None


def as_table(rows: dict[str, list[Row]]) -> Table:
    """Seconds per token by rate and memory, and the sustained rates."""
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
    """The curves of the picture, with the paper's titles and colours."""
    return [
        Line(f"{SYSTEMS[system].title}: {MEMORY[system]}", COLOURS[system], each)
        for system, each in rows.items()
    ]
