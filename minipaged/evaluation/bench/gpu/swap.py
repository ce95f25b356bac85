"""Stage "swap": blocks that move to host memory and back, next to plain copies over the bus."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from minipaged.attention.backend import choose_backend
from minipaged.attention.kv_cache import KVCache, bytes_per_block, choose_kv_dtype
from minipaged.evaluation.bench import decode_step
from minipaged.evaluation.bench.gpu.stage import Part, Setup
from minipaged.evaluation.bench.kernel import WrongResult
from minipaged.evaluation.bench.timing import median_seconds

BLOCK_SIZE = 16
LLAMA_3_8B = replace(decode_step.ONE_BILLION, num_layers=32, head_dim=128)
TINY = replace(decode_step.TINY, head_dim=32)
HOST = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """One way to move blocks in one direction."""

    direction: str
    by: str
    kv_dtype: str
    num_blocks: int
    seconds: float
    gigabytes_per_second: float


def parts(setup: Setup) -> list[Part]:
    """The parts of this stage."""
    swaps = [
        Part(f"{backend}, {kv_dtype}", partial(_measure_swap, setup, backend, kv_dtype))
        for kv_dtype in ("auto", "int8", "fp8")
        for backend in ("triton", "torch")
    ]
    return [Part("plain copies", partial(_measure_bus, setup)), *swaps]


def _timed(setup: Setup, work: Callable[[], object]) -> float:
    """Seconds of a work that the GPU finishes, by the host's clock."""

    def finished() -> None:
        work()
        if setup.device.type == "cuda":
            torch.cuda.synchronize(setup.device)

    return median_seconds({"": finished}, HOST, setup.rounds)[""]


def _measure_bus(setup: Setup) -> Iterator[Row]:
    on_gpu = setup.device.type == "cuda"
    size = 2**30 if on_gpu else 2**20
    here = torch.zeros(size, dtype=torch.int8, pin_memory=on_gpu)
    there = torch.zeros(size, dtype=torch.int8, device=setup.device)
    for direction, target, source in (("out", here, there), ("in", there, here)):
        seconds = _timed(setup, partial(target.copy_, source, non_blocking=True))
        yield Row(direction, "a plain copy", "", 0, seconds, 1e-9 * size / seconds)


def _measure_swap(setup: Setup, backend_name: str, kv_dtype: str) -> Iterator[Row]:
    config, num_blocks = (TINY, 4) if setup.is_dry else (LLAMA_3_8B, 256)
    backend = choose_backend(backend_name, setup.device, config.head_dim)
    dtype = choose_kv_dtype(kv_dtype, setup.dtype)
    cache = KVCache(
        config,
        2 * num_blocks,
        BLOCK_SIZE,
        num_swap_blocks=num_blocks,
        dtype=dtype,
        device=setup.device,
        copy_blocks=backend.copy_blocks,
    )
    # Every second block, and in reverse order in host memory.
    pairs_out = [(2 * i, num_blocks - 1 - i) for i in range(num_blocks)]
    pairs_in = [(host, block) for block, host in pairs_out]
    _check(cache, pairs_out, pairs_in)
    moved = num_blocks * bytes_per_block(config, BLOCK_SIZE, dtype)
    works = {"out": partial(cache.swap_out, pairs_out), "in": partial(cache.swap_in, pairs_in)}
    for direction, work in works.items():
        seconds = _timed(setup, work)
        speed = 1e-9 * moved / seconds
        yield Row(direction, backend_name, kv_dtype, num_blocks, seconds, speed)


def _check(
    cache: KVCache, pairs_out: list[tuple[int, int]], pairs_in: list[tuple[int, int]]
) -> None:
    """Check that blocks return as they were. Raises WrongResult."""
    blocks = [block for block, _ in pairs_out]

    def keys() -> list[Tensor]:
        return [cache.layers[i][0][blocks].float() for i in (0, len(cache.layers) - 1)]

    for k_cache, _ in cache.layers:
        new = torch.randn(len(blocks), *k_cache.shape[1:], device=cache.device)
        k_cache[blocks] = new.to(k_cache.dtype)
    before = keys()
    cache.swap_out(pairs_out)
    cache.clear(blocks)  # at once: other sequences may own them now
    cache.swap_in(pairs_in)
    if not all(torch.equal(old, new) for old, new in zip(before, keys(), strict=True)):
        raise WrongResult("blocks that were swapped out and in again have changed.")
