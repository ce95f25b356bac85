"""Table 1: the number of tokens whose keys and values fit on the servers of the evaluation.

It is arithmetic: memory left for keys and values, divided by the bytes of a token's keys and values
in all layers (section 3: for OPT-13B 2 x 40 layers x 5,120 x 2 bytes = 800 KB).
"""

from typing import TYPE_CHECKING

from minipaged.evaluation.paper.drawing import panel, side_by_side
from minipaged.evaluation.paper.figure import EXACT, Check, Effort, Figure, Result, near
from minipaged.evaluation.sim.catalogue import MODELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

GIB = 1024**3
# Memory for keys and values, in GiB, and slots, as the table prints them.
PAPER = {"opt-13b": (12, 15_700), "opt-66b": (21, 9_700), "opt-175b": (264, 60_100)}


def run(effort: Effort) -> Result:
    """Compute the slots of the three servers."""
    checks: list[Check] = []
    slots: dict[str, int] = {}
    for name, (gib, paper) in PAPER.items():
        slots[name] = gib * GIB // MODELS[name].kv_bytes_per_token
        what = f"token slots, {name}"
        if name == "opt-66b":
            remark = "9.7K need 21.3 GiB: the table's 21 GB are rounded"
            checks.append(Check(what, "9700", slots[name], remark=remark))
        else:  # to the hundred, as it is printed
            checks.append(near(what, paper, slots[name], points=50))
    a100 = MODELS["opt-13b"].kv_bytes_per_token
    checks.append(Check("bytes per token, opt-13b", "800 KB", a100, 819_200, 819_200))
    return Result("table1", FIGURE.title, EXACT, checks, {"slots": slots, "paper": PAPER})


def draw(result: Result, canvas: "Canvas") -> None:
    """Draw the slots as bars."""
    slots, names = result.data["slots"], list(PAPER)
    heights = {
        "paper": [PAPER[name][1] for name in names],
        "ours": [slots[name] for name in names],
    }
    axes = panel(canvas, 1, 1, 1, "token slots by model")
    side_by_side(axes, names, heights, "token slots", "{:,.0f}")


FIGURE = Figure("table1", "Table 1: space for keys and values", run, draw)
