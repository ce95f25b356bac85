"""Stage "machine": versions, and the two ceilings that all other figures are compared with.

A kernel that moves bytes cannot be faster than a large copy, and one that multiplies not faster
than a large matrix product, on this GPU as it is. Datasheets give higher figures.
"""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch

from minipaged import __version__
from minipaged.evaluation.bench.gpu.stage import Part, Setup
from minipaged.evaluation.bench.timing import Work, copy_work, median_seconds


@dataclass(frozen=True)
class Fact:
    """A property of the machine, or a rate that it reaches."""

    what: str
    value: str | float
    unit: str = ""


def parts(setup: Setup) -> list[Part]:
    """The parts of this stage."""
    return [
        Part("versions", _versions),
        Part("device", partial(_device, setup)),
        Part("memory", partial(_memory, setup)),
        Part("matrix product", partial(_matrix_product, setup)),
    ]


def _versions() -> Iterator[Fact]:
    yield Fact("minipaged", __version__)
    yield Fact("Python", platform.python_version())
    yield Fact("torch", torch.__version__)
    yield Fact("CUDA", torch.version.cuda or "none")
    for package in ("triton", "numpy"):
        try:
            yield Fact(package, version(package))
        except PackageNotFoundError:
            yield Fact(package, "none")


def _device(setup: Setup) -> Iterator[Fact]:
    yield Fact("CPU cores", float(os.cpu_count() or 0))
    if setup.device.type != "cuda":
        yield Fact("device", platform.processor() or platform.machine())
        return
    properties = torch.cuda.get_device_properties(setup.device)
    yield Fact("device", properties.name)
    yield Fact("compute capability", f"{properties.major}.{properties.minor}")
    yield Fact("multiprocessors", float(properties.multi_processor_count))
    yield Fact("memory", properties.total_memory / 1e9, "GB")
    yield Fact("L2 cache", properties.L2_cache_size / 1e6, "MB")
    yield Fact("cuDNN", str(torch.backends.cudnn.version()))


def _memory(setup: Setup) -> Iterator[Fact]:
    copy, copied = copy_work(setup.device)
    numbers = torch.randn(copied // 8, device=setup.device)  # as many bytes as the copy reads
    works: dict[str, Work] = {"copy": copy, "sum": numbers.sum}
    seconds = median_seconds(works, setup.device, setup.rounds)
    yield Fact("copy, bytes read and written", 1e-12 * copied / seconds["copy"], "TB/s")
    read = numbers.numel() * numbers.itemsize
    yield Fact("sum, bytes read", 1e-12 * read / seconds["sum"], "TB/s")


def _matrix_product(setup: Setup) -> Iterator[Fact]:
    size = 256 if setup.is_dry else 8192
    a, b = torch.randn(2, size, size, device=setup.device).to(setup.dtype)  # random: zeros are fast
    out = torch.empty_like(a)
    works: dict[str, Work] = {"product": partial(torch.mm, a, b, out=out)}
    seconds = median_seconds(works, setup.device, setup.rounds)["product"]
    name = str(setup.dtype).removeprefix("torch.")
    yield Fact(f"{name} product of {size:,} x {size:,}", 2e-12 * size**3 / seconds, "TFLOP/s")
