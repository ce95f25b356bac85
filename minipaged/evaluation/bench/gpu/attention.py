"""Stages "decode" and "prefill": our kernels with several tiles, and SDPA over contiguous keys.

Each result is checked against float64 before it is timed (`kernel.measure_case`).
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from minipaged.attention.triton.decode import decode
from minipaged.attention.triton.prefill import prefill
from minipaged.attention.triton.shapes import TileShape, TileShapes
from minipaged.evaluation.bench.cases import Case, Heads, Inputs, make_inputs
from minipaged.evaluation.bench.gpu.stage import Part, Setup
from minipaged.evaluation.bench.kernel import (
    LLAMA_3_8B,
    OPT_13B,
    Attend,
    Row,
    WrongResult,
    backends_as_candidates,
    check,
    measure_case,
)

Tile = TileShape | TileShapes  # of decode, or of prefill

TINY = Heads("tiny, 2/1 x 32", 2, 1, 32)

DECODE_CASES = [  # the most important first: a stage may run out of time
    Case(LLAMA_3_8B, 64, 1024),
    Case(LLAMA_3_8B, 64, 8192),
    Case(LLAMA_3_8B, 1, 32768),
    Case(LLAMA_3_8B, 64, 4096, kv_dtype="int8"),
    Case(LLAMA_3_8B, 64, 4096, kv_dtype="fp8"),
    Case(LLAMA_3_8B, 64, 4096),
    Case(OPT_13B, 64, 1024),
    Case(LLAMA_3_8B, 4, 32768),
    Case(LLAMA_3_8B, 64, 32768, short=1024),
    Case(LLAMA_3_8B, 256, 1024),
    Case(LLAMA_3_8B, 128, 4096),
    Case(OPT_13B, 64, 8192),
]
PREFILL_CASES = [
    Case(LLAMA_3_8B, 1, 4096, queries=4096),
    Case(OPT_13B, 1, 4096, queries=4096),
    Case(LLAMA_3_8B, 1, 16384, queries=16384),
    Case(LLAMA_3_8B, 1, 4096, queries=4096, kv_dtype="int8"),
    Case(LLAMA_3_8B, 1, 4096, queries=4096, kv_dtype="fp8"),
    Case(LLAMA_3_8B, 8, 1024, queries=1024),
    Case(LLAMA_3_8B, 1, 4096, queries=512),
]
TINY_CASES = [
    Case(TINY, 1, 272),  # in two splits
    Case(TINY, 2, 32, kv_dtype="int8"),
    Case(TINY, 2, 32, kv_dtype="fp8"),
    Case(TINY, 2, 48, short=16),
    Case(TINY, 1, 32, queries=32),
    Case(TINY, 1, 32, queries=16),
]
# Alternatives to the shipped tiles: positions, warps, stages; for prefill also rows, first.
DECODE_TILES = [TileShape(64, 4, 3), TileShape(32, 4, 4), TileShape(64, 4, 5), TileShape(64, 8, 3)]
DECODE_TILES_8_BITS = [TileShape(64, 4, 4), TileShape(64, 2, 4), TileShape(128, 4, 3)]
PREFILL_TILES = [
    TileShapes(128, 64, 8, 2),
    TileShapes(128, 64, 8, 3),
    TileShapes(64, 64, 4, 3),
    TileShapes(128, 128, 8, 2),
]
TINY_TILES = [TileShape(16, 4, 2), TileShapes(16, 16, 4, 2)]


def cases(setup: Setup) -> list[Case]:
    """The cases of both stages."""
    return TINY_CASES if setup.is_dry else [*DECODE_CASES, *PREFILL_CASES]


def tiles(setup: Setup, case: Case) -> list[Tile]:
    """The alternatives that are measured in this case."""
    of_case = TileShape if case.queries == 1 else TileShapes
    alternatives: list[Tile] = [*PREFILL_TILES]
    alternatives += DECODE_TILES if case.kv_dtype == "auto" else DECODE_TILES_8_BITS
    return [
        each for each in (TINY_TILES if setup.is_dry else alternatives) if type(each) is of_case
    ]


def decode_parts(setup: Setup) -> list[Part]:
    """The parts of stage "decode"."""
    return [_part(setup, case) for case in cases(setup) if case.queries == 1]


def prefill_parts(setup: Setup) -> list[Part]:
    """The parts of stage "prefill"."""
    return [_part(setup, case) for case in cases(setup) if case.queries > 1]


def _part(setup: Setup, case: Case) -> Part:
    name = f"{case.heads.name}, {case.num_seqs} x {case.lengths}, {case.kv_dtype}"
    return Part(name, partial(_measure, setup, case))


def _measure(setup: Setup, case: Case) -> Iterator[Row]:
    name = setup.kernel(case.heads.head_dim, case.kv_dtype)
    shipped = backends_as_candidates([name], case, setup.device, setup.dtype)
    others = tiles(setup, case) if name == "triton" else []
    usable, failures = _try(setup, case, others)

    def candidates(inputs: Inputs) -> dict[str, Attend]:
        return shipped(inputs) | {_name(tile): _with(tile, inputs) for tile in usable}

    yield from measure_case(
        case,
        candidates,
        setup.device,
        setup.dtype,
        setup.rounds,
        num_pools=2 if setup.is_dry else None,
        by_name=True,
    )
    if failures:
        raise WrongResult("; ".join(failures))  # now that the others are measured


def _try(setup: Setup, case: Case, tiles: list[Tile]) -> tuple[list[Tile], list[str]]:
    """The tiles with right results, and the failures of others; too large is not a failure."""
    from triton.runtime.errors import OutOfResources

    inputs = make_inputs(case, setup.device, setup.dtype)
    usable: list[Tile] = []
    failures: list[str] = []
    for tile in tiles:
        try:
            check(case, inputs, {_name(tile): _with(tile, inputs)}, setup.dtype)
            usable.append(tile)
        except OutOfResources:
            continue
        except (WrongResult, RuntimeError) as error:  # wrong, or the compiler refuses it
            failures.append(f"{_name(tile)}: {error}")
    return usable, failures


def _name(tile: Tile) -> str:
    return f"triton {tile}"


def _with(tile: Tile, inputs: Inputs) -> Attend:
    pools, batch, scale = (inputs.k_cache, inputs.v_cache), inputs.batch, inputs.scale
    out = torch.full_like(inputs.q, torch.nan)  # a row that is not written is found to be wrong

    def attend() -> Tensor:
        if isinstance(tile, TileShape):
            decode(inputs.q, *pools, batch, scale, out, shape=tile)
        else:
            prefill(inputs.q, *pools, batch, scale, out, tile)
        return out

    return attend
