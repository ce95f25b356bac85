"""Baselines: every sequence in one contiguous region, reserved when its request is admitted.

Systems before the paper worked like this (section 3.1): a tensor is contiguous, so a request
reserved every token slot that it might ever need. The paper's three baselines (section 6.1) differ
in what they know about the output. For a prompt of p tokens and an output of o they reserve:

    Orca (Oracle)  p + o                       knows o, which no real system does
    Orca (Pow2)    p + o, with o rounded up to a power of two
    Orca (Max)     the longest sequence allowed

FasterTransformer reserves like Orca (Max), and also batches statically: no request joins a batch
before all of it has ended. Here o is the request's `max_tokens`: exact in the simulator, an upper
bound for a request that is served.

Everything else, from scheduler to attention, is shared with paging: a region is a block table whose
entries are consecutive.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from minipaged.memory.baselines.buddy import BuddyAllocator
from minipaged.memory.baselines.plain import PlainMemory
from minipaged.memory.block_table import BlockTable
from minipaged.memory.interface import Admission, BlockPair, Memory, MemoryUsage, ceil_div
from minipaged.sequence import Sequence, SequenceGroup
from minipaged.utils.options import require_one_of

Reserve = Literal["max", "pow2", "oracle"]
CONTIGUOUS: dict[str, Reserve] = {  # by the names for LLM(memory=...)
    "contiguous-oracle": "oracle",
    "contiguous-pow2": "pow2",
    "contiguous-max": "max",
    "static": "max",
}


def contiguous(name: str, longest: int) -> Callable[..., Memory]:
    """A baseline by its name, to be called with the keyword arguments of BlockManager.

    Args:
        name: one of CONTIGUOUS; "static" is FasterTransformer's batching.
        longest: maximum tokens per sequence.
    """

    def build(*, num_blocks: int, block_size: int, **_: Any) -> Memory:
        joins = name != "static"
        return ContiguousMemory(num_blocks, block_size, CONTIGUOUS[name], longest, joins)

    return build


@dataclass
class _Reservation:
    """The regions of one request: one per sequence that it will have, all of one size."""

    num_needed: int  # token slots that each of its sequences will use in the end: p + o
    num_reserved: int  # token slots reserved for each
    spare: list[range]  # regions without a sequence yet
    owners: dict[range, set[int]] = field(default_factory=dict[range, set[int]])  # sequence ids

    @property
    def num_sequences(self) -> int:
        return sum(len(seq_ids) for seq_ids in self.owners.values())


class ContiguousMemory(PlainMemory):
    """Regions from a buddy allocator; no preemption, no growth, no sharing of single blocks.

    A fork shares its parent's region until either is appended to: then all but the last to write
    move to a spare region of their request, and copy all of the old one, as Orca would.

    Args:
        reserve: "max", "pow2" or "oracle".
        longest: maximum tokens per sequence.
        joins: whether requests may join a running batch; False for FasterTransformer.
    """

    def __init__(
        self, num_blocks: int, block_size: int, reserve: Reserve, longest: int, joins: bool = True
    ) -> None:
        super().__init__()
        require_one_of("reserve", reserve, get_args(Reserve))
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._reserve = reserve
        self._longest = longest
        self._joins = joins
        whole = 1 << (ceil_div(longest, block_size) - 1).bit_length()
        self._allocator = BuddyAllocator(num_blocks, whole)
        self._reservations: dict[int, _Reservation] = {}  # by sequence id
        self._batch_is_closed = False  # unless `joins`
        self._kept: list[range] = []  # regions of requests that ended before their batch

    # ---- admission: all or nothing -------------------------------------------------------------

    def fits(self, group: SequenceGroup) -> bool:
        """Whether an empty pool has a region for every sequence that the request will have."""
        return self._allocator.max_regions(self._blocks_for(group)) >= group.num_batch_slots

    def explain_rejection(self, group: SequenceGroup) -> str:
        num_blocks, width = self._blocks_for(group), group.num_batch_slots
        most = self._allocator.max_regions(num_blocks)
        return (
            f"the request reserves {width} contiguous {'region' if width == 1 else 'regions'} of "
            f"{self._allocator.rounded(num_blocks)} blocks ({num_blocks} rounded up to a power of "
            f"two), but the pool of {self.num_blocks} has room for {most}: raise num_blocks, or "
            f"lower {'max_model_len' if self._reserve == 'max' else 'max_tokens'}"
            f"{', or ask for fewer sequences' if most else ''}."
        )

    def can_admit(self, group: SequenceGroup, alone: bool) -> bool:
        """Whether there is a region for each sequence; no watermark, as sequences never grow."""
        if self._batch_is_closed:
            return False
        return self._allocator.num_free_regions(self._blocks_for(group)) >= group.num_batch_slots

    def admit(self, group: SequenceGroup) -> Admission:
        """Reserve all that the request may need, for each sequence that it will have."""
        [seq] = group.sequences
        num_blocks = self._blocks_for(group)
        regions = [self._allocator.allocate(num_blocks) for _ in range(group.num_batch_slots)]
        spare = [region for region in regions if region is not None]
        assert len(spare) == len(regions), "fewer regions are free than can_admit promised"
        reservation = _Reservation(self._needed(seq), self._reserved(seq), spare)
        self._reservations[seq.seq_id] = reservation
        self._own(seq, reservation, spare.pop())
        return Admission([0], [])

    # ---- appending within the reservation ------------------------------------------------------

    def can_append(self, group: SequenceGroup) -> bool:
        return True

    def append(self, seq: Sequence) -> list[BlockPair]:
        """Record how many tokens the sequence has; returns the blocks to copy first.

        A sequence that shares its region moves to a spare one. The whole region is copied, written
        or not: a contiguous system has no table to tell the parts apart.
        """
        self._batch_is_closed |= not self._joins and seq.num_output_tokens > 0
        reservation, table = self._reservations[seq.seq_id], self._tables[seq.seq_id]
        old = self._region_of(seq)
        assert seq.num_tokens <= reservation.num_reserved, f"{seq} outgrew its reservation"
        pairs: list[BlockPair] = []
        if len(reservation.owners[old]) > 1:
            reservation.owners[old].remove(seq.seq_id)
            new = reservation.spare.pop()
            self._own(seq, reservation, new)
            pairs = list(zip(old, new, strict=True))
        else:
            table.num_tokens = seq.num_tokens
        return pairs

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let a child share its parent's region until either is appended to."""
        reservation = self._reservations[child.seq_id] = self._reservations[parent.seq_id]
        self._own(child, reservation, self._region_of(parent))

    def free(self, seq: Sequence) -> None:
        """Release a sequence's region, and free what its request no longer needs.

        The region of a pruned beam stays with the request, for the next fork.
        """
        region = self._region_of(seq)
        reservation = self._reservations.pop(seq.seq_id)
        del self._tables[seq.seq_id]
        reservation.owners[region].remove(seq.seq_id)
        if not reservation.owners[region]:
            del reservation.owners[region]
            reservation.spare.append(region)
        while reservation.spare and self._num_regions(reservation) > reservation.num_sequences:
            self._kept.append(reservation.spare.pop())
        if self._joins or not self._tables:
            for kept in self._kept:
                self._allocator.free(kept)
            self._kept.clear()
            self._batch_is_closed = False

    # ---- inspection ----------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Blocks outside all reservations."""
        return self._allocator.num_free

    def ref_count(self, block: int) -> int:
        return sum(block in table.blocks for table in self._tables.values())

    def usage(self) -> MemoryUsage:
        """The use of the pool's slots, by the categories of the paper's Figure 2."""
        used = reserved = internal = external = 0
        seen = {id(r): r for r in self._reservations.values()}
        for reservation in seen.values():
            num_regions = self._num_regions(reservation)
            for seq_ids in reservation.owners.values():
                used += max(self._tables[seq_id].num_tokens for seq_id in seq_ids)
            needed = num_regions * reservation.num_needed
            internal += num_regions * reservation.num_reserved - needed
            reserved += needed
            regions = [*reservation.owners, *reservation.spare]
            num_slots = sum(map(len, regions)) * self.block_size
            external += num_slots - num_regions * reservation.num_reserved
        reserved -= used
        free = self.num_free * self.block_size
        kept = sum(map(len, self._kept)) * self.block_size
        return MemoryUsage(used, reserved, internal + kept, external, free)

    # ---- arithmetic ----------------------------------------------------------------------------

    def _needed(self, seq: Sequence) -> int:
        """Token slots that the sequence will use, unless it stops early."""
        if seq.max_output_len is None:
            return self._longest
        return min(seq.prompt_len + seq.max_output_len, self._longest)

    def _reserved(self, seq: Sequence) -> int:
        """Token slots reserved for it."""
        output_len = self._needed(seq) - seq.prompt_len
        if self._reserve == "pow2":
            return min(seq.prompt_len + (1 << (output_len - 1).bit_length()), self._longest)
        return self._needed(seq) if self._reserve == "oracle" else self._longest

    def _blocks_for(self, group: SequenceGroup) -> int:
        return ceil_div(self._reserved(group.sequences[0]), self.block_size)

    def _region_of(self, seq: Sequence) -> range:
        owners = self._reservations[seq.seq_id].owners
        return next(region for region, seq_ids in owners.items() if seq.seq_id in seq_ids)

    def _own(self, seq: Sequence, reservation: _Reservation, region: range) -> None:
        reservation.owners.setdefault(region, set()).add(seq.seq_id)
        self._tables[seq.seq_id] = BlockTable(self.block_size, list(region), seq.num_tokens)

    def _num_regions(self, reservation: _Reservation) -> int:
        return len(reservation.owners) + len(reservation.spare)
