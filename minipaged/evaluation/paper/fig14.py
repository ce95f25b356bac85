"""Figure 14: several sequences per request, OPT-13B on instructions.

The more sequences share a prompt or a history, the larger is the gain of sharing. The figure
compares the rates that vLLM and Orca (Oracle) sustain at 0.2 s per token.

The results for beams are below the paper's: see the note.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from minipaged.evaluation.paper.drawing import panel, side_by_side
from minipaged.evaluation.paper.figure import SIMULATED, Check, Effort, Figure, Result
from minipaged.evaluation.paper.serving import Case, Search, find_capacity, in_parallel
from minipaged.evaluation.sim.fitted import PEAKEDNESS
from minipaged.evaluation.sim.requests import Decoding

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

AT = 0.2  # seconds per token
METHODS = {"sample": "parallel sampling", "beam": "beam search"}
NOTE = """\
The paper's 2.3 x for 6 beams is not reproduced: memory alone gives only this ratio. Orca copies
whole sequences whenever beams diverge. If copies took many times as long as reading and writing
their bytes, the ratio would be close. The paper does not state their speed, so here they take full
bandwidth."""
HOST = "the host limits so many sequences, not memory"
GUESS = {"sample": 48.0, "beam": 44.0}  # sequences per second of vLLM, to begin with


def run(effort: Effort) -> Result:
    """Compute the ratios of both methods at all widths."""
    peakedness = PEAKEDNESS["alpaca"]
    decodings = [Decoding()]
    decodings += [Decoding("sample", width) for width in effort.widths]
    decodings += [Decoding("beam", width, peakedness) for width in effort.widths]
    searches: list[Search] = []
    for decoding in decodings:
        guess = 28.0 if decoding.width == 1 else GUESS[decoding.method] / decoding.width
        for system, slower in (("vllm", 1.0), ("orca-oracle", 0.7)):
            case = Case(
                system,
                workload="alpaca",
                rate=guess * slower,
                seconds=effort.short_seconds * 2,  # a lower request rate
                decoding=decoding,
                max_num_seqs=1024,  # so that memory is the limit
            )
            searches.append(Search(case, (AT,), near=1.015))  # the ratios are close to each other
    rates = [found.rates[AT] for found in in_parallel(find_capacity, searches, "fig14")]
    ratios = [ours / other for ours, other in zip(rates[::2], rates[1::2], strict=True)]
    checks = [Check("one sequence: vLLM over Orca (Oracle)", "1.3", ratios[0], 1.2, 1.4, "x")]
    data: dict[str, list[float]] = {}
    for number, method in enumerate(("sample", "beam")):
        of_method = ratios[1 + number * len(effort.widths) :][: len(effort.widths)]
        data[method] = [ratios[0], *of_method]
        for width, ratio in zip(effort.widths, of_method, strict=True):
            paper = "2.3" if (method, width) == ("beam", 6) else "-"
            remark = "no bar: see the note" if paper != "-" else ""
            what = f"{METHODS[method]}, {width}: vLLM over Orca (Oracle)"
            checks.append(Check(what, paper, ratio, unit="x", remark=remark))
        what = f"{METHODS[method]}: gain with 6 over gain with 2"
        gain = Check(what, "more", of_method[-1] / of_method[0], 1.0, None, "x")
        checks.append(gain if gain.is_met else replace(gain, remark=HOST))
    data["widths"] = [1, *effort.widths]
    return Result("fig14", FIGURE.title, SIMULATED, checks, data, [NOTE])


def draw(result: Result, canvas: "Canvas") -> None:
    """Draw the ratios by width."""
    heights = {METHODS[m]: result.data[m] for m in ("sample", "beam")}
    axes = panel(canvas, 1, 1, 1, "request rate sustained at 0.2 s per token")
    widths = [str(width) for width in result.data["widths"]]
    side_by_side(axes, widths, heights, "vLLM / Orca (Oracle)")
    axes.set_xlabel("sequences per request", fontsize=8)


FIGURE = Figure("fig14", "Figure 14: several sequences per request", run, draw)
