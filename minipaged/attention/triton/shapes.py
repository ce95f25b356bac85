"""Shapes: how large the tiles of `decode` and `prefill` are, and how many warps share one.

The larger a tile, the fewer instructions per key, and the more registers and shared memory. If a
thread needs more than 255 registers, or if few programs fit on a multiprocessor, a kernel is slow.
The choices are made from the compiler's report (`minipaged bench compile`), and are to be confirmed
by `minipaged bench tune`.
"""

from typing import NamedTuple


class TileShape(NamedTuple):
    """The tile shape of a `decode` program; `minipaged bench tune` measures alternatives."""

    tile: int  # positions
    num_warps: int
    num_stages: int  # of the loop: with 3, two tiles of keys are loading or in use, with 4 three
    max_registers: int | None = None  # of a thread; with 168, three programs of 4 warps fit

    def __str__(self) -> str:
        return ",".join(str(number) for number in self if number is not None)


def choose_tile(
    group: int, width: int, query_bytes: int, cache_bytes: int, large_sms: bool = True
) -> TileShape:
    """Return the tile shape for rows of `width` elements of this many bytes.

    Several tiles of keys and of values must fit in shared memory, for several programs.

    Args:
        group: query heads that share a KV head.
        width: elements in a row of the tile.
        query_bytes: bytes per element of a query.
        cache_bytes: bytes per element in the cache.
        large_sms: see `has_large_sms`; on others, fewer tiles fit at the same time.
    """
    if query_bytes == 4 and width >= 128:  # float32 takes many registers; see `prefill`
        return TileShape(16, 8, 2)
    if width * cache_bytes > 128:
        return TileShape(32, 4, 4 if width <= 128 else 3)
    if cache_bytes == 1 and group <= 16 and (large_sms or width <= 64):
        return TileShape(128, 4, 3, max_registers=168)  # the larger, the fewer instructions per key
    return TileShape(64, 4, 3)


class TileShapes(NamedTuple):
    """The tile shapes of a `prefill` program; `minipaged bench tune` measures alternatives."""

    rows: int  # rows of queries: tokens times heads of a group
    tile: int  # positions in a tile of keys
    num_warps: int
    num_stages: int  # of the loop over tiles of keys, as in `decode`

    def __str__(self) -> str:
        return ",".join(map(str, self))


def choose_tiles(width: int, query_bytes: int, large_sms: bool = True) -> TileShapes:
    """Return the largest shapes that do not spill registers (see `minipaged bench compile`).

    Args:
        width: elements in a row of either tile.
        query_bytes: bytes per element of a query.
        large_sms: see `has_large_sms`; on others, fewer tiles fit at the same time.
    """
    if query_bytes == 4:  # three partial products per element: many registers
        rows, tile = {64: (64, 16), 128: (32, 32), 256: (16, 16)}[max(64, width)]
        return TileShapes(rows, tile, 4, 2)
    if width > 128:
        return TileShapes(64, 32, 8, 2)
    return TileShapes(128, 64 if large_sms else 32, 8, 3)
