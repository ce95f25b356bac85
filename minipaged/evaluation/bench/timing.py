"""Comparative timing: alternating rounds, and the median of each.

On a machine whose speed changes from minute to minute, absolute figures are not reliable. Compared
code therefore runs interleaved, A B C A B C ..., and only ratios within one run are reported.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, islice

import torch

from minipaged.models import packed

Work = Callable[[], object]
_SHORTEST = 2e-3  # minimum seconds of a measurement: the work is repeated until then
BYTES_TO_READ = 2**28  # more than fits in caches
MATRIX_SIZE = 1024


def median_seconds(
    works: Mapping[str, Work], device: torch.device, rounds: int = 11
) -> dict[str, float]:
    """Return the seconds per call of each, as the median of all rounds.

    On a GPU each is first recorded as a CUDA graph, so the time excludes launches by the host.
    """
    once = _on_gpu if device.type == "cuda" else _on_cpu
    # Launches, events and graphs belong to the current GPU.
    with torch.cuda.device_of(torch.empty(0, device=device)):
        prepared = {name: _prepare(work, device) for name, work in works.items()}
        repeats = {}
        for name, work in prepared.items():
            repeats[name] = max(1, round(_SHORTEST / max(once(work, 1), 1e-9)))
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in prepared.items():
                times[name].append(once(work, repeats[name]))
    return {name: statistics.median(of_one) for name, of_one in times.items()}


def in_turn(works: Sequence[Work], num_calls: int) -> Work:
    """Return a work that calls these in turn, so many calls altogether.

    If each has its own data, none finds it in a cache. A short work is also timed more exactly if a
    CUDA graph contains several calls of it.
    """
    calls = list(islice(cycle(works), num_calls))

    def call_all() -> None:
        for work in calls:
            work()

    return call_all


def _prepare(work: Work, device: torch.device) -> Work:
    work()  # compile kernels, warm up caches
    if device.type != "cuda":
        return work
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _on_cpu(work: Work, repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - begin) / repeats


def _on_gpu(work: Work, repeats: int) -> float:
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def copy_work(device: torch.device) -> tuple[Work, int]:
    """Return a large copy within the device's memory, and the bytes that it reads and writes."""
    numbers = 2**28 if device.type == "cuda" else 2**25  # 1 GiB, 128 MiB
    source = torch.ones(numbers, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.numel() * source.itemsize


class CPUSpeed:
    """The speed of a plain read and of a large matrix product, measured again and again."""

    def __init__(self, dtype: torch.dtype) -> None:
        numbers = torch.ones(BYTES_TO_READ // 4)
        matrix = torch.randn(MATRIX_SIZE, MATRIX_SIZE).to(dtype)
        self._works: dict[str, Work] = {"read": numbers.max, "plain": lambda: matrix @ matrix}
        for form in (packed.InOneDNN, packed.InFloat16):
            if packed.works(form, dtype):
                self._works[form.__name__] = partial(form(matrix, None).multiply, matrix)
        self._rounds: list[dict[str, float]] = []

    def measure(self) -> None:
        """Measure each once more."""
        self._rounds.append(median_seconds(self._works, torch.device("cpu"), rounds=1))

    def medians(self) -> tuple[float, float]:
        """Bytes per second, and operations per second of the fastest product, plain or packed."""
        read, *products = (statistics.median(r[name] for r in self._rounds) for name in self._works)
        return BYTES_TO_READ / read, 2 * MATRIX_SIZE**3 / min(products)
