"""Stage "compile": every kernel that the other stages launch, compiled by many processes at once.

A launch that finds its kernel in Triton's cache does not compile it. The compiler needs no GPU, so
this stage is the same without one. Run as a program, this module is one of the processes.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch

from minipaged.attention.triton.shapes import TileShape, TileShapes
from minipaged.evaluation.bench import decode_step
from minipaged.evaluation.bench.asked_process import AskedProcess, ProcessEnded, answer
from minipaged.evaluation.bench.cases import Case, Heads
from minipaged.evaluation.bench.gpu import attention, correctness
from minipaged.evaluation.bench.gpu.stage import Part, Setup

HOPPER = 90  # what a dry run compiles for


class Job(NamedTuple):
    """What `compile.compile_all` is asked for, in values that JSON has."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    kv_dtype: str
    tile: TileShape | None = None  # of decode
    tiles: TileShapes | None = None  # of prefill


def parts(setup: Setup) -> list[Part]:
    """The parts of this stage: one, so that all processes work all the time."""
    return [Part("all kernels", partial(_compile_all, setup))]


def jobs(setup: Setup) -> list[Job]:
    """All kernels for the heads and types of the other stages, and their other tiles."""
    if setup.is_dry:
        return [Job(2, 1, 32, "float16", "auto")]
    step = decode_step.ONE_BILLION
    found = [Job(step.num_heads, step.num_kv_heads, step.head_dim, "bfloat16", "auto")]
    found.append(_job(Case(correctness.GRAPH_HEADS, 1, 16), torch.float32))
    for head_dim in correctness.MIXED_HEAD_DIMS:
        found.append(_job(Case(Heads("", 4, 2, head_dim), 1, 16), setup.dtype))
    found += [_job(case, dtype) for dtype, case in correctness.typed_cases(setup)]
    found += [_job(case, setup.dtype) for case in attention.cases(setup)]
    tiles: dict[Job, dict[attention.Tile, None]] = {}
    for case in attention.cases(setup):
        of_heads = tiles.setdefault(_job(case, setup.dtype), {})
        of_heads.update(dict.fromkeys(attention.tiles(setup, case)))
    for job, of_heads in tiles.items():
        # A job compiles all kernels, with one tile for decode and one for prefill.
        decodes = [tile for tile in of_heads if isinstance(tile, TileShape)]
        prefills = [tile for tile in of_heads if isinstance(tile, TileShapes)]
        for tile, of_prefill in zip_longest(decodes, prefills):
            found.append(job._replace(tile=tile, tiles=of_prefill))
    return list(dict.fromkeys(found))


def _job(case: Case, dtype: torch.dtype) -> Job:
    heads = case.heads
    name = str(dtype).removeprefix("torch.")
    return Job(heads.heads, heads.kv_heads, heads.head_dim, name, case.kv_dtype)


def _compile_all(setup: Setup) -> Iterator[dict[str, Any]]:
    sm = HOPPER
    if setup.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(setup.device)
        sm = 10 * major + minor
    todo = jobs(setup)
    num_processes = min(os.cpu_count() or 1, len(todo))
    shares = [todo[i::num_processes] for i in range(num_processes)]
    with ThreadPoolExecutor(num_processes) as threads:
        rows = [row for share in threads.map(partial(_in_a_process, sm), shares) for row in share]
    unique = {json.dumps(row): row for row in rows}
    yield from unique.values()


def _in_a_process(sm: int, share: list[Job]) -> list[dict[str, Any]]:
    try:
        with AskedProcess(__name__, {}, {"TRITON_INTERPRET": "0"}) as process:
            return process.ask("compile_jobs", sm=sm, todo=share)
    except ProcessEnded as error:  # the compiler has crashed: others continue
        return [_failed(job, error) for job in share]


def compile_jobs(sm: int, todo: list[list[Any]]) -> list[dict[str, Any]]:
    """Compile for this GPU, in a process that compiles kernels.

    Returns a row for each kernel that multiplies matrices, and for any that spills.
    """
    rows: list[dict[str, Any]] = []
    for values in todo:
        job = Job(*values)
        try:
            rows += _compile(sm, job)
        except Exception as error:  # of one tile: the others are to be compiled
            rows.append(_failed(job, error))
    return rows


def _failed(job: Job, error: Exception) -> dict[str, Any]:
    return {
        "kernel": f"not compiled: {error}",
        "heads": f"{job.heads}/{job.kv_heads} x {job.head_dim}",
        "dtype": job.dtype,
        "kv_dtype": job.kv_dtype,
        "tile": str(job[5:]),
    }


def _compile(sm: int, job: Job) -> Iterator[dict[str, Any]]:
    from minipaged.evaluation.bench.compile import SMS, compile_all
    from minipaged.evaluation.bench.launches import Setting

    heads = job.heads, job.kv_heads, job.head_dim
    setting = Setting(*heads, getattr(torch, job.dtype), job.kv_dtype)
    tile, tiles = job.tile and TileShape(*job.tile), job.tiles and TileShapes(*job.tiles)
    for row in compile_all([setting], [sm], tile, tiles):
        if row.instructions == "-" and row.stack_bytes == 0:
            continue
        chosen = tiles if row.kernel == "prefill" else tile
        name = str(chosen or "shipped")
        yield {**asdict(row), "tile": name, "programs": row.programs if sm in SMS else None}


if __name__ == "__main__":
    answer({"compile_jobs": compile_jobs})
