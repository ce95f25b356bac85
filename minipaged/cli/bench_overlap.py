"""`minipaged bench overlap`: decode steps with and without overlap, on a simulated device."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from minipaged.cli.bench_options import Save, report
from minipaged.cli.options import AsJson
from minipaged.errors import InvalidOption

PICTURES = (".png", ".svg", ".pdf")


def overlap(
    num_seqs: Annotated[int, typer.Option(help="Sequences to decode.", min=1)] = 64,
    context_len: Annotated[int, typer.Option(help="Context tokens per sequence.", min=1)] = 1024,
    rounds: Annotated[int, typer.Option(help="Runs per candidate, in turn.", min=1)] = 3,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the time lines of some steps to this file.")
    ] = None,
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """Compare steps with and without overlap.

    The device needs a fixed time per step, and the host's part is the real one.
    """
    from minipaged.evaluation.bench import overlap as ours

    if plot is not None and plot.suffix not in PICTURES:
        raise InvalidOption(f"--plot is {plot}: give a file that ends in {', '.join(PICTURES)}.")
    if plot is not None and find_spec("matplotlib") is None:
        raise InvalidOption("--plot draws with matplotlib: pip install 'minipaged[plot]'.")
    rows = list(ours.measure(num_seqs, context_len, rounds))
    if plot is not None:
        ours.plot(num_seqs, context_len, 0.002, plot)
    note = (
        f"Decode steps of {num_seqs} sequences of {context_len} tokens, on a simulated device that "
        "needs a fixed time per step; the host's part is the real one, the model is a stub. Both "
        "run in turn; medians of the time between two steps."
    )
    report(rows, ours.as_table(rows), note, None, save, as_json)
