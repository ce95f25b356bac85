"""Decode attention on a CPU, gathered and in place (`attention.torch_decode`), compared with SDPA.

SDPA gets contiguous keys and sequences of equal length, so the difference is the cost of paging.
The lengths of the paged sequences differ, as in real requests. Several layers are used in turn, so
that keys are read from memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from minipaged.attention.batch import Batch, BatchBuilder
from minipaged.attention.reference import reference_paged_attention
from minipaged.attention.torch_decode import Decodes, InPlace, Way
from minipaged.evaluation.bench.timing import Work, median_seconds
from minipaged.scheduler.output import SequenceInput

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 9, 3, 64, 16
CASES = [  # sequences, their mean length, the fraction in use of the blocks between first and last
    (batch, context, in_use) for batch in (1, 8, 32) for context in (128, 1024) for in_use in (1, 2)
]
BYTES_IN_TURN = 64 * 1024**2


@dataclass(frozen=True)
class Row:
    """One case."""

    num_seqs: int
    context_len: int  # of all sequences on average
    part_in_use: float  # of the blocks from the first to the last
    sdpa_seconds: float
    gathered_seconds: float
    in_place_seconds: float
    chosen: str


@torch.inference_mode()
def measure(dtype: torch.dtype, cases: list[tuple[int, int, int]] = CASES) -> Iterator[Row]:
    """Measure all cases; every result is checked against the reference."""
    for num_seqs, context_len, stride in cases:
        yield _measure_case(dtype, num_seqs, context_len, stride)


def _measure_case(dtype: torch.dtype, num_seqs: int, context_len: int, stride: int) -> Row:
    torch.manual_seed(0)
    batch, num_blocks = _make_batch(num_seqs, context_len, stride)
    block_bytes = KV_HEADS * BLOCK_SIZE * HEAD_DIM * dtype.itemsize
    num_layers = max(1, BYTES_IN_TURN // (2 * num_blocks * block_bytes))
    pool = torch.randn(num_layers, 2, num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM).to(dtype)
    q = torch.randn(num_seqs, HEADS, HEAD_DIM).to(dtype)
    side_by_side = torch.randn(num_layers, 2, num_seqs, KV_HEADS, context_len, HEAD_DIM).to(dtype)
    grouped = q.view(num_seqs, KV_HEADS, -1, HEAD_DIM)
    scale = HEAD_DIM**-0.5

    k_cache, v_cache = pool[0]
    expected = reference_paged_attention(q, k_cache, v_cache, batch, scale)
    works: dict[str, Work] = {
        "sdpa": lambda: [F.scaled_dot_product_attention(grouped, k, v) for k, v in side_by_side]
    }
    ways: tuple[Way, Way] = ("gathered", "in place")
    for way in ways:
        decodes = Decodes.prepare(batch, k_cache, HEADS, dtype, way)
        assert decodes is not None
        found = decodes.attend(_queries(q, decodes), k_cache, v_cache, scale)
        tolerance = 0.03 if dtype is torch.bfloat16 else 1e-4
        torch.testing.assert_close(
            found, _queries(expected, decodes), rtol=tolerance, atol=tolerance
        )
        works[way] = _all_layers(decodes, q, pool, scale)
    chosen = Decodes.prepare(batch, k_cache, HEADS, dtype)
    assert chosen is not None
    seconds = median_seconds(works, q.device, rounds=9)
    each = {name: total / num_layers for name, total in seconds.items()}
    return Row(
        num_seqs,
        context_len,
        1 / stride,
        each["sdpa"],
        each["gathered"],
        each["in place"],
        "in place" if isinstance(chosen.way, InPlace) else "gathered",
    )


def _queries(q: Tensor, decodes: Decodes) -> Tensor:
    return q if decodes.tokens is None else q.index_select(0, decodes.tokens)


def _all_layers(decodes: Decodes, q: Tensor, pool: Tensor, scale: float) -> Work:
    def attend() -> None:
        for k_cache, v_cache in pool:
            decodes.attend(_queries(q, decodes), k_cache, v_cache, scale)

    return attend


def _make_batch(num_seqs: int, context_len: int, stride: int) -> tuple[Batch, int]:
    """Make a batch with lengths of 0.5 to 1.5 times the mean; every `stride`-th block is used."""
    lengths = (context_len * (0.5 + torch.rand(num_seqs))).int().tolist()
    counts = [ceil(length / BLOCK_SIZE) for length in lengths]
    ids: list[int] = (stride * torch.randperm(sum(counts))).tolist()
    sequences: list[SequenceInput] = []
    for seq_id, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        blocks, ids = ids[:count], ids[count:]
        sequences.append(SequenceInput(seq_id, [0], length - 1, blocks))
    builder = BatchBuilder(num_seqs, max(counts), BLOCK_SIZE)
    return builder.build(sequences), stride * sum(counts)


def describe(dtype: torch.dtype) -> str:
    """The caption of the table."""
    return (
        f"{dtype}, {HEADS} heads over {KV_HEADS} KV heads of {HEAD_DIM}, blocks of {BLOCK_SIZE}. "
        "In use: the part of the blocks from the first to the last. SDPA: over contiguous "
        "keys. Several layers in turn, median of rounds"
    )


def as_table(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(box=None, padding=(0, 2))
    for title in ("sequences", "context", "in use", "SDPA", "gathered", "in place"):
        table.add_column(title, justify="right")
    table.add_column("chosen")
    for row in rows:
        table.add_row(
            str(row.num_seqs),
            f"{row.context_len:,}",
            f"{100 * row.part_in_use:.0f} %",
            f"{1e6 * row.sdpa_seconds:.0f} us",
            *(
                f"{1e6 * seconds:.0f} us, {seconds / row.sdpa_seconds:.2f} x"
                for seconds in (row.gathered_seconds, row.in_place_seconds)
            ),
            row.chosen,
        )
    return table
