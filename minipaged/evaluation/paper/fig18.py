"""Figure 18: the cost of paging in a kernel, and the best block size.

Left, measured on this processor: this library's decode attention through block tables, compared
with PyTorch's attention over contiguous keys. Right, simulated: larger blocks are read faster,
smaller ones waste less and are shared more. The cost of small blocks is assumed to be a factor of
1 + 8 / size, so the left slope of that curve is an assumption; the right one is not.
"""

from typing import TYPE_CHECKING

from minipaged.evaluation.paper.drawing import panel, side_by_side
from minipaged.evaluation.paper.figure import MEASURED, SIMULATED, Check, Effort, Figure, Result
from minipaged.evaluation.paper.serving import Case, in_parallel, serve

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

SHAPES = [(batch, context) for batch in (8, 32) for context in (64, 128, 256)]
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RATES = {"sharegpt": 1.9, "alpaca": 28.0}  # near the limit, where the block size matters
BEST = {"sharegpt": (16, 128), "alpaca": (16, 32)}  # the paper's
ASSUMED = "the cost of small blocks is assumed"
TAKES_LONGER = 8.0  # reading blocks of one token takes 1 + 8 times as long per token


def run(effort: Effort) -> Result:
    """Measure and simulate both halves."""
    cases = [
        Case(
            workload=workload,
            rate=rate,
            seconds=effort.seconds / 2 if workload == "sharegpt" else effort.short_seconds,
            block_size=size,
            kv_factor=1 + TAKES_LONGER / size,
        )
        for workload, rate in RATES.items()
        for size in SIZES
    ]
    found = in_parallel(serve, cases, "fig18")
    latency: dict[str, list[float]] = {}
    for outcome in found:
        latency.setdefault(str(outcome.case.workload), []).append(outcome.normalized_latency)
    checks: list[Check] = []
    for workload, seconds in latency.items():
        low, high = BEST[workload]
        best = SIZES[seconds.index(min(seconds))]
        what = f"{workload}: the best block size"
        checks.append(Check(what, f"{low} to {high}", best, low, high, remark=ASSUMED))
        what = f"{workload}: latency with blocks of 256 over the best"
        checks.append(Check(what, "worse", seconds[-1] / min(seconds), 1.05, None, "x"))
    over = _measure()
    for (batch, context), ratio in zip(SHAPES, over, strict=True):
        what = f"batch {batch}, context {context}: paged over contiguous"
        checks.append(Check(what, "1.20 to 1.26", ratio, unit="x", remark="this processor"))
    data = {"latency": latency, "over": over}
    return Result("fig18", FIGURE.title, f"{MEASURED}, {SIMULATED}", checks, data)


def _measure() -> list[float]:
    """The time of decode attention through block tables, divided by that of SDPA."""
    import torch  # only here

    from minipaged.evaluation.bench.decode import measure

    rows = measure(torch.float32, [(batch, context, 1) for batch, context in SHAPES])
    return [
        (row.in_place_seconds if row.chosen == "in place" else row.gathered_seconds)
        / row.sdpa_seconds
        for row in rows
    ]


def draw(result: Result, canvas: "Canvas") -> None:
    """Draw ratios by shape, and latencies by block size."""
    axes = panel(canvas, 1, 2, 1, "decode attention, measured on this processor")
    labels = [f"{batch} x {context}" for batch, context in SHAPES]
    over = {"ours": result.data["over"]}
    side_by_side(axes, labels, over, "time, paged / contiguous", "{:.2f}")
    axes.set_xlabel("batch size x context length, tokens", fontsize=8)
    axes = panel(canvas, 1, 2, 2, "latency by block size, simulated")
    for workload, seconds in result.data["latency"].items():
        axes.plot(SIZES, seconds, "o-", markersize=3, label=workload)
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.set_xlabel("block size, tokens", fontsize=8)
    axes.set_ylabel("normalised latency, s per token", fontsize=8)
    axes.set_ylim(0, 0.5)
    axes.legend(fontsize=7, frameon=False)


FIGURE = Figure("fig18", "Figure 18: kernel overhead and block sizes", run, draw, (11.0, 4.0))
