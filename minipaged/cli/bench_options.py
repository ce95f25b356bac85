"""Shared by the commands of `minipaged bench`: options, reports, the line about the machine."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from minipaged import __version__
from minipaged.errors import InvalidOption

if TYPE_CHECKING:
    import torch
    from rich.table import Table

DType = Annotated[
    str, typer.Option(help="One of auto (bfloat16 on a GPU), float32, float16, bfloat16.")
]
Save = Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")]


def choose(device: str, dtype: str) -> tuple["torch.device", "torch.dtype", bool]:
    """The device, the data type, and whether the device is a GPU."""
    import torch

    from minipaged.models.loader import choose_dtype
    from minipaged.utils.device import choose_device

    where = choose_device(device)
    return where, choose_dtype(dtype, torch.bfloat16, where), where.type == "cuda"


def require_triton() -> None:
    """Raise InvalidOption if Triton is not installed."""
    if find_spec("triton") is None:
        raise InvalidOption('the package "triton" is not installed; it is available on Linux only.')


def choose_context(asked: int | None, longest: int, default: int) -> int:
    """Context tokens per sequence. Raises InvalidOption if the model supports fewer."""
    if asked is not None and asked > longest:
        raise InvalidOption(f"context_len is {asked}, above this model's {longest}: lower it.")
    return asked or min(longest, default)


def report(
    rows: Sequence[Any],
    table: "Table",
    note: str,
    device: "torch.device | None",
    save: Path | None,
    as_json: bool,
) -> None:
    """Print the table, or the JSON; write the JSON to a file if asked to."""
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


def describe_machine(device: str) -> str:
    """One line: processor, versions, date."""
    import torch

    if device.startswith("cuda"):
        chip = torch.cuda.get_device_name(device)
    else:
        chip = f"{_cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    return (
        f"{chip}; minipaged {__version__}, torch {torch.__version__}, {_triton_version()}, "
        f"Python {platform.python_version()}; {date.today().isoformat()}"
    )


def _triton_version() -> str:
    try:
        return f"triton {version('triton')}"
    except PackageNotFoundError:
        return "no triton"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
