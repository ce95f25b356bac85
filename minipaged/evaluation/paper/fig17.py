"""Figure 17: a chatbot, OPT-13B.

A request's prompt is the last 1,024 tokens of the conversation so far, its answer has at most 1,024
tokens, and nothing is kept between requests. Most conversations are long, so most prompts have
1,024 tokens, and a buddy allocator rounds 1,024 plus any answer up to 2,048: the three Orcas are
equal.

The paper's factor of 2 is not reproduced here; studies that digitised its curve did not find it.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from minipaged.evaluation.paper.drawing import panel, side_by_side
from minipaged.evaluation.paper.figure import SIMULATED, Check, Effort, Figure, Result
from minipaged.evaluation.paper.serving import Case, Search, find_capacity, in_parallel
from minipaged.evaluation.sim.systems import ORCAS, SYSTEMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

AT = 0.2  # seconds per token
GUESS = {"vllm": 1.0, "orca-oracle": 0.65, "orca-pow2": 0.65, "orca-max": 0.65}


def run(effort: Effort) -> Result:
    """Simulate all systems but FasterTransformer."""
    case = Case(workload="chat", seconds=max(800.0, effort.seconds))
    searches = [Search(replace(case, system=s, rate=r), (AT,)) for s, r in GUESS.items()]
    found = in_parallel(find_capacity, searches, "fig17")
    rates = {f.search.case.system: f.rates[AT] for f in found}
    checks = [
        Check(
            f"vLLM over {SYSTEMS[orca].title}",
            "2",
            rates["vllm"] / rates[orca],
            1.3,
            None,
            "x",
            "the bar is 1.3: see the page" if orca == ORCAS[0] else "",
        )
        for orca in ORCAS
    ]
    orcas = [rates[orca] for orca in ORCAS]
    apart = 100 * (max(orcas) / min(orcas) - 1)
    checks.append(Check("difference between the three Orcas", "hardly", apart, None, 15, "%"))
    return Result("fig17", FIGURE.title, SIMULATED, checks, {"rates": rates})


def draw(result: Result, canvas: "Canvas") -> None:
    """Draw the rate that each system sustains."""
    rates = result.data["rates"]
    axes = panel(canvas, 1, 1, 1, "request rate sustained at 0.2 s per token")
    titles = [SYSTEMS[system].title for system in rates]
    side_by_side(axes, titles, {"ours": list(rates.values())}, "requests per second")


FIGURE = Figure("fig17", "Figure 17: a chatbot", run, draw)
