"""Capacity planning: what a server sustains, on the library's scheduler, memory and cost model.

The pool is what the weights leave of the GPUs' memory. Requests are simulated at the rate that is
asked for, and at others, to find the knee: the rate at which a token takes several times as long as
on an idle server. What bounds it there is either the pool, or the largest part of a step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minipaged.config import EngineArgs
from minipaged.errors import InvalidOption
from minipaged.evaluation.sim.capacity import Curve
from minipaged.evaluation.sim.catalogue import GB, GPU, Deployment, ServedModel
from minipaged.evaluation.sim.cost_model import CostModel
from minipaged.evaluation.sim.simulator import Report, Simulation
from minipaged.evaluation.sim.systems import SYSTEMS, Setting
from minipaged.evaluation.sim.traces import Lengths, poisson_trace

USABLE = EngineArgs.gpu_memory_utilization  # fraction of a GPU's memory
ACTIVATIONS = 1 * GB  # a GPU, for what is neither weights nor keys: assumed
FULL = 0.9  # a pool of which more is taken is the bound
LEAST_REQUESTS = 100  # in a simulation
KNEE = 3.0  # times the latency of an idle server
# A present-day host, assumed: the first vLLM's, as in `fitted`, took 15 times as long a sequence.
STEP_SECONDS, SEQUENCE_SECONDS = 2e-3, 0.02e-3


@dataclass(frozen=True)
class Load:
    """What a server does at one rate."""

    rate: float  # requests a second
    latency: float  # seconds a token, as a mean over requests; infinite: it cannot keep up
    first_token: float  # seconds from arrival
    batch: float  # requests that run at a time
    utilisation: float  # of the pool's slots that hold a token
    taken: float  # of the pool's slots, in allocated blocks
    num_preemptions: int
    parts: dict[str, float]  # of a step, in seconds


@dataclass(frozen=True)
class CapacityReport:
    """What a server sustains of a workload, and what limits it."""

    server: Deployment
    num_blocks: int
    block_size: int
    load: Load
    knee: Load
    bound: str


def deploy(model: ServedModel, gpu: GPU, num_gpus: int) -> Deployment:
    """The model on these GPUs, with the slots that are left. Raises InvalidOption if none are."""
    usable = num_gpus * (USABLE * gpu.memory_bytes - ACTIVATIONS)
    slots = int((usable - model.weight_bytes) // model.kv_bytes_per_token)
    if slots < 1:
        each = USABLE * gpu.memory_bytes - ACTIVATIONS
        least = int(model.weight_bytes // each) + 1
        raise InvalidOption(
            f"the weights of {model.name} take {model.weight_bytes / GB:.0f} GB, and {num_gpus} x "
            f"{gpu.name} have {max(usable, 0) / GB:.0f} GB for them: take at least {least}."
        )
    return Deployment(model, gpu, num_gpus, slots)


def estimate_capacity(
    server: Deployment,
    lengths: Lengths,
    rate: float,
    *,
    block_size: int = EngineArgs.block_size,
    max_num_seqs: int = Setting.max_num_seqs,
    seconds: float = 120.0,
) -> CapacityReport:
    """Simulate the rate, look for the knee, and say what bounds it.

    Raises:
        InvalidOption: not even one request fits into the pool.
    """
    setting = Setting(
        server.num_slots,
        block_size,
        longest=lengths.longest,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(8192, lengths.longest, max_num_seqs),
    )
    if setting.num_blocks * block_size < lengths.longest:
        raise InvalidOption(
            f"the pool has {server.num_slots} token slots, and a request may have "
            f"{lengths.longest} tokens: take more or larger GPUs, or shorter requests."
        )
    costs = CostModel(server, STEP_SECONDS, SEQUENCE_SECONDS)
    idle = _unloaded(costs, lengths)

    def simulate(at: float, **options: Any) -> Report:
        trace = poisson_trace(lengths, at, duration(at))
        return Simulation(SYSTEMS["vllm"], setting, costs, trace, **options).run()

    def duration(at: float) -> float:
        """Several times what a request takes, and long enough for many of them."""
        return max(seconds, 10 * idle * lengths.output_mean, LEAST_REQUESTS / at)

    def load(at: float) -> Load:
        until = duration(at)
        busy = simulate(at, until=until, look_from=until / 4)  # neither filling nor emptying
        return _load(at, curve.at(at), busy, costs, lengths)

    guess = 1 / (idle * lengths.output_mean)  # one request at a time: the knee is not far below
    curve = Curve(lambda at: simulate(at, limit=4 * KNEE * idle).normalized_latency, guess)
    at_knee = load(curve.crossing(KNEE * idle))
    bound = _bound(at_knee, max_num_seqs)
    return CapacityReport(server, setting.num_blocks, block_size, load(rate), at_knee, bound)


def _unloaded(costs: CostModel, lengths: Lengths) -> float:
    """Seconds a token of requests that have the server to themselves, as a mean over them."""
    ratios: list[float] = []
    for p, o in lengths.draw(512, seed=0):
        prompt = costs.step(0, 0, p, p * p / 2)
        ratios.append((prompt + (o - 1) * costs.step(1, round(p + o / 2), 0, 0)) / o)
    return sum(ratios) / len(ratios)


def _load(rate: float, latency: float, report: Report, costs: CostModel, lengths: Lengths) -> Load:
    waits = report.waits
    batch = report.mean_batch
    context = lengths.input_mean + lengths.output_mean / 2
    step = report.busy_seconds / max(1, report.num_busy_steps)
    prompt_tokens = rate * lengths.input_mean * step  # that come while a step runs
    parts = {
        "the host": costs.host(round(batch)),
        "reading or multiplying weights": costs.weights(round(batch + prompt_tokens)),
        "reading keys and values": costs.keys(round(batch * context)),
        "attention of prompts": costs.prompts(prompt_tokens * lengths.input_mean / 2),
    }
    return Load(
        rate,
        latency,
        sum(waits) / max(1, len(waits)),
        batch,
        report.share(lambda usage: usage.used),
        report.share(lambda usage: usage.total - usage.free),
        report.num_preemptions,
        parts,
    )


def _bound(load: Load, max_num_seqs: int) -> str:
    if load.taken > FULL:
        return "the pool: memory for keys and values is full"
    if load.batch > FULL * max_num_seqs:
        return f"max_num_seqs: no more than {max_num_seqs} requests may run"
    longest: Callable[[str], float] = load.parts.__getitem__
    return f"time: {max(load.parts, key=longest)} is the largest part of a step"
