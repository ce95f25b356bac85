"""`minipaged paper fig2`: runs figures, prints the paper's numbers next to ours, saves both."""

import io
import json
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from minipaged.errors import InvalidOption
from minipaged.evaluation.paper.figure import FULL, QUICK, Figure, Result
from minipaged.utils.files import write_atomically

NAMES = "table1 fig1 fig2 fig3 fig12 fig13 fig14 fig15 fig16 fig17 fig18 fig19 vattention".split()


def paper(
    names: Annotated[list[str], typer.Argument(help=f"all, or any of {' '.join(NAMES)}.")],
    full: Annotated[
        bool, typer.Option("--full", help="Simulate up to an hour of requests.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Simulate minutes of requests. The default.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for results and pictures.")] = Path("paper"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, one object per line.")
    ] = False,
) -> None:
    """Reproduce figures of the paper and compare the numbers."""
    if full and quick:
        raise InvalidOption("--quick and --full exclude each other: give one of them.")
    figures = [_find(name) for name in (NAMES if names == ["all"] else names)]
    effort = FULL if full else QUICK
    out.mkdir(parents=True, exist_ok=True)
    console = Console(width=max(120, Console().width))
    draws = find_spec("matplotlib") is not None
    begin = time.perf_counter()
    verdicts: list[bool | None] = []
    for figure in figures:
        start = time.perf_counter()
        result = figure.run(effort)
        verdicts += [check.is_met for check in result.checks]
        saved = json.dumps({**result.as_dict(), "effort": effort.name})
        write_atomically(out / f"{figure.name}.json", f"{saved}\n")
        if draws:
            _draw(figure, result, out / f"{figure.name}.png")
        if as_json:
            print(json.dumps(result.as_dict()))
            continue
        seconds = time.perf_counter() - start
        console.print(
            f"{result.title} ({result.how}; {seconds:.1f} s)", result.as_table(), sep="\n"
        )
        for note in result.notes:
            console.print(note, highlight=False)
        console.print()
    if not as_json:
        met, missed = verdicts.count(True), verdicts.count(False)
        seconds = time.perf_counter() - begin
        console.print(
            f"{met} bars met, {missed} missed, {verdicts.count(None)} numbers without a bar; "
            f"{seconds:.0f} s. JSON{' and pictures' if draws else ''}: {out}/",
            highlight=False,
        )
        if not draws:
            console.print(
                "No pictures, because matplotlib is missing: pip install 'minipaged[plot]'."
            )


def _find(name: str) -> Figure:
    if name not in NAMES:
        raise InvalidOption(
            f"there is no figure {name!r}: choose all, or some of {', '.join(NAMES)}."
        )
    figure: Figure = import_module(f"minipaged.evaluation.paper.{name}").FIGURE
    return figure


def _draw(figure: Figure, result: Result, file: Path) -> None:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=figure.size, layout="constrained")
    canvas.suptitle(figure.title, fontsize=11)
    figure.draw(result, canvas)
    picture = io.BytesIO()
    canvas.savefig(picture, format="png", dpi=120)
    write_atomically(file, picture.getvalue())
