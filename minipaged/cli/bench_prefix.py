"""`minipaged bench prefix`: decode with shared prefixes, read once per owner or once per block."""

from typing import Annotated

import typer

from minipaged.cli.bench_options import Save, choose, report
from minipaged.cli.options import AsJson


def prefix(
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    steps: Annotated[
        bool, typer.Option("--steps", help="Also measure whole forward passes of a model.")
    ] = False,
    save: Save = None,
    as_json: AsJson = False,
) -> None:
    """Compare ways to read shared prefixes in decode, on a CPU."""
    from minipaged.evaluation.bench import prefix as prefixes

    _, chosen, _ = choose("cpu", dtype)
    rows = list(prefixes.measure_attention(chosen))
    if steps:
        rows += prefixes.measure_steps(chosen)
    report(rows, prefixes.as_table(rows), prefixes.describe(chosen), None, save, as_json)
