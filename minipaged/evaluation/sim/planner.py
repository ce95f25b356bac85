"""Capacity planning: the load that a server sustains, with the library's scheduler and memory.

The pool is the GPU memory that the weights leave free. Requests are simulated at the given rate and
at others, to find the knee: the rate at which a token takes several times as long as on an idle
server. There, the bound is either the pool or the largest part of a step.

Simulations are short by default, so that a plan takes seconds. They start with an empty server,
which matters more in a short simulation: the knee was 4 to 10 % above that of `full` simulations
for the workloads that were tried, and more for outputs of thousands of tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from minipaged.config import EngineArgs
from minipaged.errors import InvalidOption
from minipaged.evaluation.sim.capacity import Curve
from minipaged.evaluation.sim.catalogue import GB, GPU, Deployment, ServedModel
from minipaged.evaluation.sim.cost_model import CostModel
from minipaged.evaluation.sim.interconnect import CONTROL_SECONDS
from minipaged.evaluation.sim.simulator import Report, Simulation
from minipaged.evaluation.sim.systems import SYSTEMS, Setting
from minipaged.evaluation.sim.traces import Lengths, poisson_trace

USABLE = EngineArgs.gpu_memory_utilization  # fraction of a GPU's memory
ACTIVATIONS = 1 * GB  # per GPU, neither weights nor keys: assumed
FULL = 0.9  # above this fraction in use, the pool is the bound
LEAST_REQUESTS = 100  # in a simulation
MOST_TOKENS = 120_000  # generated tokens in a quick simulation, half a second of work
KNEE = 3.0  # times the latency of an idle server
# A present-day host, assumed; the first vLLM's (`fitted`) took 15 times as long per sequence.
STEP_SECONDS, SEQUENCE_SECONDS = 2e-3, 0.02e-3


@dataclass(frozen=True)
class Load:
    """The behaviour of a server at one rate."""

    rate: float  # requests per second
    latency: float  # seconds per token, mean over requests; infinite: it cannot keep up
    first_token: float  # seconds from arrival
    batch: float  # requests that run at a time
    utilisation: float  # fraction of the pool's slots that store a token
    taken: float  # fraction of the pool's slots in allocated blocks
    num_preemptions: int
    parts: dict[str, float]  # of a step, in seconds


@dataclass(frozen=True)
class CapacityReport:
    """The rate of a workload that a server sustains, and its bound."""

    server: Deployment
    num_blocks: int
    block_size: int
    load: Load
    knee: Load
    bound: str


def deploy(model: ServedModel, gpu: GPU, num_gpus: int) -> Deployment:
    """Return the model on these GPUs, with the remaining token slots.

    With more GPUs than KV heads, KV heads are replicated, one per GPU: the model takes as much
    memory as one with a KV head per GPU.

    Raises:
        InvalidOption: no slots are left, or the heads cannot be split evenly.
    """
    heads, kv_heads = model.num_heads, model.num_kv_heads
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    splits = [n for n in divisors if kv_heads % n == 0 or n % kv_heads == 0]
    if num_gpus not in splits:
        raise InvalidOption(
            f"{model.name} has {heads} query heads and {kv_heads} KV heads, which cannot be "
            f"divided evenly among {num_gpus} GPUs: choose one of {', '.join(map(str, splits))}."
        )
    model = replace(model, num_kv_heads=max(kv_heads, num_gpus))
    usable = num_gpus * (USABLE * gpu.memory_bytes - ACTIVATIONS)
    slots = int((usable - model.weight_bytes) // model.kv_bytes_per_token)
    if slots < 1:
        each = USABLE * gpu.memory_bytes - ACTIVATIONS
        least = model.weight_bytes + model.kv_bytes_per_token
        enough = [n for n in splits if n * each >= least]
        raise InvalidOption(
            f"the weights of {model.name} take {model.weight_bytes / GB:.0f} GB, but {num_gpus} x "
            f"{gpu.name} have {max(usable, 0) / GB:.0f} GB for them: choose "
            + (f"at least {enough[0]}." if enough else "larger GPUs.")
        )
    return Deployment(model, gpu, num_gpus, slots, CONTROL_SECONDS if num_gpus > 1 else 0.0)


def estimate_capacity(
    server: Deployment,
    lengths: Lengths,
    rate: float,
    *,
    block_size: int = EngineArgs.block_size,
    max_num_seqs: int = Setting.max_num_seqs,
    seconds: float = 600.0,
    full: bool = False,
    on_simulation: Callable[[], object] = lambda: None,
) -> CapacityReport:
    """Simulate the rate, find the knee, and name its bound.

    Args:
        server: the server.
        lengths: of the requests.
        rate: requests per second.
        block_size: token slots per block.
        max_num_seqs: maximum number of running requests.
        seconds: duration of arrivals, shortened if requests generate more than MOST_TOKENS.
        full: simulate the full duration, which takes minutes.
        on_simulation: called after each simulation.

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
            f"the pool has {server.num_slots} token slots, but a request may have "
            f"{lengths.longest} tokens: choose more or larger GPUs, or shorter requests."
        )
    costs = CostModel(server, STEP_SECONDS, SEQUENCE_SECONDS)
    idle = _unloaded(costs, lengths)

    def simulate(at: float, **options: Any) -> Report:
        trace = poisson_trace(lengths, at, duration(at))
        report = Simulation(SYSTEMS["vllm"], setting, costs, trace, **options).run()
        on_simulation()
        return report

    def duration(at: float) -> float:
        """Choose a duration with many requests, several times as long as a request's latency."""
        alone = idle * lengths.output_mean
        wanted = max(seconds, 10 * alone)
        affordable = wanted if full else MOST_TOKENS / (at * lengths.output_mean)
        return max(min(wanted, affordable), 4 * alone, LEAST_REQUESTS / at)

    def load(at: float) -> Load:
        until = duration(at)
        latency = simulate(at, limit=4 * KNEE * idle, watch_memory=False).normalized_latency
        busy = simulate(at, until=until, look_from=until / 4)  # neither start-up nor drain
        return _load(at, latency, busy, costs, lengths)

    threshold = KNEE * idle
    guess = _fluid_rate(costs, lengths, threshold, setting)
    # Simulations beyond the knee end early.
    curve = Curve(
        lambda at: simulate(at, limit=threshold, watch_memory=False).normalized_latency,
        guess,
        near=1.03 if full else 1.06,
    )
    at_knee = load(curve.crossing(threshold))
    bound = _bound(at_knee, max_num_seqs)
    return CapacityReport(server, setting.num_blocks, block_size, load(rate), at_knee, bound)


def _unloaded(costs: CostModel, lengths: Lengths) -> float:
    """Mean seconds per token of requests that are alone on the server."""
    ratios: list[float] = []
    for p, o in lengths.draw(512, seed=0):
        prompt = costs.step(0, 0, p, p * p / 2, 1)
        ratios.append((prompt + (o - 1) * costs.step(1, round(p + o / 2), 0, 0)) / o)
    return sum(ratios) / len(ratios)


def _fluid_rate(costs: CostModel, lengths: Lengths, latency: float, setting: Setting) -> float:
    """The rate at which a step takes this long, for evenly spaced, equal requests."""
    context = lengths.input_mean + lengths.output_mean / 2
    batch = min(setting.max_num_seqs, setting.num_slots / context)
    low, high = 0.0, batch / (lengths.output_mean * latency)
    for _ in range(30):
        rate = (low + high) / 2
        batch = rate * lengths.output_mean * latency  # Little's law
        prompts = rate * lengths.input_mean * latency  # tokens that arrive while a step runs
        pairs = prompts * lengths.input_mean / 2
        ended = round(rate * latency)
        step = costs.step(round(batch), round(batch * context), round(prompts), pairs, ended)
        low, high = (rate, high) if step <= latency else (low, rate)
    return high


def _load(rate: float, latency: float, report: Report, costs: CostModel, lengths: Lengths) -> Load:
    waits = report.waits
    batch = report.mean_batch
    context = lengths.input_mean + lengths.output_mean / 2
    step = report.busy_seconds / max(1, report.num_busy_steps)
    prompt_tokens = rate * lengths.input_mean * step  # arrive while a step runs
    parts = {
        "the host": costs.host(round(batch)),
        "reading or multiplying weights": costs.weights(round(batch + prompt_tokens)),
        "reading keys and values": costs.keys(round(batch * context)),
        "attention of prompts": costs.prompts(prompt_tokens * lengths.input_mean / 2),
    }
    if costs.server.num_gpus > 1:
        num_tokens, num_rows = round(batch + prompt_tokens), round(batch + rate * step)
        parts["communication between GPUs"] = costs.communication(num_tokens, num_rows)
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
