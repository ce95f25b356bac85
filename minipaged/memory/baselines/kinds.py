"""The kinds of memory by the names that a user gives them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minipaged.memory.baselines.contiguous import ContiguousMemory, Reserve
from minipaged.memory.interface import Memory
from minipaged.utils.options import require_one_of

CONTIGUOUS: dict[str, Reserve] = {
    "contiguous-oracle": "oracle",
    "contiguous-pow2": "pow2",
    "contiguous-max": "max",
    "static": "max",
}


@dataclass(frozen=True)
class VirtualKind:
    """What differs from one virtual memory to another; see `RegionLayout`."""

    huge_pages: bool = False  # of 2 MiB; else the smallest that the device has
    sliced: bool = False  # all layers of a token side by side


VIRTUAL = {
    "virtual": VirtualKind(),
    "virtual-sliced": VirtualKind(sliced=True),
    "virtual-2m": VirtualKind(huge_pages=True),
    "virtual-2m-sliced": VirtualKind(huge_pages=True, sliced=True),
}
KINDS = ("paged", *CONTIGUOUS, *VIRTUAL)


def contiguous(name: str, longest: int) -> Callable[..., Memory]:
    """The rival of this name, to be called with the arguments of BlockManager, by keyword.

    Args:
        name: one of CONTIGUOUS; "static" is FasterTransformer's batches.
        longest: tokens of the longest sequence allowed.
    """
    require_one_of("memory", name, tuple(CONTIGUOUS))

    def build(*, num_blocks: int, block_size: int, **_: Any) -> Memory:
        joins = name != "static"
        return ContiguousMemory(num_blocks, block_size, CONTIGUOUS[name], longest, joins)

    return build
