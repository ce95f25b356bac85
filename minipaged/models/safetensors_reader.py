"""Reads weights from safetensors files directly into the memory of a model.

A safetensors file (https://github.com/huggingface/safetensors) has three parts:

    [0, 8)          the length of the header, as a little-endian integer
    [8, begin)      the header, JSON: {"norm.weight": {"dtype": "F32", "shape": [4],
                    "data_offsets": [0, 16]}, ...}, offsets relative to `begin`
    [begin, end)    the tensors, in row-major order

The file is read piece by piece through one small buffer, and each piece is copied to its parameter.
Loading therefore needs little more memory than the weights themselves. Mapping the file into memory
would be a line shorter, but its pages stay in memory next to the model. Also, the model owns its
weights: the file may be replaced while it runs.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from io import RawIOBase
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipaged.errors import CheckpointError
from minipaged.utils.files import read_json_object

# The supported dtypes, by their names in the files; all others are quantised formats.
DTYPES_IN_FILES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

LONGEST_HEADER = 100_000_000  # bytes, the format's limit; a longer one means another kind of file
PIECE_BYTES = 4 * 2**20  # bytes per read: enough for full speed, and small compared with a model


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's position in its file, with its dtype and shape from the header."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int  # of its first byte, from the beginning of the file
    end: int
    stride: int | None = None  # bytes from one row to the next, if they are not adjacent

    def part(self, dim: int, start: int, stop: int) -> "StoredTensor":
        """Rows (dim 0) or, of a matrix, columns (dim 1) [start, stop)."""
        assert self.stride is None, "a part of a part"
        itemsize = DTYPES_IN_FILES[self.dtype].itemsize
        row_bytes = prod(self.shape[1:]) * itemsize
        if dim == 0:
            begin, end = self.begin + start * row_bytes, self.begin + stop * row_bytes
            return replace(self, shape=(stop - start, *self.shape[1:]), begin=begin, end=end)
        num_rows, _ = self.shape
        begin = self.begin + start * itemsize
        end = begin + (num_rows - 1) * row_bytes + (stop - start) * itemsize
        shape = num_rows, stop - start
        return replace(self, shape=shape, begin=begin, end=end, stride=row_bytes)


def find_weight_files(folder: Path) -> list[Path]:
    """Return model.safetensors, or the shards in the index. Raises CheckpointError."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(_nothing_to_load(folder))
    return find_shards(index)


def find_shards(index: Path) -> list[Path]:
    """Return the files that an index lists. Raises CheckpointError unless all exist."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: download it again.")
    shards = sorted({index.parent / Path(str(name)).name for name in weight_map.values()})
    try:
        missing = [shard.name for shard in shards if not shard.is_file()]
    except (OSError, ValueError) as error:  # a name that is too long or invalid
        raise CheckpointError(f"{index} has invalid file names: download it again.") from error
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of the {len(shards)} shards that {index.name} "
            f"lists, first {missing[0]}: download them."
        )
    return shards


def _nothing_to_load(folder: Path) -> str:
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickled:
        return (
            f"{folder} contains its weights as {pickled[0]} only, which is not read because it can "
            f"run code: convert it to safetensors by `minipaged convert {folder}`."
        )
    return (
        f"{folder} contains neither model.safetensors nor model.safetensors.index.json: download "
        "the weights into it."
    )


def read_headers(paths: list[Path], prefix: str) -> dict[str, StoredTensor]:
    """Return the tensors in these files, by name without the prefix, which some files omit.

    Raises:
        CheckpointError: a file is not a complete safetensors file, or a tensor occurs twice.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for tensor in _read_header(path):
            first = tensors.setdefault(tensor.name.removeprefix(prefix), tensor)
            if first is not tensor:
                raise CheckpointError(
                    f"{path} contains {tensor.name!r}, which {first.path} contains as "
                    f"{first.name!r}: download the weights again."
                )
    return tensors


def _read_header(path: Path) -> list[StoredTensor]:
    """Return every tensor in one file. Raises CheckpointError if it is incomplete."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise ValueError(f"its header alone should have {length} bytes")
            header = json.loads(file.read(length))
        begin = 8 + length
        tensors = [
            _describe(path, begin, name, entry)
            for name, entry in header.items()
            if name != "__metadata__"
        ]
        end = max((tensor.end for tensor in tensors), default=begin)
        if size != end:
            raise ValueError(f"it should have {end} bytes")
    except (
        *(ValueError, TypeError, KeyError, AttributeError),
        *(OverflowError, RecursionError, OSError),
    ) as error:
        raise _broken(path, error) from error
    return tensors


def _describe(path: Path, begin: int, name: str, entry: Any) -> StoredTensor:
    """Parse an entry of the header. Raises ValueError if its bytes do not match its shape."""
    shape = tuple(map(int, entry["shape"]))
    first, last = map(int, entry["data_offsets"])
    dtype = DTYPES_IN_FILES.get(entry["dtype"])  # others are refused if needed
    wrong_size = dtype is not None and last - first != prod(shape) * dtype.itemsize
    if first < 0 or wrong_size:
        raise ValueError(f"{name} of shape {list(shape)} has bytes {first} to {last}")
    return StoredTensor(path, name, str(entry["dtype"]), shape, begin + first, begin + last)


def _broken(path: Path, reason: object) -> CheckpointError:
    size = path.stat().st_size if path.exists() else 0
    return CheckpointError(
        f"{path} of {size} bytes is cut short or not a safetensors file ({reason}): download it "
        "again."
    )


def same_numbers(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are bitwise equal. Raises CheckpointError."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    try:
        with one.path.open("rb") as first, other.path.open("rb") as second:
            first.seek(one.begin)
            second.seek(other.begin)
            for done in range(0, one.end - one.begin, PIECE_BYTES):
                size = min(PIECE_BYTES, one.end - one.begin - done)
                if first.read(size) != second.read(size):
                    return False
    except OSError as error:
        raise _broken(one.path, error) from error
    return True


def copy_tensors(pairs: Iterable[tuple[StoredTensor, Tensor]]) -> None:
    """Fill each target tensor, of any dtype, strides and device, from its file.

    Both sides have the same shape, of at least one dimension; the file's dtype is in
    DTYPES_IN_FILES.

    Raises:
        CheckpointError: a file ends early, or cannot be read.
    """
    by_file = sorted(pairs, key=lambda pair: (pair[0].path, pair[0].begin))
    for stored, ours in by_file:
        try:
            _copy_tensor(stored, ours)
        except OSError as error:
            raise _broken(stored.path, error) from error


def _copy_tensor(stored: StoredTensor, ours: Tensor) -> None:
    num_rows, dtype = stored.shape[0], DTYPES_IN_FILES[stored.dtype]
    row_bytes = prod(stored.shape[1:]) * dtype.itemsize
    rows_at_once = min(num_rows, max(1, PIECE_BYTES // row_bytes))
    raw = memoryview(bytearray(rows_at_once * row_bytes))
    numbers = torch.frombuffer(raw, dtype=dtype)  # the same bytes
    piece = numbers.view(rows_at_once, *stored.shape[1:])
    with stored.path.open("rb", buffering=0) as file:  # reads no more than needed
        for first in range(0, num_rows, rows_at_once):
            num = min(rows_at_once, num_rows - first)
            if stored.stride is None:
                _read_at(file, stored, stored.begin + first * row_bytes, raw[: num * row_bytes])
            else:
                for row in range(num):
                    at = stored.begin + (first + row) * stored.stride
                    _read_at(file, stored, at, raw[row * row_bytes : (row + 1) * row_bytes])
            ours[first : first + num].copy_(piece[:num])


def _read_at(file: RawIOBase, stored: StoredTensor, place: int, memory: memoryview) -> None:
    file.seek(place)
    while memory:
        count = file.readinto(memory)
        if not count:
            raise _broken(stored.path, f"it ends within {stored.name}")
        memory = memory[count:]
