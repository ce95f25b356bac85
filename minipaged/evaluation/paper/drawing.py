"""Bars and lines for the figures. Callers pass the canvas, so matplotlib is not imported here."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

COLOURS = {
    "vllm": "#2a7f62",
    "orca-oracle": "#4878a8",
    "orca-pow2": "#8a6fb0",
    "orca-max": "#c77d3a",
    "fastertransformer": "#8c8c8c",
    "paper": "#c9c9c9",
    "ours": "#2a7f62",
}


def panel(canvas: "Canvas", rows: int, columns: int, number: int, title: str) -> Any:
    """Add one of several panels to a canvas, numbered from 1."""
    axes: Any = canvas.add_subplot(rows, columns, number)
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return axes


def side_by_side(
    axes: Any,
    labels: Sequence[str],
    heights: Mapping[str, Sequence[float | None]],
    unit: str,
    form: str = "{:.3g}",
) -> None:
    """Draw groups of bars: per label one bar of each kind, with its value; None: no bar.

    `unit` labels the y axis; `form` formats the values.
    """
    width = 0.8 / len(heights)
    for number, (kind, values) in enumerate(heights.items()):
        places = [i + (number - (len(heights) - 1) / 2) * width for i in range(len(labels))]
        shown = [0.0 if value is None else value for value in values]
        labels_of_bars = ["" if value is None else form.format(value) for value in values]
        bars = axes.bar(places, shown, width * 0.95, label=kind, color=COLOURS.get(kind))
        axes.bar_label(bars, labels_of_bars, fontsize=7, padding=1)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel(unit, fontsize=8)
    if len(heights) > 1:
        axes.legend(fontsize=7, frameon=False)


def stacked(
    axes: Any,
    labels: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    colours: Sequence[str],
    unit: str,
) -> None:
    """Draw stacked bars, each part with its value if there is room. `unit` labels the y axis."""
    bottom = [0.0] * len(labels)
    for (part, values), colour in zip(parts.items(), colours, strict=True):
        bars = axes.bar(range(len(labels)), values, 0.7, bottom=bottom, label=part, color=colour)
        shown = [f"{v:.1f}" if v >= 4 else "" for v in values]
        axes.bar_label(bars, shown, label_type="center", fontsize=7)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    axes.set_xticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylabel(unit, fontsize=8)
    axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=4)
