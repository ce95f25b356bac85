"""Memory under any calls in any order, next to a model of the tensors."""

import copy

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from minipaged.errors import OutOfBlocks
from minipaged.evaluation.testing.admission import admit
from minipaged.memory import (
    BlockAllocator,
    BlockManager,
    CheckedAllocator,
    CheckedMemory,
)
from minipaged.sequence import Sequence, SequenceGroup

# Few tokens and short blocks: prompts often share a prefix, and generate the same tokens.
TOKENS = st.integers(0, 1)


SALTS = st.sampled_from([None, None, None, "salt"])


def runs_out(call) -> bool:
    try:
        call()
    except OutOfBlocks:
        return True
    return False


class AnyOrder(RuleBasedStateMachine):
    """Admit, compute, append, fork, free, preempt, swap and pin, under `Checked`."""

    manager = BlockManager
    allocator = BlockAllocator

    @initialize(
        num_blocks=st.integers(3, 14),
        num_swap_blocks=st.integers(0, 14),
        block_size=st.integers(1, 4),
        caching=st.sampled_from([True, True, True, False]),
    )
    def build(self, num_blocks, num_swap_blocks, block_size, caching) -> None:
        self.memory = CheckedMemory(
            self.manager(
                num_blocks=num_blocks,
                num_swap_blocks=num_swap_blocks,
                block_size=block_size,
                allocator=lambda n: CheckedAllocator(self.allocator(n)),
                enable_prefix_caching=caching,
            )
        )
        self.block_size = block_size
        self.pool: dict[int, list] = {b: [None] * block_size for b in range(num_blocks)}
        self.swap_pool: dict[int, list] = {b: [None] * block_size for b in range(num_swap_blocks)}
        self.groups: list[SequenceGroup] = []
        self.pinned: list[Sequence] = []
        self.next_id = 0

    def new_id(self) -> int:
        self.next_id += 1
        return self.next_id

    # ---- the model of the tensors ----------------------------------------------------------------

    def content(self, seq: Sequence, position: int) -> tuple:
        return seq.cache_salt, tuple(seq.token_ids[: position + 1])

    def place(self, seq: Sequence, position: int) -> tuple[int, int]:
        return divmod(self.memory.tables[seq.seq_id].slot(position), self.block_size)

    def copy_blocks(self, pairs, source: dict[int, list], target: dict[int, list]) -> None:
        for old, new in pairs:
            target[new] = list(source[old])

    # ---- operations ------------------------------------------------------------------------------

    def those(self, swapped: bool) -> list[SequenceGroup]:
        out = [self.memory.is_swapped(g.sequences[0].seq_id) for g in self.groups]
        return [g for g, is_out in zip(self.groups, out, strict=True) if is_out is swapped]

    def join(self, group: SequenceGroup) -> bool:
        """Admit a group if there is room; there is room if and only if it works."""
        self.check_fits(group)
        if not self.memory.can_admit(group, alone=True):
            assert runs_out(lambda: admit(self.memory_apart(), copy.deepcopy(group)))
            return False
        self.copy_blocks(admit(self.memory, group), self.pool, self.pool)
        assert all(s.num_uncomputed_tokens >= 1 for s in group.sequences)
        return True

    def memory_apart(self) -> BlockManager:
        """A copy on which to try calls that must fail."""
        return copy.deepcopy(self.memory._memory)

    def check_fits(self, group: SequenceGroup) -> None:
        """A group fits if and only if there is room for it once all others have left."""
        alone = self.memory_apart()
        for other in self.groups:
            for seq in other.sequences if other is not group else ():
                alone.free(seq)
        seq_id = group.sequences[0].seq_id
        runs = seq_id in self.memory.tables and not self.memory.is_swapped(seq_id)
        there_is_room = alone.can_append(group) if runs else alone.can_admit(group, alone=True)
        assert self.memory.fits(group) is there_is_room

    @rule(tokens=st.lists(TOKENS, min_size=1, max_size=14), salt=SALTS, reads=st.integers(0, 5))
    def admit(self, tokens: list[int], salt: str | None, reads: int) -> None:
        self.admit_new(Sequence(self.new_id(), tokens, cache_salt=salt, reads_cache=reads > 0))

    @precondition(lambda self: self.groups)
    @rule(data=st.data(), reads=st.booleans())
    def admit_alike(self, data, reads: bool) -> None:
        """A prompt that is the beginning of what another sequence has."""
        [model] = data.draw(st.sampled_from(self.groups)).sequences[:1]
        tokens = model.token_ids[: data.draw(st.integers(1, model.num_tokens))]
        salt = model.cache_salt
        self.admit_new(Sequence(self.new_id(), tokens, cache_salt=salt, reads_cache=reads))

    def admit_new(self, seq: Sequence) -> None:
        group = SequenceGroup(str(seq.seq_id), [seq])
        if self.join(group):
            self.groups.append(group)

    @precondition(lambda self: self.those(swapped=False))
    @rule(data=st.data(), most=st.sampled_from([1, 3, 99, 99, 99]))
    def compute(self, data, most: int) -> None:
        """Play the model: write uncomputed tokens into their slots."""
        self.compute_group(data.draw(st.sampled_from(self.those(swapped=False))), most)

    def compute_group(self, group: SequenceGroup, most: int = 99) -> None:
        for seq in group.sequences:
            start = seq.num_computed_tokens
            stop = min(seq.num_tokens, start + most)
            for position in range(start, stop):
                block, offset = self.place(seq, position)
                before, now = self.pool[block][offset], self.content(seq, position)
                assert self.memory.ref_count(block) == 1 or before == now, "written while shared"
                self.pool[block][offset] = now
            seq.mark_computed(stop - start)
            self.memory.cache_blocks(seq)

    @precondition(lambda self: self.those(swapped=False))
    @rule(data=st.data(), times=st.integers(1, 5))
    def generate(self, data, times: int) -> None:
        group = data.draw(st.sampled_from(self.those(swapped=False)))
        for _ in range(times):
            if group in self.groups:
                self.append(group, data)
                self.compute_group(group)

    def append(self, group: SequenceGroup, data) -> None:
        for seq in group.sequences:
            if not seq.num_uncomputed_tokens:
                seq.append(data.draw(TOKENS))
        self.check_fits(group)
        if not self.memory.can_append(group):
            apart = self.memory_apart()
            assert runs_out(lambda: [apart.append(seq) for seq in group.sequences])
            self.give_up(group)
            group.sequences = []
            return
        for seq in group.sequences:
            self.copy_blocks(self.memory.append(seq), self.pool, self.pool)

    def give_up(self, group: SequenceGroup) -> None:
        for seq in group.sequences:
            self.memory.free(seq)
        self.groups.remove(group)

    @precondition(lambda self: self.those(swapped=False))
    @rule(data=st.data())
    def fork(self, data) -> None:
        group = data.draw(st.sampled_from(self.those(swapped=False)))
        parent = data.draw(st.sampled_from(group.sequences))
        if len(group.sequences) < 4 and parent.num_uncomputed_tokens == 0:
            child = parent.fork(self.new_id())
            group.sequences.append(child)
            self.memory.fork(parent, child)

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def free(self, data) -> None:
        group = data.draw(st.sampled_from(self.groups))
        seq = data.draw(st.sampled_from(group.sequences))
        self.memory.free(seq)
        group.sequences.remove(seq)
        if not group.sequences:
            self.groups.remove(group)

    @precondition(lambda self: self.those(swapped=False))
    @rule(data=st.data())
    def preempt_and_recompute(self, data) -> None:
        group = data.draw(st.sampled_from(self.those(swapped=False)))
        self.give_up(group)
        for seq in group.sequences:
            seq.forget_computed()
        if self.join(group):
            self.groups.append(group)

    @precondition(lambda self: self.those(swapped=False))
    @rule(data=st.data())
    def swap_out(self, data) -> None:
        group = data.draw(st.sampled_from(self.those(swapped=False)))
        if self.memory.can_swap_out(group):
            self.copy_blocks(self.memory.swap_out(group), self.pool, self.swap_pool)

    @precondition(lambda self: self.those(swapped=True))
    @rule(data=st.data())
    def swap_in(self, data) -> None:
        group = data.draw(st.sampled_from(self.those(swapped=True)))
        distinct = self.memory.num_distinct_blocks(group)
        self.check_fits(group)
        if self.memory.can_admit(group, alone=True):
            self.copy_blocks(self.memory.swap_in(group), self.swap_pool, self.pool)
            assert self.memory.num_distinct_blocks(group) <= distinct, "sharing survives a swap"
            for seq in group.sequences:
                self.copy_blocks(self.memory.append(seq), self.pool, self.pool)
        else:
            apart = self.memory_apart()
            assert runs_out(
                lambda: (apart.swap_in(group), [apart.append(seq) for seq in group.sequences])
            )

    @rule(tokens=st.lists(TOKENS, min_size=1, max_size=8))
    def pin(self, tokens: list[int]) -> None:
        seq = Sequence(self.new_id(), tokens)
        assert self.memory.pin(seq) == len(self.memory.tables[seq.seq_id]) * self.block_size
        self.pinned.append(seq)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data) -> None:
        seq = data.draw(st.sampled_from(self.pinned))
        self.pinned.remove(seq)
        self.memory.free(seq)

    # ---- invariants ------------------------------------------------------------------------------

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for group in getattr(self, "groups", []):
            swapped = self.memory.is_swapped(group.sequences[0].seq_id)
            for seq in group.sequences:
                self.check_reads(seq, self.swap_pool if swapped else self.pool, None)
        for seq in getattr(self, "pinned", []):
            self.check_reads(seq, self.pool, self.memory.tables[seq.seq_id].num_tokens)

    def check_reads(self, seq: Sequence, pool: dict[int, list], num_tokens: int | None) -> None:
        for position in range(seq.num_computed_tokens if num_tokens is None else num_tokens):
            block, offset = self.place(seq, position)
            assert pool[block][offset] == self.content(seq, position)

    @invariant()
    def usage_adds_up(self) -> None:
        if hasattr(self, "memory"):
            usage = self.memory.usage()
            assert usage.total == self.memory.num_blocks * self.block_size

    def teardown(self) -> None:
        if not hasattr(self, "memory"):
            return
        for group in self.groups.copy():
            self.give_up(group)
        for seq in self.pinned:
            self.memory.free(seq)
        assert self.memory.num_free == self.memory.num_blocks
        assert self.memory.num_free_swap_blocks == self.memory.num_swap_blocks
        # A request that needs all blocks gets all of them, and no lookup finds a block any more.
        all_slots = [9] * self.memory.num_blocks * self.block_size
        admit(self.memory, SequenceGroup("all", [Sequence(0, all_slots)]))
        assert not self.memory.cached
