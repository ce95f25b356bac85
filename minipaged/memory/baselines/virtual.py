"""A baseline: vAttention, which leaves paging to the operating system (arXiv 2405.04437).

Paging exists because contiguous keys and values would have to be reserved for the longest sequence.
But an address range is not memory. Here each sequence gets a region, addresses for the longest
sequence allowed, and virtual memory maps pages to it as the sequence grows. Attention then reads an
ordinary tensor per sequence and needs no block table:

    region 0  [ page | page | page |      |      |      ]   3 page groups mapped, all needed
    region 1  [ page |      |      |      |      |      ]
    region 2  [ page | page |      |      |      |      ]   no owner: its sequence has ended

The price: a page is larger than a block, and nothing smaller than a region can be shared, so a fork
is copied as a whole. Mapping is slow (on a GPU, milliseconds per page group over all layers), hence
deferred reclamation: when a sequence ends, its pages stay mapped for the next owner of the region,
and are unmapped only when other regions run short.

For the scheduler a region is a block, and every block table has one entry.
"""

from dataclasses import dataclass

from minipaged.errors import OutOfBlocks
from minipaged.memory.baselines.plain import PlainMemory
from minipaged.memory.baselines.regions import Pages, RegionLayout
from minipaged.memory.block_table import BlockTable
from minipaged.memory.interface import Admission, BlockPair, MemoryUsage
from minipaged.sequence import Sequence, SequenceGroup
from minipaged.utils.counts import counted


@dataclass(frozen=True)
class VirtualKind:
    """The options in which one virtual memory differs from another; see `RegionLayout`."""

    huge_pages: bool = False  # 2 MiB, instead of the machine's smallest
    sliced: bool = False  # all layers of a token next to each other


VIRTUAL = {  # by the names for LLM(memory=...)
    "virtual": VirtualKind(),
    "virtual-sliced": VirtualKind(sliced=True),
    "virtual-2m": VirtualKind(huge_pages=True),
    "virtual-2m-sliced": VirtualKind(huge_pages=True, sliced=True),
}


@dataclass
class _Region:
    # [0, needed)       page groups that hold tokens of its owners
    # [needed, mapped)  surplus: still mapped from a previous owner
    # [mapped, ...)     addresses only
    needed: int = 0
    mapped: int = 0
    num_owners: int = 0


class VirtualMemory(PlainMemory):
    """Regions whose page groups are mapped as sequences grow, within a budget.

    A fork shares its parent's region until either is appended to: then all but the last to write
    move to regions of their own, with a copy.

    Args:
        layout: regions and pages.
        budget: how many page groups may be mapped at a time. The operating system itself would
            never refuse a page: it kills the process once memory runs out.
        pages: carries out what is decided here.
        watermark_groups: page groups that admission leaves free for running sequences to grow into.
    """

    def __init__(
        self, layout: RegionLayout, budget: int, pages: Pages, watermark_groups: int = 0
    ) -> None:
        super().__init__()
        assert budget > 0, "a budget of no page group holds no token"
        self.layout = layout
        self.budget = budget
        self.num_blocks = layout.num_regions
        self.block_size = layout.region_len
        self._pages = pages
        self._watermark_groups = watermark_groups
        self._regions = [_Region() for _ in range(layout.num_regions)]
        self._inactive = set(range(layout.num_regions))  # regions without an owner
        self._num_needed = 0  # page groups over all regions; never more than the budget
        self._num_mapped = 0  # the same

    # ---- admission -----------------------------------------------------------------------------

    def fits(self, group: SequenceGroup) -> bool:
        """Whether the whole budget would hold the group's next step."""
        return len(group.sequences) <= self.num_blocks and self._demand(group) <= self.budget

    def explain_rejection(self, group: SequenceGroup) -> str:
        length = group.sequences[0].num_tokens
        over = length - self.layout.tokens_in(self.budget)
        return (
            f"the prompt needs {self._demand(group)} page groups of {self.layout.group_bytes} "
            f"bytes, but the pool has {self.budget}: raise num_blocks, shorten the prompt by "
            f"{counted(over, 'token')}, or choose smaller pages."
        )

    def can_admit(self, group: SequenceGroup, alone: bool) -> bool:
        """Whether enough regions and page groups are free; surplus ones count as free."""
        watermark = 0 if alone else self._watermark_groups
        left = self.budget - self._num_needed - watermark
        return len(group.sequences) <= self.num_free and self._demand(group) <= left

    def admit(self, group: SequenceGroup) -> Admission:
        """Give every sequence a region, and map the page groups of its tokens so far."""
        for seq in group.sequences:
            self._tables[seq.seq_id] = BlockTable(self.block_size, [], 0)
        copies = [pair for seq in group.sequences for pair in self.append(seq)]
        return Admission([0] * len(group.sequences), copies)

    # ---- growing -------------------------------------------------------------------------------

    def can_append(self, group: SequenceGroup) -> bool:
        """Whether regions and page groups suffice for the next step of all its sequences.

        After that step each of them has a region of its own.
        """
        held = {block for seq in group.sequences for block in self._tables[seq.seq_id].blocks}
        by_others = self._num_needed - sum(self._regions[region].needed for region in held)
        new_regions = len(group.sequences) - len(held)
        return new_regions <= self.num_free and by_others + self._demand(group) <= self.budget

    def append(self, seq: Sequence) -> list[BlockPair]:
        """Map pages for every token of the sequence, in a region that it owns alone.

        Returns the region to copy first, if the sequence had to leave a shared one. Raises
        OutOfBlocks if regions or budget run out, before anything is mapped.
        """
        assert seq.num_tokens <= self.block_size, f"{seq} would grow into another region"
        table = self._tables[seq.seq_id]
        needed = self.layout.groups_for(seq.num_tokens)
        alone = bool(table.blocks) and self.ref_count(table.blocks[0]) == 1
        region = table.blocks[0] if alone else self._best_fit(needed)
        growth = needed - self._regions[region].needed
        if self._num_needed + growth > self.budget:
            raise OutOfBlocks(f"all {self.budget} page groups are needed: free a sequence first.")
        pairs: list[BlockPair] = []
        if not alone:
            pairs = [(old, region) for old in table.blocks]
            self._leave(table)
            self._own(table, region)
        if growth > 0:
            self._grow(region, growth)
        # Reading an unmapped page gives zeros, not an error: a fault would go unnoticed.
        assert self._regions[region].mapped >= needed, f"region {region} has tokens without pages"
        table.num_tokens = seq.num_tokens
        return pairs

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let a child share its parent's region until either is appended to.

        A child with nothing computed shares nothing: its next append gives it a region of its own.
        """
        tokens, has = child.num_computed_tokens, self._tables[parent.seq_id].num_tokens
        assert tokens in (0, has), f"a region is shared as a whole, not {tokens} of {has} tokens"
        table = self._tables[child.seq_id] = BlockTable(self.block_size, [], tokens)
        if tokens:
            self._own(table, self._tables[parent.seq_id].blocks[0])

    def free(self, seq: Sequence) -> None:
        """Release a sequence's region. Its pages stay mapped: deferred reclamation."""
        self._leave(self._tables.pop(seq.seq_id))

    # ---- inspection ----------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Regions without an owner."""
        return len(self._inactive)

    @property
    def num_mapped(self) -> int:
        """Page groups that are mapped, needed or surplus."""
        return self._num_mapped

    def ref_count(self, block: int) -> int:
        """The number of sequences that own this region."""
        return self._regions[block].num_owners

    def usage(self) -> MemoryUsage:
        """The use of the budget's token slots; surplus page groups count as free."""
        tokens = {t.blocks[0]: t.num_tokens for t in self._tables.values() if t.blocks}
        used, needed = sum(tokens.values()), self.layout.tokens_in(self._num_needed)
        free = self.layout.tokens_in(self.budget) - needed
        return MemoryUsage(used, reserved=0, internal=needed - used, external=0, free=free)

    # ---- regions -------------------------------------------------------------------------------

    def _demand(self, group: SequenceGroup) -> int:
        """Page groups for all tokens of the group, with a region for each sequence."""
        return sum(self.layout.groups_for(seq.num_tokens) for seq in group.sequences)

    def _best_fit(self, needed: int) -> int:
        """The inactive region with the smallest sufficient mapping, or else the largest one."""
        if not self._inactive:
            raise OutOfBlocks(f"no free region is left of {self.num_blocks}: free one first.")

        def fit(region: int) -> tuple[bool, int, int]:
            mapped = self._regions[region].mapped
            return mapped < needed, abs(mapped - needed), region

        return min(self._inactive, key=fit)

    def _own(self, table: BlockTable, region: int) -> None:
        table.blocks.append(region)
        self._regions[region].num_owners += 1
        self._inactive.discard(region)

    def _leave(self, table: BlockTable) -> None:
        while table.blocks:
            number = table.blocks.pop()
            region = self._regions[number]
            region.num_owners -= 1
            if region.num_owners == 0:  # otherwise its remaining owners need as much of it
                self._num_needed -= region.needed
                region.needed = 0
                self._inactive.add(number)

    # ---- page groups ---------------------------------------------------------------------------

    def _grow(self, number: int, growth: int) -> None:
        """Raise the need of a region, and map the page groups that are not mapped yet."""
        region = self._regions[number]
        region.needed += growth
        self._num_needed += growth
        missing = range(region.mapped, region.needed)
        if missing:
            self._reclaim(self._num_mapped + len(missing) - self.budget)
            self._pages.map(number, missing)
            region.mapped = region.needed
            self._num_mapped += len(missing)

    def _reclaim(self, num_groups: int) -> None:
        """Unmap surplus page groups, those of inactive regions first.

        A running sequence will soon grow into the surplus of its own region. Of the inactive ones,
        the highest go first: `_best_fit` takes low ones before equal ones.
        """
        inactive_first = sorted(range(self.num_blocks), key=lambda n: (n not in self._inactive, -n))
        for number in inactive_first if num_groups > 0 else ():
            region = self._regions[number]
            surplus = min(num_groups, region.mapped - region.needed)
            if surplus > 0:
                self._pages.unmap(number, range(region.mapped - surplus, region.mapped))
                region.mapped -= surplus
                self._num_mapped -= surplus
                num_groups -= surplus
        assert num_groups <= 0, "need never exceeds the budget, so the surplus must suffice"
