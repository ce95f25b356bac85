"""Figure 3: the waste of two reservations, counted in the baseline's own memory manager.

Request A has a prompt of 7 tokens, has generated 1, and will generate 2 more; its maximum length is
2,048. Request B has a prompt of 3, has generated 1, and will generate 1 more; its maximum is 512.
"""

from typing import TYPE_CHECKING

from minipaged.evaluation.paper.drawing import panel, stacked
from minipaged.evaluation.paper.figure import EXACT, Check, Effort, Figure, Result
from minipaged.memory import MemoryUsage
from minipaged.memory.baselines.contiguous import ContiguousMemory
from minipaged.sequence import Sequence, SequenceGroup

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

REQUESTS = {"A": (7, 1, 2, 2048), "B": (3, 1, 1, 512)}  # prompt, generated, to come, longest
PAPER_UNUSED = {"A": 2038, "B": 507}


def run(effort: Effort) -> Result:
    """Count both requests, each in a separate pool with blocks of one token."""
    usage = {name: _reserve(*numbers) for name, numbers in REQUESTS.items()}
    checks: list[Check] = []
    for name, paper in PAPER_UNUSED.items():
        unused, later = usage[name].internal, usage[name].reserved
        to_come = REQUESTS[name][2]
        checks.append(Check(f"request {name}: slots never used", str(paper), unused, paper, paper))
        what = f"request {name}: slots kept for later"
        checks.append(Check(what, str(to_come), later, to_come, to_come))
    data = {name: [u.used, u.reserved, u.internal] for name, u in usage.items()}
    return Result("fig3", FIGURE.title, EXACT, checks, data)


def _reserve(prompt: int, generated: int, to_come: int, longest: int) -> MemoryUsage:
    memory = ContiguousMemory(longest, block_size=1, reserve="max", longest=longest)
    seq = Sequence(0, range(prompt), max_output_len=generated + to_come)
    memory.admit(SequenceGroup("request", [seq]))
    for token in range(generated):
        seq.append(token)
        memory.append(seq)
    return memory.usage()


def draw(result: Result, canvas: "Canvas") -> None:
    """Draw the use of each reservation."""
    names = list(REQUESTS)
    parts = ("tokens", "kept for later", "never used")
    heights = {part: [result.data[name][i] for name in names] for i, part in enumerate(parts)}
    axes = panel(canvas, 1, 1, 1, "two requests under Orca (Max)")
    colours = ("#2a7f62", "#e0b13c", "#c9504b")
    stacked(axes, [f"request {n}" for n in names], heights, colours, "token slots")


FIGURE = Figure("fig3", "Figure 3: two reservations", run, draw)
