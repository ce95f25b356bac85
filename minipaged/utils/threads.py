"""How many threads a CPU uses, and how they wait: chosen once, before torch is imported.

PyTorch divides an operation among the threads of OpenMP. Between two operations these threads wait,
either asleep or spinning, that is, testing in a loop whether there is work. To wake one takes some
fifty microseconds, and a decode step has hundreds of operations, so on an idle machine spinning is
faster. But a thread that spins takes the core from those that have work. On a busy machine, a step
with threads that spin without end takes several times as long.

    idle machine    spin for about the time between two operations of a step, then sleep
    busy machine    sleep at once

OpenMP reads its settings when torch is imported, so they are environment variables, set when
`minipaged` is imported. Whatever is set already stays: OMP_NUM_THREADS, and the three of `WAITING`.
If torch was imported first, nothing is set.
"""

import os
import sys
from math import ceil, inf
from pathlib import Path, PurePosixPath

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""The variables that decide how threads wait: OpenMP's, and those of GCC's and LLVM's runtimes."""

# Turns of the loop, of GCC's runtime, which PyTorch uses on Linux: about 0.1 ms.
TURNS = 10_000
# Load per core, averaged over a minute, below which the machine is idle.
IDLE_BELOW = 0.25

CHOSEN: dict[str, str] = {}
"""The environment variables that were set here."""


def choose_threads() -> None:
    """Set the environment variables, unless torch has been imported."""
    if "torch" in sys.modules:
        return
    if not any(name in os.environ for name in WAITING):
        CHOSEN["OMP_WAIT_POLICY"] = "PASSIVE"
        if is_idle():
            CHOSEN["GOMP_SPINCOUNT"] = str(TURNS)
    # OpenMP starts a thread per core, also where a container may use the time of fewer.
    quota = cpu_quota()
    if "OMP_NUM_THREADS" not in os.environ and quota < usable_cores():
        CHOSEN["OMP_NUM_THREADS"] = str(max(1, ceil(quota)))
    os.environ.update(CHOSEN)


def usable_cores() -> int:
    """The number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_idle() -> bool:
    """Whether few processes of this machine have been running during the last minute."""
    try:
        return os.getloadavg()[0] < IDLE_BELOW * usable_cores()
    except (AttributeError, OSError):  # Windows has none
        return False


def cpu_quota(root: Path = Path("/")) -> float:
    """The number of cores whose time Linux grants this process; inf without a limit.

    A container's limit is in `cpu.max` of its control group, or of a group above: microseconds of
    processor time, and the period that they are granted for.
    """
    groups = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        [path] = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    except (OSError, ValueError):  # another system, or only groups of an older kind
        return inf
    quotas: list[float] = []
    for group in (path, *map(str, PurePosixPath(path).parents)):
        try:
            granted, period = (groups / group / "cpu.max").read_text().split()
            quotas.append(int(granted) / int(period))
        except (OSError, ValueError):  # no such file, or "max"
            pass
    return min(quotas, default=inf)


def describe_waiting() -> str:
    """How idle threads wait in this process, for the caption of a measurement."""
    given = [f"{name}={os.environ[name]}" for name in WAITING if name in os.environ]
    return ", ".join(given) or "the default of OpenMP"
