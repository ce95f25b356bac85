"""A server under load: `minipaged bench serve`, one run per request rate.

The server runs in a separate process, so that neither waits for the other's interpreter, and its
CPU time is separate from the client's.
"""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from math import inf

from minipaged.evaluation.bench.serve_client import Client, Served, run_load
from minipaged.evaluation.bench.serve_http import Target, cpu_seconds
from minipaged.evaluation.bench.serve_load import LoadRequest
from minipaged.evaluation.bench.serve_report import Row, Slo, summarize

WARMING = 4  # unmeasured requests: the first ones of a server compile and allocate


@dataclass(frozen=True)
class How:
    """How requests are sent, and the objective for their responses."""

    concurrency: int | None = None  # None: an open load, at its arrivals
    keep_alive: bool = False
    give_up: float | None = None  # seconds after the last arrival
    slo: Slo | None = None


async def run_once(
    target: Target,
    requests: list[LoadRequest],
    how: How,
    note_end: Callable[[], object] = lambda: None,
    *,
    rate: float | None = None,
    memory: str | None = None,
) -> tuple[Row, list[Served]]:
    """Send these requests; return the figures of the run, and each response."""
    client = Client(target, how.keep_alive)
    server_before, before = await cpu_seconds(target), time.process_time()
    results = await run_load(client, requests, how.concurrency, how.give_up, note_end)
    own, server_cpu = time.process_time() - before, await cpu_seconds(target)
    client.close()
    if server_cpu is not None:
        server_cpu -= server_before or 0.0
    row = summarize(
        results,
        how.slo,
        rate=rate,
        concurrency=how.concurrency,
        client_cpu_seconds=own,
        server_cpu_seconds=server_cpu,
        memory=memory,
    )
    return row, results


async def measure(
    target: Target,
    rates: Sequence[float | None],
    requests: Callable[[float, int], list[LoadRequest]],
    how: How,
    note_end: Callable[[], object] = lambda: None,
) -> AsyncIterator[Row]:
    """Measure one run per rate; None: arrivals are those of a trace, or do not matter.

    Args:
        requests: returns the requests for a rate and a run number; run 0 warms up the server.
    """
    await run_load(Client(target), requests(inf, 0)[:WARMING], concurrency=1)
    for run, rate in enumerate(rates, 1):
        arriving = requests(inf if rate is None else rate, run)
        shown = None if rate in (None, inf) else rate
        row, _ = await run_once(target, arriving, how, note_end, rate=shown)
        yield row
