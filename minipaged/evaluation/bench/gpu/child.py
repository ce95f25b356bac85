"""The process that measures: it runs the parts that `run` asks for, one at a time.

A kernel that reads beyond its memory ends the GPU's context of its process for good. This process
then says so, and another one continues with the next part.
"""

import gc
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import import_module
from typing import Any

import torch

from minipaged.evaluation.bench.asked_process import answer
from minipaged.evaluation.bench.gpu.stage import Part, Setup, Stage


def answers(stages: Mapping[str, Stage], setup: Setup) -> dict[str, Callable[..., Any]]:
    """The requests that this process answers."""

    def parts(stage: str) -> list[str]:
        return [part.name for part in stages[stage].parts(setup)]

    def measure(stage: str, part: int) -> dict[str, Any]:
        return _measure(stages[stage].parts(setup)[part], setup.device)

    return {"parts": parts, "measure": measure}


def _measure(part: Part, device: torch.device) -> dict[str, Any]:
    """The part's rows, and the failure that ended it, if any."""
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {"rows": rows, "failure": None, "trace": None, "is_lost": False}
    try:
        for row in part.measure():
            rows.append(dict(row) if isinstance(row, Mapping) else asdict(row))
    except Exception as error:  # whatever it is: other parts are to be measured
        found["failure"] = f"{type(error).__name__}: {error}"
        found["trace"] = traceback.format_exc()
        found["is_lost"] = _is_lost(device)
    if not found["is_lost"]:
        _free_memory(device)
    return found


def _is_lost(device: torch.device) -> bool:
    """Whether this process can use the GPU no more."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    """Answer until the pipe closes."""
    options = json.loads(sys.argv[1])
    setup = Setup.here(options["is_dry"])
    if setup.is_dry:
        warnings.filterwarnings("ignore", message="no GPU")
    else:
        torch.cuda.set_device(setup.device)
    stages = import_module(options["stages"]).STAGES
    answer(answers({stage.name: stage for stage in stages}, setup))


if __name__ == "__main__":
    main()
