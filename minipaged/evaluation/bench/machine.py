"""On what a benchmark ran: a figure without it means little."""

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from minipaged import __version__


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
