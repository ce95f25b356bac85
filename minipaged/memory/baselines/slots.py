"""How virtual memory is cut into slots and pages: what its memory and its cache must agree on."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any, Protocol

from minipaged.config import ModelConfig
from minipaged.errors import InvalidOption
from minipaged.memory.interface import ceil_div


@dataclass(frozen=True)
class RegionLayout:
    """Where the keys and values of slots lie, in bytes from the beginning of all.

        [ buffer 0 | buffer 1 | ... ]  one for the keys of each layer and one for its values
        [ slot 0 | slot 1 | ... ]      of a buffer: room for the longest sequence, in one piece
        [ page 0 | page 1 | ... ]      of a slot: what the system can put there, or not

    A page group is page g of a slot in every buffer: a token has keys and values in all layers, so
    its pages come and go together. The group is what memory is counted in.
    """

    num_buffers: int
    num_slots: int
    region_len: int  # tokens
    token_bytes: int  # in one buffer
    page_bytes: int

    def __post_init__(self) -> None:
        # A page that belonged to two slots could not be given back by one of them.
        assert self.slot_bytes % self.page_bytes == 0, "a slot is a whole number of pages"

    @classmethod
    def for_model(
        cls, config: ModelConfig, bytes_per_number: int, **options: Any
    ) -> "RegionLayout":
        """The layout that a model needs; `options` are those of `for_tokens`."""
        num_bytes = config.kv_bytes_per_token(bytes_per_number)
        return cls.for_tokens(num_bytes, config.num_layers, **options)

    @classmethod
    def for_tokens(
        cls,
        num_bytes: int,
        num_layers: int,
        *,
        num_slots: int,
        longest: int,
        page_bytes: int,
        sliced: bool = False,
    ) -> "RegionLayout":
        """The layout for tokens of so many bytes over so many layers.

        Args:
            longest: tokens of the longest sequence allowed.
            sliced: two buffers for all layers together, in which the layers of one token lie side
                by side. A group is then two pages, and holds fewer tokens: less is wasted.
        """
        num_buffers = 2 if sliced else 2 * num_layers
        token_bytes = num_bytes // num_buffers
        # Whole pages and whole tokens: so a buffer is a tensor whose slots begin on pages.
        step = page_bytes // gcd(page_bytes, token_bytes)
        region_len = ceil_div(longest, step) * step
        return cls(num_buffers, num_slots, region_len, token_bytes, page_bytes)

    @property
    def group_bytes(self) -> int:
        return self.num_buffers * self.page_bytes

    @property
    def slot_bytes(self) -> int:
        """Of one slot in one buffer."""
        return self.region_len * self.token_bytes

    @property
    def num_bytes(self) -> int:
        """Of all addresses; few of them will ever have memory behind them."""
        return self.num_buffers * self.num_slots * self.slot_bytes

    def groups_within(self, num_bytes: int) -> int:
        """How many page groups so many bytes are. Raises InvalidOption if they are not even one."""
        if num_bytes < self.group_bytes:
            raise InvalidOption(
                f"a page group takes {self.group_bytes} bytes, a page of {self.page_bytes} in "
                f"each of {self.num_buffers} buffers, and the pool has {num_bytes}: raise "
                "num_blocks, or choose smaller pages."
            )
        return num_bytes // self.group_bytes

    def groups_for(self, num_tokens: int) -> int:
        """How many page groups so many first tokens of a slot touch."""
        return ceil_div(num_tokens * self.token_bytes, self.page_bytes)

    def tokens_in(self, num_groups: int) -> int:
        """How many tokens so many page groups have room for."""
        return num_groups * self.page_bytes // self.token_bytes

    def pieces(self, slot: int, groups: range) -> Iterator[tuple[int, int]]:
        """(beginning, length) in bytes of neighbouring groups of a slot, for every buffer."""
        for buffer in range(self.num_buffers):
            start = (buffer * self.num_slots + slot) * self.slot_bytes
            yield start + groups.start * self.page_bytes, len(groups) * self.page_bytes


class Pages(Protocol):
    """Who really puts memory behind the page groups of a slot, and takes it away."""

    def map(self, slot: int, groups: range) -> None: ...
    def unmap(self, slot: int, groups: range) -> None: ...
