"""Rivals of paging: every sequence in one contiguous run that is reserved in advance.

So it was before the paper (section 3.1): a tensor must lie in one piece, so a request gets all
slots that it may ever need when it is admitted. The paper's three baselines (section 6.1) differ in
what they know of its length. With a prompt of p tokens and an output of o:

    Orca (Oracle)  p + o                       knows it, which no system does
    Orca (Pow2)    p + o, with o rounded up to a power of two
    Orca (Max)     the longest sequence allowed

FasterTransformer reserves as Orca (Max) does, and besides forms a batch beforehand: nobody joins
before all of it has ended. What a request will generate is known here by its `max_tokens`, so in
the simulator exactly, and to a served request as a limit.

Everything else, from scheduler to attention, is that of paging: a run of blocks is a block table
whose entries stand in a row.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from minipaged.memory.baselines.buddy import BuddyAllocator
from minipaged.memory.baselines.plain import PlainMemory
from minipaged.memory.block_table import BlockTable
from minipaged.memory.interface import Admission, BlockPair, MemoryUsage, ceil_div
from minipaged.sequence import Sequence, SequenceGroup
from minipaged.utils.options import require_one_of

Reserve = Literal["max", "pow2", "oracle"]


@dataclass
class _Reservation:
    """The runs of one request: as many as it will have sequences, all of one size."""

    num_needed: int  # slots that a sequence of it will use in the end: p + o
    num_reserved: int  # slots that were asked for
    spare: list[range]  # no sequence writes to them yet
    owners: dict[range, set[int]] = field(default_factory=dict[range, set[int]])  # sequence ids

    @property
    def num_sequences(self) -> int:
        return sum(len(seq_ids) for seq_ids in self.owners.values())


class ContiguousMemory(PlainMemory):
    """Runs of blocks on a buddy allocator; no preemption, no sharing, no growing.

    A fork shares its parent's run until either is written to: then all but the last to write move
    to a spare run of their request, and copy the whole run there. That is what Orca would copy.

    Args:
        reserve: "max", "pow2" or "oracle".
        longest: tokens of the longest sequence allowed.
        joins: False: a batch runs until all of it has ended, as in FasterTransformer.
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
        self._runs = BuddyAllocator(num_blocks, whole)
        self._reservations: dict[int, _Reservation] = {}  # by sequence id
        self._batch_is_closed = False  # unless `joins`
        self._kept: list[range] = []  # of those who have ended before their batch

    # ---- admission: all or nothing -------------------------------------------------------------

    def fits(self, group: SequenceGroup) -> bool:
        """Whether an empty pool has a run for every sequence that the request will have."""
        return self._runs.most_runs(self._blocks_for(group)) >= group.num_batch_slots

    def explain_rejection(self, group: SequenceGroup) -> str:
        num_blocks, seats = self._blocks_for(group), group.num_batch_slots
        most = self._runs.most_runs(num_blocks)
        return (
            f"the request reserves {seats} contiguous {'run' if seats == 1 else 'runs'} of "
            f"{self._runs.rounded(num_blocks)} blocks ({num_blocks} rounded up to a power of two), "
            f"and the pool of {self.num_blocks} has room for {most}: raise num_blocks, or lower "
            f"{'max_model_len' if self._reserve == 'max' else 'max_tokens'}"
            f"{', or ask for fewer sequences' if most else ''}."
        )

    def can_admit(self, group: SequenceGroup, alone: bool) -> bool:
        """Whether there is a run for each sequence; there is no watermark, for nobody grows."""
        if self._batch_is_closed:
            return False
        return self._runs.num_runs(self._blocks_for(group)) >= group.num_batch_slots

    def admit(self, group: SequenceGroup) -> Admission:
        """Reserve everything that the request may need, for all its sequences."""
        [seq] = group.sequences
        num_blocks = self._blocks_for(group)
        runs = [self._runs.allocate(num_blocks) for _ in range(group.num_batch_slots)]
        spare = [run for run in runs if run is not None]
        assert len(spare) == len(runs), "there are not as many runs as can_admit has said"
        reservation = _Reservation(self._needed(seq), self._reserved(seq), spare)
        self._reservations[seq.seq_id] = reservation
        self._own(seq, reservation, spare.pop())
        return Admission([0], [])

    # ---- growing, inside the reservation -------------------------------------------------------

    def can_append(self, group: SequenceGroup) -> bool:
        return True

    def append(self, seq: Sequence) -> list[BlockPair]:
        """Note the tokens that the sequence has; returns the copies to make first.

        Whoever shares a run with others moves to a spare one. All of it is copied, with what was
        never written: there is no table to say which part matters.
        """
        self._batch_is_closed |= not self._joins and seq.num_output_tokens > 0
        reservation, table = self._reservations[seq.seq_id], self._tables[seq.seq_id]
        old = self._run_of(seq)
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
        """Let a child share its parent's run, until either of them is appended to."""
        reservation = self._reservations[child.seq_id] = self._reservations[parent.seq_id]
        self._own(child, reservation, self._run_of(parent))

    def free(self, seq: Sequence) -> None:
        """Let go of a sequence's run; what its request no longer needs becomes free.

        The runs of beams that were given up are spare: others of the request will fork.
        """
        run = self._run_of(seq)
        reservation = self._reservations.pop(seq.seq_id)
        del self._tables[seq.seq_id]
        reservation.owners[run].remove(seq.seq_id)
        if not reservation.owners[run]:
            del reservation.owners[run]
            reservation.spare.append(run)
        while reservation.spare and self._num_runs(reservation) > reservation.num_sequences:
            self._kept.append(reservation.spare.pop())
        if self._joins or not self._tables:
            for kept in self._kept:
                self._runs.free(kept)
            self._kept.clear()
            self._batch_is_closed = False

    # ---- what others may know ------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Blocks that are reserved for nobody."""
        return self._runs.num_free

    def ref_count(self, block: int) -> int:
        return sum(block in table.blocks for table in self._tables.values())

    def usage(self) -> MemoryUsage:
        """How the slots of the pool are used, by the categories of the paper's Figure 2."""
        used = reserved = internal = external = 0
        seen = {id(r): r for r in self._reservations.values()}
        for reservation in seen.values():
            num_runs = self._num_runs(reservation)
            for seq_ids in reservation.owners.values():
                used += max(self._tables[seq_id].num_tokens for seq_id in seq_ids)
            needed = num_runs * reservation.num_needed
            internal += num_runs * reservation.num_reserved - needed
            reserved += needed
            runs = [*reservation.owners, *reservation.spare]
            external += sum(len(run) * self.block_size - reservation.num_reserved for run in runs)
        reserved -= used
        free = self.num_free * self.block_size
        kept = sum(map(len, self._kept)) * self.block_size  # of those who ended before their batch
        return MemoryUsage(used, reserved, internal + kept, external, free)

    # ---- arithmetic ----------------------------------------------------------------------------

    def _needed(self, seq: Sequence) -> int:
        """Slots that the sequence will use, if nothing ends it before."""
        if seq.max_output_len is None:
            return self._longest
        return min(seq.prompt_len + seq.max_output_len, self._longest)

    def _reserved(self, seq: Sequence) -> int:
        """Slots that are reserved for it."""
        output_len = self._needed(seq) - seq.prompt_len
        if self._reserve == "pow2":
            return min(seq.prompt_len + (1 << (output_len - 1).bit_length()), self._longest)
        return self._needed(seq) if self._reserve == "oracle" else self._longest

    def _blocks_for(self, group: SequenceGroup) -> int:
        return ceil_div(self._reserved(group.sequences[0]), self.block_size)

    def _run_of(self, seq: Sequence) -> range:
        owners = self._reservations[seq.seq_id].owners
        return next(run for run, seq_ids in owners.items() if seq.seq_id in seq_ids)

    def _own(self, seq: Sequence, reservation: _Reservation, run: range) -> None:
        reservation.owners.setdefault(run, set()).add(seq.seq_id)
        self._tables[seq.seq_id] = BlockTable(self.block_size, list(run), seq.num_tokens)

    def _num_runs(self, reservation: _Reservation) -> int:
        return len(reservation.owners) + len(reservation.spare)
