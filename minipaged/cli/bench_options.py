"""What the commands of `minipaged bench` have in common: their options, and how they report."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    import torch
    from rich.table import Table

DType = Annotated[
    str, typer.Option(help="One of auto (bfloat16 on a GPU), float32, float16, bfloat16.")
]
Save = Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")]


def choose(device: str, dtype: str) -> tuple["torch.device", "torch.dtype", bool]:
    """Where, in which type, and whether that is a GPU."""
    import torch

    from minipaged.models.loader import choose_dtype
    from minipaged.utils.device import choose_device

    where = choose_device(device)
    return where, choose_dtype(dtype, torch.bfloat16, where), where.type == "cuda"


def report(
    rows: Sequence[Any],
    table: "Table",
    note: str,
    device: "torch.device | None",
    save: Path | None,
    as_json: bool,
) -> None:
    """Print the table, or the JSON; write the JSON to a file if asked to."""
    from minipaged.evaluation.bench.machine import describe_machine

    machine = describe_machine("cpu" if device is None else str(device))
    found = {"machine": machine, "note": note, "rows": [asdict(row) for row in rows]}
    text = json.dumps(found, default=str)
    if save is not None:
        save.write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(text)
    else:
        Console(width=max(150, Console().width)).print(
            note, table, machine, sep="\n\n", highlight=False
        )
