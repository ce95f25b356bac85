"""The matrices of a small model, multiplied unpacked and packed (`models.linear`).

A model reads each matrix once per step, from memory and not from a cache. Many copies of each
matrix are therefore used in turn.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
from rich.table import Table

from minipaged.config import WeightDType
from minipaged.errors import InvalidOption
from minipaged.evaluation.bench.timing import Work, median_seconds
from minipaged.models.linear import Linear
from minipaged.models.packed import InFloat16, InOneDNN, works

MATRICES = {  # outputs, inputs: those of SmolLM2 135M
    "q, k, v": (960, 576),
    "output of attention": (576, 576),
    "gate, up": (3072, 576),
    "down": (576, 1536),
    "head": (49152, 576),
}
NUM_ROWS = (1, 2, 8, 32, 256)
BYTES_IN_TURN = 128 * 1024**2  # bytes of all copies of a matrix: more than fits in caches


@dataclass(frozen=True)
class Row:
    """One matrix product."""

    matrix: str
    num_rows: int  # of the input: decoding sequences, or tokens of a prompt
    plain_seconds: float
    packed_seconds: float
    packed_bytes_per_second: float
    packed_operations_per_second: float


def measure(
    dtype: torch.dtype,
    weight_dtype: WeightDType = "float32",
    matrices: dict[str, tuple[int, int]] = MATRICES,
) -> Iterator[Row]:
    """Measure each matrix with each number of rows. Raises InvalidOption without packing."""
    form = InFloat16 if weight_dtype == "float16" else InOneDNN
    if not works(form, dtype):
        raise InvalidOption(
            f"this processor, or this torch, cannot pack {weight_dtype} weights for products in "
            f"{dtype}: choose others."
        )
    for name, (num_out, num_in) in matrices.items():
        copies = max(2, ceil(BYTES_IN_TURN / (num_out * num_in * dtype.itemsize)))
        plain = [Linear(num_in, num_out, bias=False).to(dtype) for _ in range(copies)]
        packed = [Linear(num_in, num_out, bias=False).to(dtype) for _ in range(copies)]
        for layer in plain:
            layer.weight.data = layer.weight.data.half().to(dtype)
        packed[0].load_state_dict(plain[0].state_dict())
        for layer in packed:
            layer.pack(weight_dtype)
        for num_rows in NUM_ROWS:
            yield _compare(name, plain, packed, torch.randn(num_rows, num_in).to(dtype))


@torch.inference_mode()
def _compare(name: str, plain: list[Linear], packed: list[Linear], x: torch.Tensor) -> Row:
    tolerance = 0.02 if x.dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(packed[0](x), plain[0](x), rtol=tolerance, atol=tolerance)
    works = {"plain": _all_in_turn(plain, x), "packed": _all_in_turn(packed, x)}
    seconds = median_seconds(works, x.device, rounds=7)
    [first, *_] = packed
    assert first.packed is not None
    each = seconds["packed"] / len(packed)
    return Row(
        name,
        len(x),
        seconds["plain"] / len(plain),
        each,
        first.packed.num_bytes / each,
        2 * first.in_features * first.out_features * len(x) / each,
    )


def _all_in_turn(layers: list[Linear], x: torch.Tensor) -> Work:
    def multiply() -> None:
        for layer in layers:
            layer(x)

    return multiply


def describe(dtype: torch.dtype, weight_dtype: WeightDType) -> str:
    """The caption of the table."""
    kept = "FBGEMM, in float16" if weight_dtype == "float16" else "oneDNN"
    return (
        f"{dtype}; copies of each matrix in turn, so that they are read from memory. Plain: "
        f"F.linear; packed: once, by {kept}. Median of rounds in turn"
    )


def as_table(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(box=None, padding=(0, 2))
    table.add_column("matrix")
    for title in ("rows", "plain", "packed", "faster", "packed reads", "packed computes"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row.matrix,
            str(row.num_rows),
            f"{1e6 * row.plain_seconds:.0f} us",
            f"{1e6 * row.packed_seconds:.0f} us",
            f"{row.plain_seconds / row.packed_seconds:.2f} x",
            f"{row.packed_bytes_per_second / 1e9:.1f} GB/s",
            f"{row.packed_operations_per_second / 1e9:.0f} GFLOP/s",
        )
    return table
