"""Shared by the simulated figures: a case, its outcome, and parallel simulation of many cases."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import TypeVar

from minipaged.config import EngineArgs, PreemptionMode
from minipaged.evaluation.sim.capacity import Curve
from minipaged.evaluation.sim.catalogue import DEPLOYMENTS
from minipaged.evaluation.sim.cost_model import CostModel
from minipaged.evaluation.sim.requests import GREEDY, Decoding
from minipaged.evaluation.sim.simulator import Report, Simulation
from minipaged.evaluation.sim.systems import Setting, find_system
from minipaged.evaluation.sim.traces import (
    WORKLOADS,
    Lengths,
    TraceRequest,
    chat_trace,
    poisson_trace,
)
from minipaged.memory import MemoryUsage
from minipaged.utils.progress import progress_bar

Input = TypeVar("Input")
Output = TypeVar("Output")


@dataclass(frozen=True)
class Case:
    """The parameters of one simulation, as plain values that can be sent to another process."""

    system: str = "vllm"
    server: str = "opt-13b"
    workload: str | Lengths = "sharegpt"
    rate: float = 1.0  # requests per second
    seconds: float = 400.0  # duration of arrivals
    seed: int = 0
    decoding: Decoding = GREEDY
    block_size: int = EngineArgs.block_size
    max_num_seqs: int = 256
    kv_factor: float = 1.0
    prefix_len: int = 0  # tokens of a prefix that all prompts share
    prefix_caching: bool = False
    preemption: PreemptionMode = EngineArgs.preemption
    limit: float | None = None  # stop above this normalised latency
    only_while_they_come: bool = False  # measure from a quarter of the duration until arrivals end
    watch_memory: bool = False

    def trace(self) -> list[TraceRequest]:
        """The arrivals and lengths of the requests."""
        name = self.workload
        if name == "chat":
            return chat_trace(self.rate, self.seconds, self.seed)
        lengths = WORKLOADS[name] if isinstance(name, str) else name
        trace = poisson_trace(lengths, self.rate, self.seconds, self.seed)
        return [_with_prefix(request, self.prefix_len) for request in trace]

    def simulate(self) -> Report:
        """Run the simulation; the result has every request."""
        server = DEPLOYMENTS[self.server]
        setting = Setting(
            server.num_slots,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            prefix_caching=self.prefix_caching,
            preemption=self.preemption,
            model=server.model,
        )
        costs = CostModel(server, kv_factor=self.kv_factor)
        watched = self.only_while_they_come
        return Simulation(
            find_system(self.system),
            setting,
            costs,
            self.trace(),
            self.decoding,
            limit=self.limit,
            until=self.seconds if watched else None,
            look_from=self.seconds / 4 if watched else 0.0,
            watch_memory=watched or self.watch_memory,
        ).run()


def _with_prefix(request: TraceRequest, prefix_len: int) -> TraceRequest:
    longer = request.input_len + prefix_len
    return replace(request, input_len=longer, prefix_len=prefix_len) if prefix_len else request


@dataclass(frozen=True)
class Outcome:
    """The results of a simulation that are kept."""

    case: Case
    normalized_latency: float  # seconds per token; infinite: it was stopped
    mean_batch: float
    used: float  # of all slots, as the others
    reserved: float
    internal: float
    external: float  # and all free memory, as in Figure 2
    blocks_saved: float
    num_preemptions: int
    num_sequence_steps: int


def serve(case: Case) -> Outcome:
    """Run one simulation."""
    report = case.simulate()

    def outside(usage: MemoryUsage) -> int:
        return usage.external + usage.free

    return Outcome(
        case,
        report.normalized_latency,
        report.mean_batch,
        report.share(lambda u: u.used),
        report.share(lambda u: u.reserved),
        report.share(lambda u: u.internal),
        report.share(outside),
        report.blocks_saved,
        report.num_preemptions,
        report.num_sequence_steps,
    )


@dataclass(frozen=True)
class Search:
    """A search for the rates that a case sustains; the case's own rate is the first guess."""

    case: Case
    thresholds: tuple[float, ...] = (0.2,)  # seconds per token
    near: float = 1.03  # precision: half of this factor


@dataclass(frozen=True)
class Capacity:
    """The requests per second that a case sustains, and all simulated points of the curve."""

    search: Search
    rates: dict[float, float]  # by threshold
    points: list[tuple[float, float | None]]  # rate, latency; None: beyond all thresholds


def find_capacity(search: Search) -> Capacity:
    """Simulate until the rates are known."""
    limit = max(search.thresholds)

    def latency(rate: float) -> float:
        return replace(search.case, rate=rate, limit=limit).simulate().normalized_latency

    curve = Curve(latency, search.case.rate, search.near)
    curve.at(search.case.rate / 2)  # for the flat part of the curve
    rates = curve.crossings(search.thresholds)
    points = [(r, None if s == float("inf") else s) for r, s in sorted(curve.points.items())]
    return Capacity(search, rates, points)


def in_parallel(
    function: Callable[[Input], Output], inputs: Iterable[Input], label: str
) -> list[Output]:
    """Call `function` on every input, on all cores, with a progress bar in a terminal."""
    todo = list(inputs)
    num_workers = min(len(todo), os.cpu_count() or 1)
    if num_workers <= 1:
        return [function(each) for each in progress_bar(todo, desc=label)]
    # New processes, not forks: a fork of a process with threads may hang.
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        return list(progress_bar(pool.map(function, todo), desc=label, total=len(todo)))
