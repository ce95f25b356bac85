"""Figure 1: the memory of a GPU by use, and throughput by batch size.

Left: OPT-13B on an A100 with 40 GB. Right: a step over more sequences takes only slightly longer,
so throughput grows with the batch until the memory for keys and values is full. With paging, more
requests fit in the same memory.
"""

from typing import TYPE_CHECKING

from minipaged.evaluation.paper.drawing import COLOURS, panel
from minipaged.evaluation.paper.figure import (
    EXACT,
    SIMULATED,
    Check,
    Effort,
    Figure,
    Result,
    near,
)
from minipaged.evaluation.paper.serving import Case, Outcome, in_parallel, serve
from minipaged.evaluation.sim.catalogue import DEPLOYMENTS
from minipaged.evaluation.sim.cost_model import CostModel
from minipaged.evaluation.sim.systems import SYSTEMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

BATCHES = (1, 2, 4, 8, 16, 24, 32, 40, 48)
SERVER = DEPLOYMENTS["opt-13b"]
CONTEXT = 161 + 338 // 2  # tokens of a ShareGPT conversation, halfway through its answer


def run(effort: Effort) -> Result:
    """Compute both halves."""
    memory = SERVER.gpu.memory_bytes
    weights = 100 * SERVER.model.weight_bytes / memory
    kv = 100 * SERVER.num_slots * SERVER.model.kv_bytes_per_token / memory
    costs = CostModel(SERVER)
    # Tokens per second by batch size, and the number of requests that fit in each system's memory.
    speed = [b / costs.step(b, b * CONTEXT, 0, 0) for b in BATCHES]
    cases = [
        Case(name, rate=3.0, seconds=effort.seconds, only_while_they_come=True)
        for name in ("orca-max", "orca-oracle", "vllm")
    ]
    held: dict[str, Outcome] = {o.case.system: o for o in in_parallel(serve, cases, "fig1")}
    batch = {name: outcome.mean_batch for name, outcome in held.items()}
    gain = costs.step(7, 7 * CONTEXT, 0, 0) / 7
    more = batch["vllm"] / costs.step(round(batch["vllm"]), round(batch["vllm"]) * CONTEXT, 0, 0)
    checks = [
        near("weights, of the memory", 65, weights, points=1, unit="%"),
        Check("keys and values, of the memory", "over 30", kv, 30, 35, "%"),
        Check("batched requests, Orca (Max)", "8", batch["orca-max"], 6.9, 8),
        Check("batched requests, vLLM", "about 40", batch["vllm"], 28, 44),
        Check("tokens per second, vLLM over Orca (Max)", "about 3", more * gain, 2, None, "x"),
    ]
    data = {"weights": weights, "kv": kv, "batches": BATCHES, "speed": speed, "held": batch}
    return Result("fig1", FIGURE.title, f"{EXACT}, {SIMULATED}", checks, data)


def draw(result: Result, canvas: "Canvas") -> None:
    """Draw a pie, and throughput by batch size with each system marked."""
    data = result.data
    rest = 100 - data["weights"] - data["kv"]
    axes = panel(canvas, 1, 2, 1, "memory of an A100 with OPT-13B")
    labels = [f"weights\n{data['weights']:.0f} %", f"keys, values\n{data['kv']:.0f} %", "others"]
    axes.pie([data["weights"], data["kv"], rest], labels=labels, textprops={"fontsize": 8})
    axes = panel(canvas, 1, 2, 2, "throughput by batch size")
    axes.plot(data["batches"], data["speed"], color="black", linewidth=1)
    for name, batch in data["held"].items():
        axes.axvline(batch, color=COLOURS[name], linestyle="--", label=SYSTEMS[name].title)
    axes.set_xlabel("batched requests", fontsize=8)
    axes.set_ylabel("tokens per second", fontsize=8)
    axes.set_ylim(0)
    axes.legend(fontsize=7, frameon=False)


FIGURE = Figure("fig1", "Figure 1: memory and throughput", run, draw)
