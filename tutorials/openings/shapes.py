"""The few shapes of the openings, as SVG: boxes, rows of slots, arrows and labels.

All openings have one width, two sizes of text and one rounding. The owners A, B and C have the
colours that they have in drawing.py. Text outside of coloured boxes has the colour of the page that
contains the picture. A file that is shown on its own has a ground instead: see `Picture.svg`.
"""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 480, 240
NORMAL, SMALL = 16, 14  # sizes of text: 12 and 10.5 pixels if a phone gives a picture 360
GREY = "#808080"
OWNERS = {  # of Okabe and Ito
    "A": "#0072B2", "B": "#E69F00", "C": "#009E73", "D": "#CC79A7", "E": "#56B4E9",
}  # fmt: skip
SHARED = "#BBBBBB"  # what has several owners, or none
INK = {"#0072B2": "#fff"}  # of text on a coloured box: black on all colours but this one
STYLE = (
    "<style>svg{color:#1f2328}"
    "@media (prefers-color-scheme:dark){svg{color:#dfe3e8}.ground rect{fill:#14171c}}</style>"
)


class Picture:
    """An opening while it is drawn. Positions are from the top left corner."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def label(
        self, x: float, y: float, text: str, anchor: str = "middle", size: int = NORMAL,
        ink: str = "",
    ) -> None:  # fmt: skip
        """Text whose middle is at the height y. `anchor` is start, middle or end."""
        style = f' fill="{ink}"' if ink else ""
        style += "" if anchor == "middle" else f' text-anchor="{anchor}"'
        style += "" if size == NORMAL else f' font-size="{size}"'
        self.parts.append(
            f'<text x="{x:g}" y="{y + 0.35 * size:g}"{style}>{escape(text, quote=False)}</text>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, text: str = "", fill: str = "none",
        size: int = NORMAL, dashed: bool = False,
    ) -> None:  # fmt: skip
        """A rounded box with text in its middle. `fill` is an owner, a colour or "none"."""
        fill = OWNERS.get(fill, fill)
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" '
            f'stroke="{GREY}" fill="{fill}"{dash}/>'
        )
        if text:
            ink = "" if fill == "none" else INK.get(fill, "#000")
            self.label(x + width / 2, y + height / 2, text, size=size, ink=ink)

    def slots(
        self, x: float, y: float, owners: Sequence[str], width: float = 28, height: float = 28,
        texts: Sequence[str] = (), size: int = SMALL,
    ) -> None:  # fmt: skip
        """A row of slots, each with its owner or colour, and with its text. "." is an empty one."""
        for index, owner in enumerate(owners):
            text = texts[index].strip(".") if index < len(texts) else ""
            fill = "none" if owner == "." else owner
            self.box(x + index * width, y, width, height, text, fill, size)

    def arrow(self, *points: tuple[float, float], both: bool = False, dashed: bool = False) -> None:
        """A line through the points, with a head at the last one (and, with `both`, the first)."""
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(f'<path d="{path}" fill="none" stroke="currentColor"{dash}/>')
        self._head(points[-2], points[-1])
        if both:
            self._head(points[1], points[0])

    def _head(self, start: tuple[float, float], tip: tuple[float, float]) -> None:
        angle = math.atan2(tip[1] - start[1], tip[0] - start[0])
        sides = [
            f"{tip[0] - 9 * math.cos(angle + turn):.1f} {tip[1] - 9 * math.sin(angle + turn):.1f}"
            for turn in (0.4, -0.4)
        ]
        path = f"M{tip[0]:g} {tip[1]:g}L{sides[0]}L{sides[1]}Z"
        self.parts.append(f'<path d="{path}" fill="currentColor"/>')

    def svg(self, name: str, title: str, description: str) -> str:
        """The file. A page that contains the picture leaves the group `ground` out: the text then
        has the page's own colour.
        """
        settings = {
            "viewBox": f"0 0 {WIDTH} {HEIGHT}", "width": "720", "height": "360", "role": "img",
            "aria-labelledby": f"{name}-title {name}-desc", "fill": "currentColor",
            "stroke-width": "1.5", "text-anchor": "middle", "font-family": "system-ui,sans-serif",
            "font-size": str(NORMAL),
        }  # fmt: skip
        root = "".join(f' {key}="{value}"' for key, value in settings.items())
        ground = f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg"{root}>',
            f'<title id="{name}-title">{escape(title, quote=False)}</title>',
            f'<desc id="{name}-desc">{escape(description, quote=False)}</desc>',
            f'<g class="ground">{STYLE}{ground}</g>',
            *self.parts,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"
