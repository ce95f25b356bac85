"""Figure 15: the fraction of blocks that the sequences of a request save by sharing, OPT-13B.

For parallel sampling it is arithmetic: n samples save the full blocks of their prompt n - 1 times,
in every step. For beam search it depends on the ancestry of the beams, and so on the model: one
constant per trace was fitted to the paper's three bars here, and the embedded model is measured for
comparison (`minipaged bench sharing`).
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from minipaged.evaluation.paper.drawing import panel, side_by_side
from minipaged.evaluation.paper.figure import (
    MEASURED,
    SIMULATED,
    Check,
    Effort,
    Figure,
    Result,
    near,
)
from minipaged.evaluation.paper.serving import Case, in_parallel, serve
from minipaged.evaluation.sim.fitted import PEAKEDNESS
from minipaged.evaluation.sim.requests import Decoding, Method

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

WIDTHS = (2, 4, 6)
PAPER: dict[tuple[str, Method], tuple[float | None, ...]] = {  # percent of blocks saved
    ("alpaca", "sample"): (6.09, 8.53, 9.79),
    ("sharegpt", "sample"): (16.2, None, 30.5),
    ("alpaca", "beam"): (37.56, 53.13, 55.16),
    ("sharegpt", "beam"): (44.3, None, 66.3),
}
POINTS = {("alpaca", "sample"): 1.5, ("sharegpt", "sample"): 4.0}
BEAM_POINTS = 6.0
WHY = "depends on the spread of prompt lengths; the paper gives only the mean"
RATE = {"alpaca": 4.0, "sharegpt": 0.3}  # requests per second: low enough for short queues
METHODS = {"sample": "parallel sampling", "beam": "beam search"}


def run(effort: Effort) -> Result:
    """Simulate both traces, and measure beams with the embedded model."""
    cases = [
        Case(
            workload=workload,
            rate=RATE[workload],
            seconds=1000.0,
            decoding=Decoding(method, width, PEAKEDNESS[workload]),
            watch_memory=True,
        )
        for workload, method in PAPER
        for width in WIDTHS
    ]
    saved = [100 * o.blocks_saved for o in in_parallel(serve, cases, "fig15")]
    checks: list[Check] = []
    data: dict[str, list[float]] = {}
    for number, ((workload, method), paper) in enumerate(PAPER.items()):
        ours = saved[number * len(WIDTHS) :][: len(WIDTHS)]
        data[f"{workload}/{method}"] = ours
        for width, theirs, percent in zip(WIDTHS, paper, ours, strict=True):
            what = f"{workload}: {METHODS[method]}, {width}"
            remark = "used for fitting" if method == "beam" else ""
            points = POINTS.get((workload, method), BEAM_POINTS)
            if theirs is None:
                checks.append(Check(what, "-", percent, unit="%", remark=remark))
            else:
                check = near(what, theirs, percent, points=points, unit="%", remark=remark)
                checks.append(check if check.is_met else replace(check, remark=WHY))
    measured = _measure(effort)
    data["measured"] = measured
    checks += [
        Check(f"beam search, {width}: embedded model, measured", str(theirs), ours, unit="%")
        for width, theirs, ours in zip(WIDTHS, PAPER["alpaca", "beam"], measured, strict=True)
    ]
    return Result("fig15", FIGURE.title, f"{SIMULATED}, {MEASURED}", checks, data)


def _measure(effort: Effort) -> list[float]:
    """Percent saved by the embedded model's own beams, on requests as long as Alpaca's."""
    from minipaged.evaluation.bench.sharing import alpaca_lengths, measure  # torch, only here
    from minipaged.llm import LLM

    llm = LLM(num_blocks=4096, enable_prefix_caching=False, max_num_seqs=96)
    lengths = alpaca_lengths(effort.num_requests, llm.engine.config.max_model_len - 1, seed=0)
    rows = measure(llm, lengths, seed=0, use_tqdm=False)
    return [row.percent for row in rows if row.method == "beam search"]


def draw(result: Result, canvas: "Canvas") -> None:
    """Draw the paper's numbers and ours, one panel per trace and method."""
    for number, ((workload, method), paper) in enumerate(PAPER.items(), 1):
        axes = panel(canvas, 2, 2, number, f"{workload}, {METHODS[method]}")
        heights = {"paper": paper, "ours": result.data[f"{workload}/{method}"]}
        if (workload, method) == ("alpaca", "beam"):
            heights["embedded model"] = result.data["measured"]
        side_by_side(axes, [str(w) for w in WIDTHS], heights, "% of blocks saved")
        axes.set_xlabel("sequences per request", fontsize=8)


FIGURE = Figure("fig15", "Figure 15: blocks saved by sharing", run, draw, (9.0, 6.5))
