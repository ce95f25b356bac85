"""Figure 12: latency by request rate, for three models on two traces.

Normalised latency is the mean over requests of the seconds from arrival to the last token, divided
by the number of output tokens. It rises slowly until a system can no longer keep up, and then
without bound. The text of the paper compares the rates at which that happens, but names no
threshold, so ratios are given for three. Studies that digitised its curves did not find the upper
ends of its ranges, "8x against Orca (Max)" and 22 times FasterTransformer (section 6.2).
"""

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from minipaged.evaluation.paper.drawing import COLOURS, panel
from minipaged.evaluation.paper.figure import SIMULATED, Check, Effort, Figure, Result
from minipaged.evaluation.paper.serving import Case, Search, find_capacity, in_parallel
from minipaged.evaluation.sim.capacity import THRESHOLDS
from minipaged.evaluation.sim.systems import SYSTEMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

AT = 0.2  # seconds per token, at which systems are compared
# The right ends of the paper's axes, in requests per second, which are close to vLLM's limits.
AXES = {
    ("opt-13b", "sharegpt"): 2.0,
    ("opt-66b", "sharegpt"): 1.0,
    ("opt-175b", "sharegpt"): 2.5,
    ("opt-13b", "alpaca"): 30.0,
    ("opt-66b", "alpaca"): 22.0,
    ("opt-175b", "alpaca"): 20.0,
}
SLOWER = {  # a first guess, for the search
    "vllm": 1.0,
    "orca-oracle": 0.6,
    "orca-pow2": 0.5,
    "orca-max": 0.35,
    "fastertransformer": 0.12,
}
# Ratios of rates, vLLM over another: the paper's, and the bounds for ours at 0.2 s per token.
RATIOS = {
    ("opt-13b", "sharegpt", "orca-oracle"): ("1.7 to 2.7", 1.4, 2.1),
    ("opt-13b", "sharegpt", "orca-max"): ("2.7 to 8", 2.4, 3.7),
    ("opt-13b", "sharegpt", "fastertransformer"): ("up to 22", 5.0, 22.0),
    ("opt-66b", "sharegpt", "orca-oracle"): ("1.7 to 2.7", 1.7, 2.7),
    ("opt-66b", "sharegpt", "orca-max"): ("2.7 to 8", 2.7, 8.0),
    ("opt-175b", "sharegpt", "orca-oracle"): ("1.7 to 2.7", 1.7, 2.7),
    ("opt-175b", "sharegpt", "orca-max"): ("2.7 to 8", 2.7, 8.0),
    ("opt-13b", "alpaca", "orca-oracle"): ("1.3", 1.2, 1.4),
    ("opt-175b", "alpaca", "orca-oracle"): ("less pronounced", None, 1.1),
}
OUTSIDE = "but outside the paper's range for all three models"
WHY = {("opt-175b", "sharegpt"): "264 GB of keys are plenty: little gain, as on the paper's curve"}


def run(effort: Effort) -> Result:
    """Find the rates that five systems sustain, in all six panels."""
    searches = [_search(*axis, system, effort) for axis in AXES for system in SYSTEMS]
    rates: dict[str, dict[float, float]] = {}
    curves: dict[str, list[tuple[float, float | None]]] = {}
    for found in in_parallel(find_capacity, searches, "fig12"):
        case = found.search.case
        key = _key(case.server, str(case.workload), case.system)
        rates[key], curves[key] = found.rates, found.points
    checks = _check_order(rates)
    for (server, workload, other), (paper, low, high) in RATIOS.items():
        ours = rates[_key(server, workload, "vllm")][AT]
        ratio = ours / rates[_key(server, workload, other)][AT]
        what = f"{server}, {workload}: vLLM over {SYSTEMS[other].title}"
        checks.append(_remarked(Check(what, paper, ratio, low, high, "x"), server, workload))
    data = {"rates": rates, "curves": curves}
    return Result("fig12", FIGURE.title, SIMULATED, checks, data)


def _remarked(check: Check, server: str, workload: str) -> Check:
    """The check, with its remark."""
    if not check.is_met:
        return replace(check, remark=WHY.get((server, workload), ""))
    least, is_range, _ = check.paper.partition(" to ")
    below = is_range and least[0].isdigit() and check.ours < float(least)
    return replace(check, remark=OUTSIDE) if below else check


def _search(server: str, workload: str, system: str, effort: Effort) -> Search:
    seconds = effort.seconds if workload == "sharegpt" else effort.short_seconds
    if server != "opt-13b":
        seconds *= 0.75
    if server == "opt-175b":
        seconds = min(seconds, 900.0)  # as in the paper
    rate = AXES[server, workload] * SLOWER[system]
    case = Case(system, server, workload, rate, seconds)
    return Search(case, THRESHOLDS if server == "opt-13b" else (AT,))


def _key(server: str, workload: str, system: str) -> str:
    return f"{server}/{workload}/{system}"


def _check_order(rates: dict[str, dict[float, float]]) -> list[Check]:
    """FasterTransformer < Max < Pow2 < Oracle < vLLM, at every threshold."""
    checks: list[Check] = []
    for workload in ("sharegpt", "alpaca"):
        for threshold in THRESHOLDS:
            sustained = [rates[_key("opt-13b", workload, name)][threshold] for name in SYSTEMS]
            in_order = 1 + sum(a > b for a, b in pairwise(sustained))
            at = f"opt-13b, {workload}, at {threshold:g} s per token"
            checks.append(Check(f"{at}: systems in the paper's order", "5", in_order, 5, 5))
    return checks


def draw(result: Result, canvas: "Canvas") -> None:
    """Draw six panels."""
    curves: dict[str, Any] = result.data["curves"]
    for number, (server, workload) in enumerate(AXES, 1):
        axes = panel(canvas, 2, 3, number, f"{server}, {workload}")
        for system, about in SYSTEMS.items():
            points = _up_to_the_first_that_fails(curves[_key(server, workload, system)])
            rates, latencies = zip(*points, strict=True)
            colour = COLOURS[system]
            axes.plot(rates, latencies, "o-", markersize=3, color=colour, label=about.title)
        axes.set_ylim(0, 1)
        axes.set_xlabel("requests per second", fontsize=8)
        axes.set_ylabel("normalised latency, s per token", fontsize=8)
    # In the last panel, where the legend hides no curve.
    canvas.axes[-1].legend(fontsize=6, frameon=False, loc="upper center", bbox_to_anchor=(0.55, 1))


def _up_to_the_first_that_fails(
    points: list[tuple[float, float | None]],
) -> list[tuple[float, float]]:
    """The points of a curve up to the first whose latency is unknown, drawn above the axis."""
    drawn: list[tuple[float, float]] = []
    for rate, latency in points:
        drawn.append((rate, 2.0 if latency is None else latency))
        if latency is None:
            break
    return drawn


FIGURE = Figure("fig12", "Figure 12: latency by rate", run, draw, (11.0, 6.0))
