"""Finds the fastest tiles, warps and stages on this GPU: the source of the shipped choices.

An autotuner would do the same at run time, but in every process again, and not inside a CUDA graph.
The sweep is therefore run once, and its results are in `choose_tile` and
`choose_tiles`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from rich.table import Table

from minipaged.attention.triton.decode import count_places, decode
from minipaged.attention.triton.launch import pointers, pool_constants
from minipaged.attention.triton.machine import has_large_sms
from minipaged.attention.triton.prefill import prefill
from minipaged.attention.triton.shapes import TileShape, TileShapes, choose_tile, choose_tiles
from minipaged.attention.triton.splits import splits_to_fill
from minipaged.evaluation.bench.cases import Case, Inputs, make_inputs
from minipaged.evaluation.bench.kernel import LLAMA_3_8B, OPT_13B
from minipaged.evaluation.bench.timing import Work, median_seconds

CASES = [
    Case(LLAMA_3_8B, 64, 4096),
    Case(LLAMA_3_8B, 4, 32768),
    Case(LLAMA_3_8B, 64, 4096, kv_dtype="int8"),
    Case(LLAMA_3_8B, 64, 32768, short=1024),
    Case(OPT_13B, 64, 2048),
    Case(LLAMA_3_8B, 1, 4096, queries=4096),
    Case(LLAMA_3_8B, 1, 4096, queries=4096, kv_dtype="int8"),
    Case(OPT_13B, 1, 4096, queries=4096),
]
DECODE_SHAPES = [TileShape(*shape) for shape in product((32, 64, 128), (2, 4, 8), (3, 4))]
PREFILL_SHAPES = [
    TileShapes(*shapes) for shapes in product((64, 128), (32, 64, 128), (4, 8), (2, 3))
]


@dataclass(frozen=True)
class Row:
    """One choice in one case, with the time of the shipped choice in the same rounds."""

    case: Case
    choice: str
    seconds: float
    shipped_choice: str
    shipped_seconds: float


def sweep(
    cases: list[Case], device: torch.device, dtype: torch.dtype, rounds: int = 5
) -> Iterator[Row]:
    """Measure the choices of every case, the fastest first."""
    for case in cases:
        inputs = make_inputs(case, device, dtype)
        shipped, works = _decodes(inputs) if case.queries == 1 else _prefills(inputs)
        fitting = {name: work for name, work in works.items() if fits(work)}
        seconds = median_seconds(fitting, device, rounds)
        for name in sorted(fitting, key=lambda name: seconds[name]):
            yield Row(case, name, seconds[name], shipped, seconds[shipped])


def _decodes(inputs: Inputs) -> tuple[str, dict[str, Work]]:
    out = torch.empty_like(inputs.q)
    batch = inputs.batch
    kv_heads, width = inputs.k_cache.shape[1], pool_constants(inputs.k_cache)["WIDTH"]
    keys, *_ = pointers(inputs.k_cache, inputs.v_cache)
    bytes_each, large_sms = (inputs.q.itemsize, keys.itemsize), has_large_sms(inputs.q.device)
    shipped = choose_tile(inputs.q.shape[1] // kv_heads, width, *bytes_each, large_sms)
    works: dict[str, Work] = {}
    places = count_places(inputs.q, inputs.k_cache, inputs.v_cache, shipped)
    splits = splits_to_fill(batch.num_seqs, kv_heads, places)
    # Other shapes take other resources, so each gets the splits that fill the GPU for it.
    choices: list[tuple[TileShape, int | None]] = [(shape, None) for shape in DECODE_SHAPES]
    choices += [(shipped, None), (shipped, max(1, splits // 2)), (shipped, 2 * splits)]
    for shape, to_fill in dict.fromkeys(choices):
        works[_name(shape, to_fill)] = partial(
            decode,
            inputs.q,
            inputs.k_cache,
            inputs.v_cache,
            batch,
            inputs.scale,
            out,
            to_fill,
            shape,
        )
    return _name(shipped), works


def _prefills(inputs: Inputs) -> tuple[str, dict[str, Work]]:
    out = torch.empty_like(inputs.q)
    width = pool_constants(inputs.k_cache)["WIDTH"]
    shipped = choose_tiles(width, inputs.q.itemsize, has_large_sms(inputs.q.device))
    works: dict[str, Work] = {}
    for shapes in dict.fromkeys([*PREFILL_SHAPES, shipped]):
        works[_name(shapes)] = partial(
            prefill,
            inputs.q,
            inputs.k_cache,
            inputs.v_cache,
            inputs.batch,
            inputs.scale,
            out,
            shapes,
        )
    return _name(shipped), works


def _name(shape: TileShape | TileShapes, to_fill: int | None = None) -> str:
    parts = [f"{name} {value}" for name, value in shape._asdict().items() if value is not None]
    return ", ".join(parts if to_fill is None else [*parts, f"splits {to_fill}"])


def fits(work: Work) -> bool:
    """Whether a program's tiles fit on a multiprocessor."""
    from triton.runtime.errors import OutOfResources

    try:
        work()
    except OutOfResources:
        return False
    return True


def as_table(rows: list[Row], best: int = 5) -> Table:
    """The best choices of each case, and the shipped one."""
    table = Table(box=None, padding=(0, 2))
    for title in ("", "batch", "length", "kv", "choice"):
        table.add_column(title)
    for title in ("time", "x shipped"):
        table.add_column(title, justify="right")
    for case in dict.fromkeys(row.case for row in rows):
        of_case = [row for row in rows if row.case == case]
        shown = of_case[:best]
        shown += [row for row in of_case[best:] if row.choice == row.shipped_choice]
        for row in shown:
            mark = " (shipped)" if row.choice == row.shipped_choice else ""
            table.add_row(
                f"{case.name}, {case.heads.name}",
                str(case.num_seqs),
                case.lengths,
                case.kv_dtype,
                row.choice + mark,
                f"{1e6 * row.seconds:,.1f} us",
                f"{row.seconds / row.shipped_seconds:.2f}",
            )
    return table
