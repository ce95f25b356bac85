"""A rival of paging: vAttention, which leaves paging to the operating system (arXiv 2405.04437).

Paging exists because a sequence's keys and values cannot lie in one piece without reserving memory
for the longest. But an address is not memory. Here each sequence gets a slot, addresses for the
longest sequence allowed, and the system's virtual memory puts pages behind them as it grows. So
attention reads one ordinary tensor a sequence, and needs no block tables at all:

    slot 0  [ page | page | page |      |      |      ]   3 page groups mapped, all needed
    slot 1  [ page |      |      |      |      |      ]
    slot 2  [ page | page |      |      |      |      ]   nobody's: its sequence has ended

What it costs: a page is larger than a block, and nothing smaller can be shared, so forks are copied
whole. To map a page is slow (on a GPU milliseconds for a group, over all layers), hence deferred
reclamation: pages stay where they are when a sequence ends, for the next one that takes the slot.
They are taken away only when others run short.

For everybody else a slot is a block, of which a sequence has one: a block table with one entry.
"""

from dataclasses import dataclass

from minipaged.errors import OutOfBlocks
from minipaged.memory.baselines.plain import PlainMemory
from minipaged.memory.baselines.slots import Pages, RegionLayout
from minipaged.memory.block_table import BlockTable
from minipaged.memory.interface import Admission, BlockPair, MemoryUsage
from minipaged.sequence import Sequence, SequenceGroup


@dataclass
class _Slot:
    # [0, needed)       page groups in which the tokens of its owners lie
    # [needed, mapped)  surplus: mapped for somebody who has ended, or has gone elsewhere
    # [mapped, ...)     addresses only
    needed: int = 0
    mapped: int = 0
    num_owners: int = 0


class VirtualMemory(PlainMemory):
    """Slots whose page groups are mapped as sequences grow, within a budget.

    A fork shares its parent's slot until either is appended to: then all but the last to write move
    to slots of their own, with a copy.

    Args:
        layout: slots and pages.
        budget: how many page groups may be mapped at a time. The system itself would refuse
            nobody: it kills the process once its memory is gone.
        pages: maps and unmaps what is decided here.
        watermark_groups: page groups that admission leaves, so that those who run can grow.
    """

    def __init__(
        self, layout: RegionLayout, budget: int, pages: Pages, watermark_groups: int = 0
    ) -> None:
        super().__init__()
        assert budget > 0, "a budget of no page group holds no token"
        self.layout = layout
        self.budget = budget
        self.num_blocks = layout.num_slots
        self.block_size = layout.region_len
        self._pages = pages
        self._watermark_groups = watermark_groups
        self._slots = [_Slot() for _ in range(layout.num_slots)]
        self._inactive = set(range(layout.num_slots))  # slots without an owner
        self._num_needed = 0  # page groups, over all slots; never more than the budget
        self._num_mapped = 0  # neither are these

    # ---- admission -----------------------------------------------------------------------------

    def fits(self, group: SequenceGroup) -> bool:
        """Whether the budget would hold the group's next step if it had all to itself."""
        return len(group.sequences) <= self.num_blocks and self._demand(group) <= self.budget

    def explain_rejection(self, group: SequenceGroup) -> str:
        length = group.sequences[0].num_tokens
        over = length - self.layout.tokens_in(self.budget)
        return (
            f"the prompt needs {self._demand(group)} page groups of {self.layout.group_bytes} "
            f"bytes, and the pool's bytes are {self.budget}: raise num_blocks, shorten the prompt "
            f"by {over} tokens, or choose smaller pages."
        )

    def can_admit(self, group: SequenceGroup, alone: bool) -> bool:
        """Whether there are slots and page groups, those that are surplus elsewhere among them."""
        watermark = 0 if alone else self._watermark_groups
        left = self.budget - self._num_needed - watermark
        return len(group.sequences) <= self.num_free and self._demand(group) <= left

    def admit(self, group: SequenceGroup) -> Admission:
        """Give every sequence a slot, and map what the tokens need that it has so far."""
        for seq in group.sequences:
            self._tables[seq.seq_id] = BlockTable(self.block_size, [], 0)
        copies = [pair for seq in group.sequences for pair in self.append(seq)]
        return Admission([0] * len(group.sequences), copies)

    # ---- growing -------------------------------------------------------------------------------

    def can_append(self, group: SequenceGroup) -> bool:
        """Whether there are slots and page groups for the next step of all its sequences.

        After it each of them has a slot of its own.
        """
        held = {block for seq in group.sequences for block in self._tables[seq.seq_id].blocks}
        by_others = self._num_needed - sum(self._slots[slot].needed for slot in held)
        new_slots = len(group.sequences) - len(held)
        return new_slots <= self.num_free and by_others + self._demand(group) <= self.budget

    def append(self, seq: Sequence) -> list[BlockPair]:
        """Map pages for every token of the sequence, in a slot that it owns alone.

        Returns the slot to copy first, where the sequence had to leave a shared one. Raises
        OutOfBlocks if slots or budget run out, before anything is mapped.
        """
        assert seq.num_tokens <= self.block_size, f"{seq} would grow into another slot"
        table = self._tables[seq.seq_id]
        needed = self.layout.groups_for(seq.num_tokens)
        alone = bool(table.blocks) and self.ref_count(table.blocks[0]) == 1
        slot = table.blocks[0] if alone else self._best_fit(needed)
        growth = needed - self._slots[slot].needed
        if self._num_needed + growth > self.budget:
            raise OutOfBlocks(f"all {self.budget} page groups are needed: free a sequence first.")
        pairs: list[BlockPair] = []
        if not alone:
            pairs = [(old, slot) for old in table.blocks]
            self._leave(table)
            self._own(table, slot)
        if growth > 0:
            self._grow(slot, growth)
        # On a GPU, to touch what is not mapped would be the end of the process.
        assert self._slots[slot].mapped >= needed, f"slot {slot} has tokens without pages"
        table.num_tokens = seq.num_tokens
        return pairs

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let a child share its parent's slot, until either of them is appended to.

        A child that has computed nothing gets a slot of its own by then. Slots have no other parts
        that could be shared.
        """
        tokens, has = child.num_computed_tokens, self._tables[parent.seq_id].num_tokens
        assert tokens in (0, has), f"only a whole slot can be shared, not {tokens} of {has} tokens"
        table = self._tables[child.seq_id] = BlockTable(self.block_size, [], tokens)
        if tokens:
            self._own(table, self._tables[parent.seq_id].blocks[0])

    def free(self, seq: Sequence) -> None:
        """Let go of a sequence's slot. Its pages stay mapped: deferred reclamation."""
        self._leave(self._tables.pop(seq.seq_id))

    # ---- what others may know ------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Slots that no sequence owns."""
        return len(self._inactive)

    @property
    def num_mapped(self) -> int:
        """Page groups that are mapped, whoever needs them."""
        return self._num_mapped

    def ref_count(self, block: int) -> int:
        """How many sequences own this slot."""
        return self._slots[block].num_owners

    def usage(self) -> MemoryUsage:
        """How the token slots of the budget are used; surplus page groups count as free."""
        tokens = {t.blocks[0]: t.num_tokens for t in self._tables.values() if t.blocks}
        used, needed = sum(tokens.values()), self.layout.tokens_in(self._num_needed)
        free = self.layout.tokens_in(self.budget) - needed
        return MemoryUsage(used, reserved=0, internal=needed - used, external=0, free=free)

    # ---- slots ---------------------------------------------------------------------------------

    def _demand(self, group: SequenceGroup) -> int:
        """Page groups for all tokens of the group, each sequence in a slot of its own."""
        return sum(self.layout.groups_for(seq.num_tokens) for seq in group.sequences)

    def _best_fit(self, needed: int) -> int:
        """The inactive slot with the smallest sufficient mapping; else with the largest."""
        if not self._inactive:
            raise OutOfBlocks(f"all {self.num_blocks} slots are in use: free one first.")

        def fit(slot: int) -> tuple[bool, int, int]:
            mapped = self._slots[slot].mapped
            return mapped < needed, abs(mapped - needed), slot

        return min(self._inactive, key=fit)

    def _own(self, table: BlockTable, slot: int) -> None:
        table.blocks.append(slot)
        self._slots[slot].num_owners += 1
        self._inactive.discard(slot)

    def _leave(self, table: BlockTable) -> None:
        while table.blocks:
            number = table.blocks.pop()
            slot = self._slots[number]
            slot.num_owners -= 1
            if slot.num_owners == 0:  # else all is needed still: who shares a slot has as many
                self._num_needed -= slot.needed
                slot.needed = 0
                self._inactive.add(number)

    # ---- page groups ---------------------------------------------------------------------------

    def _grow(self, number: int, growth: int) -> None:
        """Let a slot need more page groups, and map those that are not."""
        slot = self._slots[number]
        slot.needed += growth
        self._num_needed += growth
        missing = range(slot.mapped, slot.needed)
        if missing:
            self._reclaim(self._num_mapped + len(missing) - self.budget)
            self._pages.map(number, missing)
            slot.mapped = slot.needed
            self._num_mapped += len(missing)

    def _reclaim(self, num_groups: int) -> None:
        """Unmap surplus, from the highest slots down: the low ones are those in use.

        First that of slots that nobody owns: whoever runs will soon grow into its own.
        """
        inactive_first = sorted(range(self.num_blocks), key=lambda n: (n not in self._inactive, -n))
        for number in inactive_first if num_groups > 0 else ():
            slot = self._slots[number]
            surplus = min(num_groups, slot.mapped - slot.needed)
            if surplus > 0:
                self._pages.unmap(number, range(slot.mapped - surplus, slot.mapped))
                slot.mapped -= surplus
                self._num_mapped -= surplus
                num_groups -= surplus
        assert num_groups <= 0, "what is mapped and not needed must be enough: the budget says so"
