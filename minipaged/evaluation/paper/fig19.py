"""Figure 19: recomputation compared with swapping.

Left: preempting and restoring 256 tokens of OPT-13B. Swapping moves blocks over the bus, with many
small copies for small blocks; recomputation computes the tokens like a prompt, whatever the block
size. Right: both in a pool that is too small. In addition, the embedded model is measured on this
processor, where there is no bus and swapping is a copy in memory.

"Never higher than 20 % of swapping's latency" (section 7.3) can only mean "at most 20 % slower".
"""

from collections.abc import Callable
from math import ceil
from typing import TYPE_CHECKING, Any

from minipaged.config import PreemptionMode
from minipaged.evaluation.paper.drawing import panel
from minipaged.evaluation.paper.figure import MEASURED, SIMULATED, Check, Effort, Figure, Result
from minipaged.evaluation.paper.serving import Case, in_parallel, serve
from minipaged.evaluation.sim.catalogue import DEPLOYMENTS
from minipaged.evaluation.sim.cost_model import CostModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

    from minipaged.tokenizer.prompts import Prompt

NUM_TOKENS = 256
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SERVED_SIZES = (4, 16, 64)
RATE = 2.2  # conversations per second: the pool overflows occasionally
WAYS: tuple[PreemptionMode, PreemptionMode] = ("recompute", "swap")


def run(effort: Effort) -> Result:
    """Compute the formula, the simulation and the measurement."""
    costs = CostModel(DEPLOYMENTS["opt-13b"])
    pairs = NUM_TOKENS**2 / 2
    recompute = costs.step(0, 0, NUM_TOKENS, pairs)
    swap = [2 * costs.swap(NUM_TOKENS // size, size) for size in SIZES]
    crossover = next(size for size, s in zip(SIZES, swap, strict=True) if s < recompute)
    cases = [
        Case(rate=RATE, seconds=effort.seconds, block_size=size, preemption=way)
        for way in WAYS
        for size in SERVED_SIZES
    ]
    served = [outcome.normalized_latency for outcome in in_parallel(serve, cases, "fig19")]
    half = len(SERVED_SIZES)
    by_way = {"recompute": served[:half], "swap": served[half:]}
    slower = 100 * (by_way["recompute"][1] / by_way["swap"][1] - 1)
    measured = _measure()
    checks = [
        Check("swapping is faster from blocks of", "about 8 to 16", crossover, 8, 16),
        Check("swapping, blocks of 1 over 256", "many times", swap[0] / swap[-1], 2, None, "x"),
        Check(
            "recomputing slower than swapping, blocks of 16 to 256, at most",
            "20",
            100 * max(recompute / s - 1 for s in swap[SIZES.index(16) :]),
            None,
            20,
            "%",
            "by a formula with an idle bus",
        ),
        Check("served, blocks of 16: recomputation slower by", "at most 20", slower, None, 20, "%"),
    ]
    for size in (SIZES[0], 16, SIZES[-1]):
        ratio = measured["swap"][SIZES.index(size)] / measured["recompute"][SIZES.index(size)]
        what = f"embedded model, blocks of {size}: swapping over recomputing"
        checks.append(Check(what, "-", ratio, unit="x", remark="this processor"))
    data = {"recompute": recompute, "swap": swap, "served": by_way, "measured": measured}
    return Result("fig19", FIGURE.title, f"{SIMULATED}, {MEASURED}", checks, data)


def _measure() -> dict[str, list[float]]:
    """Seconds to preempt and restore by block size, both ways, with the embedded model."""
    import torch  # imported late: the other figures do not need it

    from minipaged.evaluation.bench.timing import median_seconds

    measured: dict[str, list[float]] = {way: [] for way in WAYS}
    for block_size in SIZES:
        seconds = median_seconds(_both_ways(block_size), torch.device("cpu"))
        for way in WAYS:
            measured[way].append(seconds[way])
    return measured


def _both_ways(block_size: int) -> dict[str, Callable[[], object]]:
    import torch

    from minipaged.llm import LLM
    from minipaged.sampling import SamplingParams

    num_blocks = ceil(NUM_TOKENS / block_size)
    llm = LLM(
        device="cpu",
        block_size=block_size,
        num_blocks=2 * num_blocks + 2,
        num_swap_blocks=num_blocks,
        enable_prefix_caching=False,
        max_num_seqs=1,
        max_num_batched_tokens=NUM_TOKENS,
    )
    kv_cache = llm.engine.executor.runner.kv_cache
    pairs = [(block, block) for block in range(num_blocks)]

    @torch.inference_mode()
    def swap() -> None:
        kv_cache.swap_out(pairs)
        kv_cache.swap_in(pairs)

    def recompute() -> None:
        """The whole prompt and one sampled token, like a preempted sequence."""
        prompt: Prompt = {"prompt_token_ids": [1 + i % 100 for i in range(NUM_TOKENS)]}
        once = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        llm.generate(prompt, once, use_tqdm=False)

    return {"recompute": recompute, "swap": swap}


def draw(result: Result, canvas: "Canvas") -> None:
    """Draw three panels."""
    data = result.data
    axes = panel(canvas, 1, 3, 1, f"{NUM_TOKENS} tokens out and back, OPT-13B, by formula")
    axes.plot(SIZES, [1e3 * s for s in data["swap"]], "o-", markersize=3, label="swap")
    axes.axhline(1e3 * data["recompute"], color="black", linestyle="--", label="recompute")
    _by_size(axes)
    axes = panel(canvas, 1, 3, 2, "the same, embedded model, measured")
    for way in WAYS:
        seconds = data["measured"][way]
        axes.plot(SIZES, [1e3 * s for s in seconds], "o-", markersize=3, label=way)
    _by_size(axes)
    axes = panel(canvas, 1, 3, 3, "latency of a served trace, simulated")
    for way in WAYS:
        axes.plot(SERVED_SIZES, data["served"][way], "o-", markersize=3, label=way)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("block size, tokens", fontsize=8)
    axes.set_ylabel("normalised latency, s per token", fontsize=8)
    axes.set_ylim(0)
    axes.legend(fontsize=7, frameon=False)


def _by_size(axes: Any) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("block size, tokens", fontsize=8)
    axes.set_ylabel("ms", fontsize=8)
    axes.legend(fontsize=7, frameon=False)


FIGURE = Figure("fig19", "Figure 19: recomputation and swapping", run, draw, (12.0, 4.0))
