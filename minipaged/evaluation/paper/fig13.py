"""Figure 13: the number of batched requests, with OPT-13B.

At 2 conversations or 30 instructions per second, all systems but paging are overloaded and run as
many requests as fit. With paging, the number depends on how fast requests finish: two constants of
the host were fitted to its two bars, so these bars prove nothing.
"""

from typing import TYPE_CHECKING

from minipaged.evaluation.paper.drawing import panel, side_by_side
from minipaged.evaluation.paper.figure import SIMULATED, Check, Effort, Figure, Result, near
from minipaged.evaluation.paper.serving import Case, in_parallel, serve
from minipaged.evaluation.sim.systems import SYSTEMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

PAPER = {
    ("sharegpt", 2.0): {"orca-max": 7.00, "orca-pow2": 9.81, "orca-oracle": 13.62, "vllm": 30.42},
    ("alpaca", 30.0): {"orca-max": 7.00, "orca-pow2": 43.24, "orca-oracle": 72.75, "vllm": 132.44},
}
PERCENT = {"orca-max": 0, "orca-pow2": 6, "orca-oracle": 5, "vllm": 10}  # percent, the tolerance
KNIFE_EDGE = 20  # percent; vLLM on Alpaca: 7 % more host time per sequence makes 20 % more requests
FITTED = "used for fitting"


def run(effort: Effort) -> Result:
    """Simulate both traces on all four systems."""
    cases = [
        Case(
            system,
            workload=workload,
            rate=rate,
            seconds=max(900.0, effort.seconds) if workload == "sharegpt" else 300.0,
            only_while_they_come=True,
        )
        for (workload, rate), bars in PAPER.items()
        for system in bars
    ]
    found = {
        (o.case.workload, o.case.system): o.mean_batch for o in in_parallel(serve, cases, "fig13")
    }
    checks: list[Check] = []
    for (workload, rate), bars in PAPER.items():
        for system, paper in bars.items():
            percent = PERCENT[system]
            if (workload, system) == ("alpaca", "vllm"):
                percent = KNIFE_EDGE
            fitted = system == "vllm" or (workload == "alpaca" and system != "orca-max")
            checks.append(
                near(
                    f"{workload}, {rate:g} per second: {SYSTEMS[system].title}",
                    paper,
                    found[workload, system],
                    percent=percent,
                    remark=FITTED if fitted else "",
                )
            )
    data = {f"{workload}/{system}": batch for (workload, system), batch in found.items()}
    return Result("fig13", FIGURE.title, SIMULATED, checks, data)


def draw(result: Result, canvas: "Canvas") -> None:
    """Draw the paper's numbers and ours next to each other."""
    for number, ((workload, rate), bars) in enumerate(PAPER.items(), 1):
        heights = {
            "paper": list(bars.values()),
            "ours": [result.data[f"{workload}/{system}"] for system in bars],
        }
        axes = panel(canvas, 1, 2, number, f"{workload}, {rate:g} requests per second")
        titles = [SYSTEMS[system].title.replace(" ", "\n") for system in bars]
        side_by_side(axes, titles, heights, "batched requests")


FIGURE = Figure("fig13", "Figure 13: batched requests", run, draw, (9.0, 4.0))
