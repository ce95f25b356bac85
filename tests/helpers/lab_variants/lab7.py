"""Lab 7: classic mistakes, each with the task that it must cost points; and unusual right ones."""

BEGINNING = """
from minipaged.memory.block_manager import BlockManager as Library
from minipaged.scheduler.fcfs import FCFSScheduler as LibraryScheduler
"""

COPIES_TWICE = """
class BlockManager(Library):
    def _move(self, group, source, target, known):
        pairs = []
        for seq in group.sequences:
            table = self._tables[seq.seq_id]
            old, table.blocks = table.blocks, []
            for block in old:
                table.blocks.append(target.allocate())
                pairs.append((block, table.blocks[-1]))
            for block in reversed(old):
                source.free(block)
            table.num_cached_blocks = 0
        return pairs
"""

WRONG = {
    "a_shared_block_is_copied_twice": (1, COPIES_TWICE),
    "a_shared_block_has_one_owner": (
        1,
        """
class BlockManager(Library):
    def _move(self, group, source, target, known):
        moved, pairs = dict(known), []
        for seq in group.sequences:
            table = self._tables[seq.seq_id]
            for logical, block in reversed(list(enumerate(table.blocks))):
                if block not in moved:
                    moved[block] = target.allocate()
                    pairs.append((block, moved[block]))
                elif block in known:
                    target.share(moved[block])
                table.blocks[logical] = moved[block]
                source.free(block)
            table.num_cached_blocks = 0
        return pairs
""",
    ),
    "the_pairs_are_the_wrong_way_round": (
        1,
        """
class BlockManager(Library):
    def _move(self, group, source, target, known):
        return [(new, old) for old, new in super()._move(group, source, target, known)]
""",
    ),
    "the_blocks_of_the_pool_are_not_freed": (
        1,
        """
class BlockManager(Library):
    def swap_out(self, group):
        for block in {b for s in group.sequences for b in self._tables[s.seq_id].blocks}:
            self._pool.share(block)
        return super().swap_out(group)
""",
    ),
    "frees_into_the_wrong_pool": (
        1,
        """
class BlockManager(Library):
    def _move(self, group, source, target, known):
        return super()._move(group, target, target, known)
""",
    ),
    "does_not_note_who_is_swapped": (
        1,
        """
class BlockManager(Library):
    def swap_out(self, group):
        return self._move(group, self._pool, self._swap_pool, {})
""",
    ),
    "the_table_still_speaks_of_the_pool": (
        1,
        """
class BlockManager(Library):
    def swap_out(self, group):
        old = {s.seq_id: list(self._tables[s.seq_id].blocks) for s in group.sequences}
        pairs = super().swap_out(group)
        for seq_id, blocks in old.items():
            self._tables[seq_id].blocks = blocks
        return pairs
""",
    ),
    "only_the_first_sequence_goes": (
        1,
        """
class BlockManager(Library):
    def swap_out(self, group):
        return super().swap_out(type(group)(group.request_id, group.sequences[:1]))
""",
    ),
    "counts_a_shared_block_for_each": (
        1,
        """
class BlockManager(Library):
    def can_swap_out(self, group):
        needed = sum(len(self._tables[s.seq_id].blocks) for s in group.sequences)
        return self._swap_pool.num_free >= needed
""",
    ),
    "asks_how_large_the_swap_pool_is_and_not_how_empty": (
        1,
        """
class BlockManager(Library):
    def can_swap_out(self, group):
        return self._swap_pool.num_blocks >= self.num_distinct_blocks(group)
""",
    ),
    "lets_go_of_the_first_block_first": (
        1,
        """
class BlockManager(Library):
    def _move(self, group, source, target, known):
        moved, pairs = dict(known), []
        for seq in group.sequences:
            table = self._tables[seq.seq_id]
            old, table.blocks = table.blocks, []
            for block in old:
                if block in moved:
                    target.share(moved[block])
                else:
                    moved[block] = target.allocate()
                    pairs.append((block, moved[block]))
                table.blocks.append(moved[block])
                source.free(block)
            table.num_cached_blocks = sum(block in known for block in old)
        return pairs
""",
    ),
    "the_swapped_flag_is_left": (
        2,
        """
class BlockManager(Library):
    def swap_in(self, group):
        pairs = super().swap_in(group)
        self._swapped.update(s.seq_id for s in group.sequences)
        return pairs
""",
    ),
    "copies_what_is_still_cached": (
        2,
        """
class BlockManager(Library):
    def swap_in(self, group):
        pairs = self._move(group, self._swap_pool, self._pool, {})
        self._swapped.difference_update(s.seq_id for s in group.sequences)
        return pairs
""",
    ),
    "known_blocks_are_not_held": (
        2,
        """
class BlockManager(Library):
    def swap_in(self, group):
        known = self._still_cached(group)
        pairs = self._move(group, self._swap_pool, self._pool, known)
        self._swapped.difference_update(s.seq_id for s in group.sequences)
        return pairs
""",
    ),
    "known_blocks_are_held_for_ever": (
        2,
        """
class BlockManager(Library):
    def swap_in(self, group):
        known = self._still_cached(group)
        for block in known.values():
            self._pool.share(block)
        pairs = self._move(group, self._swap_pool, self._pool, known)
        self._swapped.difference_update(s.seq_id for s in group.sequences)
        return pairs
""",
    ),
    "what_came_back_is_never_published": (
        2,
        """
class BlockManager(Library):
    def swap_in(self, group):
        pairs = super().swap_in(group)
        for seq in group.sequences:
            self._tables[seq.seq_id].num_cached_blocks = seq.num_computed_tokens // self.block_size
        return pairs
""",
    ),
    "looks_for_known_blocks_after_the_move": (
        2,
        """
class BlockManager(Library):
    def swap_in(self, group):
        pairs = self._move(group, self._swap_pool, self._pool, {})
        known = self._still_cached(group)
        self._swapped.difference_update(s.seq_id for s in group.sequences)
        return [pair for pair in pairs if pair[1] not in known]
""",
    ),
    "still_believes_that_it_is_computed": (
        3,
        """
class FCFSScheduler(LibraryScheduler):
    def _preempt(self, group, draft):
        computed = {s: s.num_computed_tokens for s in group.sequences}
        super()._preempt(group, draft)
        for seq, number in computed.items():
            seq.num_computed_tokens = number
""",
    ),
    "keeps_the_blocks_of_the_recomputed": (
        3,
        """
class FCFSScheduler(LibraryScheduler):
    def _preempt(self, group, draft):
        if self.config.preemption == "swap" and self.memory.can_swap_out(group):
            return super()._preempt(group, draft)
        for seq in group.sequences:
            seq.forget_computed()
        self._move(group, SequenceStatus.WAITING)
        group.num_preemptions += 1
        draft.preempted.append(group)
""",
    ),
    "forgets_what_was_generated": (
        3,
        """
class FCFSScheduler(LibraryScheduler):
    def _preempt(self, group, draft):
        super()._preempt(group, draft)
        if group.status is SequenceStatus.WAITING:
            for seq in group.sequences:
                del seq.token_ids[seq.prompt_len :]
""",
    ),
    "the_plan_does_not_know_the_pairs": (
        3,
        """
class FCFSScheduler(LibraryScheduler):
    def _preempt(self, group, draft):
        super()._preempt(group, draft)
        draft.swap_out.clear()
""",
    ),
    "queues_at_the_end": (
        3,
        """
class FCFSScheduler(LibraryScheduler):
    def _preempt(self, group, draft):
        super()._preempt(group, draft)
        if group.status is SequenceStatus.WAITING:
            self.waiting.remove(group)
            self.waiting.append(group)
""",
    ),
    "is_not_counted": (
        3,
        """
class FCFSScheduler(LibraryScheduler):
    def _preempt(self, group, draft):
        super()._preempt(group, draft)
        group.num_preemptions = 0
""",
    ),
    "is_not_told": (
        3,
        """
class FCFSScheduler(LibraryScheduler):
    def _preempt(self, group, draft):
        super()._preempt(group, draft)
        draft.preempted.clear()
""",
    ),
    "never_asks_whether_there_is_room_to_swap": (
        3,
        """
class FCFSScheduler(LibraryScheduler):
    def _preempt(self, group, draft):
        if self.config.preemption != "swap":
            return super()._preempt(group, draft)
        draft.swap_out += self.memory.swap_out(group)
        self._move(group, SequenceStatus.SWAPPED)
        group.num_preemptions += 1
        draft.preempted.append(group)
""",
    ),
    "samples_are_recomputed_each_for_itself": (
        3,
        """
class FCFSScheduler(LibraryScheduler):
    def _preempt(self, group, draft):
        super()._preempt(group, draft)
        group.sequences += group.awaiting_refork
        group.awaiting_refork = []
""",
    ),
    "samples_are_lost": (
        3,
        """
class FCFSScheduler(LibraryScheduler):
    def _preempt(self, group, draft):
        super()._preempt(group, draft)
        group.awaiting_refork = []
""",
    ),
    "auto_swaps_all_groups": (
        3,
        """
class FCFSScheduler(LibraryScheduler):
    def _preempt(self, group, draft):
        config = self.config
        if config.preemption == "auto":
            self.config = replace(config, preemption="swap", num_swap_blocks=100)
        super()._preempt(group, draft)
        self.config = config

from dataclasses import replace
""",
    ),
}

RIGHT = {
    "in_three_passes": """
class BlockManager(Library):
    def can_swap_out(self, group):
        blocks = set()
        for seq in group.sequences:
            blocks.update(self._tables[seq.seq_id].blocks)
        return len(blocks) <= self._swap_pool.num_free

    def swap_out(self, group):
        for seq in group.sequences:
            self._swapped.add(seq.seq_id)
        return self.carry(group, self._pool, self._swap_pool, {})

    def swap_in(self, group):
        pairs = self.carry(group, self._swap_pool, self._pool, self._still_cached(group))
        for seq in group.sequences:
            self._swapped.remove(seq.seq_id)
        return pairs

    def carry(self, group, source, target, known):
        # First those that are known, for each reader; then new ones from the end; then the tables.
        tables = [self._tables[seq.seq_id] for seq in group.sequences]
        readers = [block for table in tables for block in table.blocks]
        for block in readers:
            if block in known:
                target.share(known[block])
        new = {}
        for block in reversed(readers):
            if block in new:
                target.share(new[block])
            elif block not in known:
                new[block] = target.allocate()
        for table in tables:
            for block in reversed(table.blocks):
                source.free(block)
            table.num_cached_blocks = len([block for block in table.blocks if block in known])
            table.blocks = [known[b] if b in known else new[b] for b in table.blocks]
        return sorted(new.items())


class FCFSScheduler(LibraryScheduler):
    def _preempt(self, group, draft):
        draft.preempted.append(group)
        group.num_preemptions += 1
        alone = group.num_batch_slots == 1
        if len(group.sequences) == 1 and (
            self.config.preemption == "recompute" or (self.config.preemption == "auto" and alone)
        ) or not self.memory.can_swap_out(group):
            while len(group.sequences) > 1:
                group.awaiting_refork.insert(0, group.sequences.pop())
            for seq in [*group.awaiting_refork, *group.sequences]:
                if seq.seq_id in self.memory.tables:
                    self.memory.free(seq)
                seq.forget_computed()
            self._move(group, SequenceStatus.WAITING)
        else:
            draft.swap_out.extend(self.memory.swap_out(group))
            self._move(group, SequenceStatus.SWAPPED)
""",
}
