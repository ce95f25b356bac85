"""Figure 16: translation with a prefix of examples that all prompts share, LLaMA-13B.

The prefix is computed once and its blocks are shared; a sentence follows it. The lengths of the
WMT16 sentences are guesses: the paper states only those of the prefixes, 80 tokens with one example
and 341 with five.
"""

from typing import TYPE_CHECKING

from minipaged.evaluation.paper.drawing import panel, side_by_side
from minipaged.evaluation.paper.figure import SIMULATED, Check, Effort, Figure, Result, near
from minipaged.evaluation.paper.serving import Case, Search, find_capacity, in_parallel
from minipaged.evaluation.sim.traces import Lengths

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

AT = 0.2  # seconds per token
SENTENCES = Lengths(35.0, 45.0, 0.6, 0.6)
PAPER = {80: (1.67, 15), 341: (3.58, 30)}  # by prefix: the ratio, and the tolerance in percent
GUESS = {80: 35.0, 341: 30.0}


def run(effort: Effort) -> Result:
    """Compare vLLM, with and without sharing the prefix, with Orca (Oracle)."""
    searches: list[Search] = []
    for prefix_len in PAPER:
        for system, shares, slower in (
            ("vllm", True, 1.0),
            ("vllm", False, 0.6),
            ("orca-oracle", False, 0.5),
        ):
            case = Case(
                system,
                "llama-13b",
                SENTENCES,
                GUESS[prefix_len] * slower,
                effort.short_seconds,
                prefix_len=prefix_len,
                prefix_caching=shares,
            )
            searches.append(Search(case, (AT,)))
    rates = [found.rates[AT] for found in in_parallel(find_capacity, searches, "fig16")]
    checks: list[Check] = []
    data: dict[str, list[float]] = {}
    for number, (prefix_len, (paper, percent)) in enumerate(PAPER.items()):
        shared, alone, orca = rates[3 * number :][:3]
        data[str(prefix_len)] = [shared / orca, alone / orca]
        what = f"prefix of {prefix_len}: vLLM over Orca (Oracle)"
        checks.append(near(what, paper, shared / orca, percent=percent, unit="x"))
        checks.append(Check(f"{what}, nothing shared", "-", alone / orca, unit="x"))
    into = f"{SENTENCES.input_mean:g} tokens into {SENTENCES.output_mean:g}"
    notes = [f"Sentences are translated from {into}: a guess."]
    return Result("fig16", FIGURE.title, SIMULATED, checks, data, notes)


def draw(result: Result, canvas: "Canvas") -> None:
    """Draw the ratios by prefix."""
    heights = {
        "paper": [paper for paper, _ in PAPER.values()],
        "ours": [result.data[str(p)][0] for p in PAPER],
        "ours, nothing shared": [result.data[str(p)][1] for p in PAPER],
    }
    axes = panel(canvas, 1, 1, 1, "request rate sustained at 0.2 s per token")
    prefixes = [f"prefix of {p} tokens" for p in PAPER]
    side_by_side(axes, prefixes, heights, "vLLM / Orca (Oracle)")


FIGURE = Figure("fig16", "Figure 16: a shared prefix", run, draw)
