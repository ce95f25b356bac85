"""Stage "counters": what limits each kernel, from the GPU's hardware counters, by Nsight Compute.

`ncu` runs this module as a program and measures its kernels. A container or an administrator may
have left it out or not permit it: then a row contains the reason.
"""

import csv
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from minipaged.attention.backend import choose_backend
from minipaged.evaluation.bench.cases import Case, make_inputs
from minipaged.evaluation.bench.gpu.attention import TINY
from minipaged.evaluation.bench.gpu.stage import Part, Setup
from minipaged.evaluation.bench.kernel import LLAMA_3_8B

PLACES = ("usr/local/cuda*/bin/ncu", "opt/nvidia/nsight-compute/*/ncu")  # besides the PATH
SECONDS = 40.0  # after which ncu is ended
CASES = {
    "decode": Case(LLAMA_3_8B, 64, 4096),
    "decode, int8": Case(LLAMA_3_8B, 64, 4096, kv_dtype="int8"),
    "prefill": Case(LLAMA_3_8B, 1, 4096, queries=4096),
}
TINY_CASES = {"decode": Case(TINY, 1, 16), "prefill": Case(TINY, 1, 16, queries=16)}
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "SchedulerStats", "Occupancy", "LaunchStats")
METRICS = (  # of these sections
    "Duration",
    "DRAM Throughput",
    "Memory Throughput",
    "Compute (SM) Throughput",
    "L2 Hit Rate",
    "Issued Warp Per Scheduler",
    "No Eligible",
    "Registers Per Thread",
    "Theoretical Occupancy",
    "Achieved Occupancy",
)


@dataclass(frozen=True)
class Counter:
    """A figure of one launch of a kernel."""

    kernel: str
    metric: str
    value: str
    unit: str


def parts(setup: Setup) -> list[Part]:
    """The parts of this stage."""
    names = TINY_CASES if setup.is_dry else CASES
    return [Part(name, partial(_measure, setup, name)) for name in names]


def launch(setup: Setup, name: str) -> None:
    """Launch the kernels of a case once: the program that `ncu` measures."""
    case = (TINY_CASES if setup.is_dry else CASES)[name]
    inputs = make_inputs(case, setup.device, setup.dtype)
    backend = choose_backend("triton", setup.device, case.heads.head_dim, case.kv_dtype)
    pools = inputs.k_cache, inputs.v_cache
    backend.paged_attention(inputs.q, *pools, inputs.batch, inputs.scale)
    if setup.device.type == "cuda":
        torch.cuda.synchronize(setup.device)


def _measure(setup: Setup, name: str) -> Iterator[Counter]:
    launch(setup, name)  # compiles; ncu's own time is short
    ncu = _find_ncu()
    if ncu is None:
        yield Counter(name, "not measured", "ncu is not installed", "")
        return
    sections = [argument for section in SECTIONS for argument in ("--section", section)]
    kernels = ["--kernel-name", "regex:decode_kernel|prefill_kernel"]
    command = [ncu, "--csv", "--clock-control", "none", *kernels, *sections]
    command += [sys.executable, "-m", __name__, name, "dry" if setup.is_dry else "gpu"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    found = list(read_counters(run.stdout))
    yield from found
    if not found:  # its last words are the reason, such as ERR_NVGPUCTRPERM: not permitted
        lines = (run.stdout + run.stderr).strip().splitlines() or ["ncu printed nothing"]
        yield Counter(name, "not measured", " ".join(lines[-2:]), f"exit code {run.returncode}")


def _find_ncu() -> str | None:
    installed = [str(path) for place in PLACES for path in sorted(Path("/").glob(place))]
    return shutil.which("ncu") or next(iter(installed), None)


def read_counters(printed: str) -> Iterator[Counter]:
    """The counters in ncu's CSV, which is surrounded by other lines."""
    lines = [line for line in printed.splitlines() if line.startswith('"')]
    for row in csv.DictReader(lines):
        if row.get("Metric Name") in METRICS:
            kernel, _, _ = row["Kernel Name"].partition("(")
            yield Counter(kernel, row["Metric Name"], row["Metric Value"], row["Metric Unit"])


if __name__ == "__main__":
    launch(Setup.here(is_dry=sys.argv[2] == "dry"), sys.argv[1])
