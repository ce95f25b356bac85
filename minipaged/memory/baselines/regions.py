"""The layout of virtual memory in regions and pages, on which its manager and its tensors agree."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any, Protocol

from minipaged.config import ModelConfig
from minipaged.errors import InvalidOption
from minipaged.memory.interface import ceil_div


@dataclass(frozen=True)
class RegionLayout:
    """Offsets of the regions' keys and values, in bytes from the start of the address range.

        [ buffer 0 | buffer 1 | ... ]  one for the keys of each layer and one for its values
        [ region 0 | region 1 | ... ]  of a buffer: room for the longest sequence
        [ page 0 | page 1 | ... ]      of a region: mapped to memory, or not

    Page group g of a region is its page g in every buffer. A token has keys and values in all
    layers, so these pages are mapped and unmapped together, and memory is counted in page groups.
    """

    num_buffers: int
    num_regions: int
    region_len: int  # tokens
    token_bytes: int  # in one buffer
    page_bytes: int

    def __post_init__(self) -> None:
        # If two regions shared a page, neither of them alone could unmap it.
        assert self.region_bytes % self.page_bytes == 0, "a region is a whole number of pages"

    @classmethod
    def for_model(
        cls, config: ModelConfig, bytes_per_number: int, **options: Any
    ) -> "RegionLayout":
        """The layout for a model; `options` are those of `for_tokens`."""
        num_bytes = config.kv_bytes_per_token(bytes_per_number)
        return cls.for_tokens(num_bytes, config.num_layers, **options)

    @classmethod
    def for_tokens(
        cls,
        num_bytes: int,
        num_layers: int,
        *,
        num_regions: int,
        longest: int,
        page_bytes: int,
        sliced: bool = False,
    ) -> "RegionLayout":
        """The layout for tokens that take `num_bytes` each, over all layers.

        Args:
            longest: maximum tokens per sequence.
            sliced: keep all layers of a token next to each other, in two buffers instead of two per
                layer. A page group is then only two pages: it holds fewer tokens, and the last one
                of a sequence wastes less.
        """
        num_buffers = 2 if sliced else 2 * num_layers
        token_bytes = num_bytes // num_buffers
        # Whole pages and whole tokens: a buffer is then a tensor whose regions start on pages.
        step = page_bytes // gcd(page_bytes, token_bytes)
        region_len = ceil_div(longest, step) * step
        return cls(num_buffers, num_regions, region_len, token_bytes, page_bytes)

    @property
    def group_bytes(self) -> int:
        """Bytes of a page group, over all buffers."""
        return self.num_buffers * self.page_bytes

    @property
    def region_bytes(self) -> int:
        """Bytes of one region in one buffer."""
        return self.region_len * self.token_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole address range, most of which is never mapped."""
        return self.num_buffers * self.num_regions * self.region_bytes

    def groups_within(self, num_bytes: int) -> int:
        """The number of page groups that fit in `num_bytes`. Raises InvalidOption if none does."""
        if num_bytes < self.group_bytes:
            raise InvalidOption(
                f"a page group takes {self.group_bytes} bytes (a page of {self.page_bytes} in "
                f"each of {self.num_buffers} buffers), but the pool has {num_bytes}: raise "
                "num_blocks, or choose smaller pages."
            )
        return num_bytes // self.group_bytes

    def groups_for(self, num_tokens: int) -> int:
        """The number of page groups that contain the first `num_tokens` tokens of a region."""
        return ceil_div(num_tokens * self.token_bytes, self.page_bytes)

    def tokens_in(self, num_groups: int) -> int:
        """The number of tokens that fit in `num_groups` page groups."""
        return num_groups * self.page_bytes // self.token_bytes

    def pieces(self, region: int, groups: range) -> Iterator[tuple[int, int]]:
        """(offset, length) in bytes of these page groups of a region, in each buffer."""
        for buffer in range(self.num_buffers):
            start = (buffer * self.num_regions + region) * self.region_bytes
            yield start + groups.start * self.page_bytes, len(groups) * self.page_bytes


class Pages(Protocol):
    """Maps page groups of a region to memory: for real (`MappedPages`), or not (a simulation)."""

    def map(self, region: int, groups: range) -> None: ...
    def unmap(self, region: int, groups: range) -> None: ...
