"""How the chapters draw: one style for all pictures, and those pictures that several of them need.

Text is a middle grey and the background empty, so that a picture can be read on a white page and on
a dark one. Colours are those of Okabe and Ito, which people who see few colours can tell apart.

A notebook shows pictures where they are drawn, and so does `minipaged learn`. A script saves them
if you set a folder:

    MINIPAGED_PICTURES=pictures python tutorials/00_first_run.py
"""

import atexit
import os
import re
import sys
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")  # draw into files, on a machine without a screen too

try:
    import matplotlib as mpl
except ModuleNotFoundError:
    sys.exit('The chapters draw with matplotlib, which is not installed: pip install -e ".[plot]"')
from cycler import cycler
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

GREY = "#808080"
FAINT = "#80808033"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800", "#6A51A3")

mpl.rcParams.update(
    {
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "axes.facecolor": "none",
        "legend.facecolor": "none",
        "legend.frameon": False,
        "legend.labelcolor": GREY,
        "text.color": GREY,
        "axes.edgecolor": GREY,
        "axes.labelcolor": GREY,
        "axes.titlecolor": GREY,
        "axes.titlesize": "medium",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=COLOURS),
        "xtick.color": GREY,
        "ytick.color": GREY,
        "grid.color": FAINT,
        "figure.constrained_layout.use": True,
        "svg.fonttype": "none",
        "svg.hashsalt": "minipaged",  # the same picture, the same file
    }
)


def picture(width: float = 7.2, height: float = 2.8, **options: Any) -> Any:
    """A figure as wide as a page and its axes, as `plt.subplots` returns them."""
    return plt.subplots(figsize=(width, height), **options)


def blocks(
    axes: Axes,
    contents: Mapping[int, list[str]],
    owners: Mapping[int, str],
    num_blocks: int,
    block_size: int,
    columns: int = 1,
) -> None:
    """Physical blocks, slot by slot, with the text of the token in each.

    Args:
        contents: the tokens in each block that has an owner.
        owners: who that is. "A", "B", ... have the same colour in every picture. Blocks with
            several owners, as in "A, B", are grey.
        columns: blocks side by side.
    """
    colours = _colours(list(owners.values()))
    for block in range(num_blocks):
        row, column = divmod(block, columns)
        left, top = column * (block_size + 1.2), -1.25 * row
        owner = owners.get(block, "")
        axes.text(left - 0.15, top - 0.5, str(block), ha="right", va="center", fontsize=8)
        for offset in range(block_size):
            tokens = contents.get(block, [])
            filled = offset < len(tokens)
            face = colours[owner] if filled else "none"
            axes.add_patch(
                Rectangle((left + offset, top - 1), 1, 1, facecolor=face, edgecolor=GREY, lw=0.6)
            )
            if filled:
                axes.text(
                    left + offset + 0.5, top - 0.5, tokens[offset].strip(), ha="center",
                    va="center", fontsize=7, color=ink(face), fontweight="bold",
                )  # fmt: skip
    rows = -(-num_blocks // columns)
    axes.set_xlim(-0.8, columns * (block_size + 1.2) - 1.1)
    axes.set_ylim(-1.25 * rows + 0.2, 0.05)
    axes.axis("off")
    for owner in sorted(set(owners.values())):
        axes.scatter([], [], marker="s", s=60, color=colours[owner], label=owner)
    if owners:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(colours), fontsize=8)


def strips(axes: Axes, rows: Mapping[str, Iterable[str]], labels: Mapping[str, str]) -> None:
    """Rows of memory, slot by slot from left to right: what each slot is used for.

    Args:
        rows: for each row's name, the use of each of its slots.
        labels: for each use, its name in the legend; the first has the strongest colour.
    """
    uses = list(labels)
    for line, slots in enumerate(rows.values()):
        start = 0
        for use, run in groupby(slots):
            length = len(list(run))
            colour = COLOURS[uses.index(use) % len(COLOURS)] if use in labels else "none"
            axes.barh(-line, length, left=start, height=0.7, color=colour, edgecolor=GREY, lw=0.3)
            start += length
    axes.set_yticks([-line for line in range(len(rows))], list(rows))
    for use, label in labels.items():
        axes.barh(0, 0, color=COLOURS[uses.index(use) % len(COLOURS)], label=label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, fontsize=8)
    axes.spines[["left", "bottom"]].set_visible(False)


def label(axes: Axes, x: float, y: float, text: str, colour: str, fontsize: float = 6.5) -> None:
    """A word in a coloured box, as in a tree."""
    box = {"boxstyle": "round,pad=0.25", "facecolor": colour, "edgecolor": "none"}
    axes.text(
        x, y, text, ha="center", va="center", fontsize=fontsize, color=ink(colour), bbox=box
    )  # fmt: skip


def _colours(owners: Iterable[str]) -> dict[str, str]:
    letters = {name: ord(name) - ord("A") for name in owners if len(name) == 1}
    shared = {name: GREY for name in owners if ", " in name}
    others = sorted({name for name in owners if len(name) > 1} - shared.keys())
    numbers = letters | {name: len(letters) + index for index, name in enumerate(others)}
    return shared | {name: COLOURS[number % len(COLOURS)] for name, number in numbers.items()}


def ink(face: str) -> str:
    """White on dark colours, black on light ones."""
    red, green, blue = mpl.colors.to_rgb(face)
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else "black"


def stop(why: str) -> None:
    """End a chapter with one sentence: a script quietly, a notebook without a traceback."""
    if "ipykernel" in sys.modules:
        raise _Stopped(why)
    print(why)
    raise SystemExit


class _Stopped(Exception):
    def _render_traceback_(self) -> list[str]:  # Jupyter shows this instead of a traceback
        return [str(self)]


def _end() -> None:
    """As a script ends: its pictures go where MINIPAGED_PICTURES says, as 00_first_run-1.png and so
    on. A chapter says where to read it; one that failed does not.
    """
    script = Path(sys.argv[0]).resolve()
    folder = os.environ.get("MINIPAGED_PICTURES")
    saved = "" if folder is None else f" Its pictures are in {_save_pictures(script.stem, folder)}."
    chapter = re.match(r"\d\d(?=_)", script.name)
    is_ours = script.parent == Path(__file__).resolve().parent
    if chapter and is_ours and not hasattr(sys, "last_value"):
        where = f"minipaged learn {int(chapter[0])}"
        print(f"\nRead this chapter with its text and pictures: {where}.{saved}")


def _save_pictures(name: str, folder: str) -> str:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number in plt.get_fignums():
        file = Path(folder) / f"{name}-{number}.png"
        plt.figure(number).savefig(file, dpi=150, facecolor="white")
    return folder


if "ipykernel" not in sys.modules:
    atexit.register(_end)
