"""Lab 4: classic mistakes, each with the task that it must cost points; and unusual right ones."""

BEGINNING = """
from minipaged.scheduler.fcfs import FCFSScheduler as Library
"""

WRONG = {
    "prompts_go_before_decodes": (
        1,
        """
class FCFSScheduler(Library):
    def _share_out_tokens(self, draft):
        for group in sorted(self.running, key=lambda g: g.is_decoding):
            self._take_tokens(group, draft)
""",
    ),
    "an_older_prompt_takes_all_tokens": (
        1,
        """
class FCFSScheduler(Library):
    def _share_out_tokens(self, draft):
        for group in self.running:
            self._take_tokens(group, draft)
""",
    ),
    "each_gets_the_whole_budget": (
        1,
        """
class FCFSScheduler(Library):
    def _share_out_tokens(self, draft):
        super()._share_out_tokens(draft)
        draft.tokens_left = self.config.max_num_batched_tokens
""",
    ),
    "never_notes_what_is_computed": (
        1,
        """
class FCFSScheduler(Library):
    def commit(self, output):
        for part in output.sequences:
            self.memory.cache_blocks(part.seq)
""",
    ),
    "publishes_nothing": (
        1,
        """
class FCFSScheduler(Library):
    def commit(self, output):
        for part in output.sequences:
            part.seq.mark_computed(part.num_new_tokens)
""",
    ),
    "static_batches": (
        2,
        """
class FCFSScheduler(Library):
    def _let_others_join(self, draft):
        if not self.running:
            super()._let_others_join(draft)
""",
    ),
    "one_joins_in_a_step": (
        2,
        """
class FCFSScheduler(Library):
    def _let_others_join(self, draft):
        before = len(self.running)
        can_join = self._can_join
        self._can_join = lambda g, p: len(self.running) == before and can_join(g, p)
        super()._let_others_join(draft)
""",
    ),
    "a_later_one_overtakes": (
        2,
        """
class FCFSScheduler(Library):
    def _let_others_join(self, draft):
        kept = []
        super()._let_others_join(draft)
        while not self.swapped and len(self.waiting) > 1:
            kept.append(self.waiting.pop(0))
            super()._let_others_join(draft)
        self.waiting[:0] = kept
""",
    ),
    "a_group_takes_one_seat": (
        2,
        """
class FCFSScheduler(Library):
    def _let_others_join(self, draft):
        batch_slots_left = self.config.max_num_seqs - len(self.running)
        while oldest := self.swapped[:1] + self.waiting[:1]:
            group = min(oldest, key=lambda g: g.arrival)
            if batch_slots_left < 1 or not self._can_join(group, draft):
                if self.memory.fits(group):
                    break
                self._end(group, draft)
                continue
            if group.status is SequenceStatus.SWAPPED:
                draft.swap_in += self.memory.swap_in(group)
                for seq in group.sequences:
                    draft.copies += self.memory.append(seq)
            else:
                self._admit(group, draft)
            self._move(group, SequenceStatus.RUNNING)
            self._take_tokens(group, draft)
            batch_slots_left -= 1
""",
    ),
    "ignores_the_watermark": (
        2,
        """
class FCFSScheduler(Library):
    def _can_join(self, group, draft):
        return draft.tokens_left > 0 and self.memory.can_admit(group, True)
""",
    ),
    "the_watermark_counts_for_the_first_as_well": (
        2,
        """
class FCFSScheduler(Library):
    def _can_join(self, group, draft):
        return super()._can_join(group, draft) and self.memory.can_admit(group, False)
""",
    ),
    "does_not_look_for_room": (
        2,
        """
class FCFSScheduler(Library):
    def _can_join(self, group, draft):
        return draft.tokens_left > 0
""",
    ),
    "admits_while_somebody_is_swapped": (
        2,
        """
class FCFSScheduler(Library):
    def _let_others_join(self, draft):
        swapped, self.swapped = self.swapped, []
        super()._let_others_join(draft)
        self.swapped = swapped
        super()._let_others_join(draft)
""",
    ),
    "never_swaps_in": (
        2,
        """
class FCFSScheduler(Library):
    def _let_others_join(self, draft):
        if not self.swapped:
            super()._let_others_join(draft)
""",
    ),
    "forgets_to_copy_what_was_swapped": (
        2,
        """
class FCFSScheduler(Library):
    def _let_others_join(self, draft):
        super()._let_others_join(draft)
        draft.swap_in.clear()
""",
    ),
    "forgets_a_waiting_request": (
        2,
        """
class FCFSScheduler(Library):
    def _let_others_join(self, draft):
        super()._let_others_join(draft)
        if self.waiting and self.waiting[0].num_batch_slots > 1:
            self.waiting.append(self.waiting.pop(0))
""",
    ),
    "starts_a_prompt_in_pieces_without_being_told": (
        2,
        """
class FCFSScheduler(Library):
    def _can_join(self, group, draft):
        return draft.tokens_left > 0 and self.memory.can_admit(group, not self.running)
""",
    ),
    "keeps_the_blocks_of_the_finished": (
        3,
        """
class FCFSScheduler(Library):
    def finish(self, group, seq):
        group.sequences.remove(seq)
        if not group.sequences:
            self._move(group, SequenceStatus.FINISHED)
""",
    ),
    "a_sample_waits_for_the_last_one": (
        3,
        """
class FCFSScheduler(Library):
    def finish(self, group, seq):
        self.memory.free(seq)
        group.sequences.remove(seq)
        group.awaiting_refork.append(seq)
        if not group.sequences:
            group.awaiting_refork.clear()
            self._move(group, SequenceStatus.FINISHED)
""",
    ),
    "never_finished": (
        3,
        """
class FCFSScheduler(Library):
    def finish(self, group, seq):
        group.sequences.remove(seq)
        self.memory.free(seq)
""",
    ),
    "aborts_only_who_runs": (
        3,
        """
class FCFSScheduler(Library):
    def abort(self, group):
        if group in self.running:
            super().abort(group)
""",
    ),
    "frees_what_a_waiting_one_does_not_have": (
        3,
        """
class FCFSScheduler(Library):
    def finish(self, group, seq):
        group.sequences.remove(seq)
        self.memory.free(seq)
        if not group.sequences:
            self._move(group, SequenceStatus.FINISHED)
""",
    ),
    "forgets_the_absent": (
        3,
        """
class FCFSScheduler(Library):
    def abort(self, group):
        for seq in list(group.sequences):
            self.finish(group, seq)
""",
    ),
    "preempts_the_oldest": (
        4,
        """
def youngest(candidates):
    return candidates[0]
""",
    ),
    "preempts_the_one_in_need": (
        4,
        """
class FCFSScheduler(Library):
    def _make_room(self, group, younger, draft):
        self._preempt(group, draft)
        return False
""",
    ),
    "preempts_once_and_hopes": (
        4,
        """
class FCFSScheduler(Library):
    def _make_room(self, group, younger, draft):
        victim = self._select_victim(younger) if younger else group
        self._preempt(victim, draft)
        return victim is not group
""",
    ),
    "preempts_all_who_are_younger": (
        4,
        """
class FCFSScheduler(Library):
    def _make_room(self, group, younger, draft):
        for victim in younger:
            self._preempt(victim, draft)
        return super()._make_room(group, [], draft)
""",
    ),
    "offers_the_one_in_need_and_the_older_ones_too": (
        4,
        """
class FCFSScheduler(Library):
    def _make_room(self, group, younger, draft):
        while not self.memory.can_append(group):
            victim = self._select_victim(self.running)
            self._preempt(victim, draft)
            if victim is group:
                return False
        return True
""",
    ),
    "serves_the_youngest_first": (
        4,
        """
class FCFSScheduler(Library):
    def _reserve_for_running(self, draft):
        for group in self.running[::-1]:
            others = [g for g in self.running if g is not group]
            if group in self.running and (
                self.memory.can_append(group) or self._make_room(group, others, draft)
            ):
                for seq in group.sequences:
                    draft.copies += self.memory.append(seq)
""",
    ),
    "goes_through_a_list_that_becomes_shorter": (
        4,
        """
class FCFSScheduler(Library):
    def _reserve_for_running(self, draft):
        for index, group in enumerate(self.running.copy()):
            if self.memory.can_append(group) or self._make_room(
                group, self.running[index + 1 :], draft
            ):
                for seq in group.sequences:
                    draft.copies += self.memory.append(seq)
""",
    ),
    "preempts_all_for_one_that_cannot_fit": (
        4,
        """
class FCFSScheduler(Library):
    def _make_room(self, group, younger, draft):
        while not self.memory.can_append(group):
            if not younger:
                self._preempt(group, draft)
                return False
            self._preempt(younger.pop(), draft)
        return True
""",
    ),
    "never_ends": (
        4,
        """
class FCFSScheduler(Library):
    def _make_room(self, group, younger, draft):
        while not self.memory.can_append(group):
            pass
        return True
""",
    ),
}

RIGHT = {
    "one_list_in_which_each_group_keeps_its_place": """
class FCFSScheduler(FCFSScheduler):
    def __init__(self, config, memory, select_victim=youngest):
        self.config, self.memory, self._select_victim = config, memory, select_victim
        self.groups = []
        self.num_arrivals = 0

    def of(self, status):
        return [group for group in self.groups if group.status is status]

    waiting = property(lambda self: self.of(SequenceStatus.WAITING))
    running = property(lambda self: self.of(SequenceStatus.RUNNING))
    swapped = property(lambda self: self.of(SequenceStatus.SWAPPED))

    def add(self, group):
        reject_what_can_never_run(group, self.memory, self.config)
        group.arrival = self.num_arrivals
        self.num_arrivals += 1
        self.groups.append(group)

    def _move(self, group, status):
        group.status = status
        if status is SequenceStatus.FINISHED:
            self.groups.remove(group)

    def _share_out_tokens(self, draft):
        decoding = [group for group in self.running if group.is_decoding]
        prompts = [group for group in self.running if not group.is_decoding]
        for group in decoding + prompts:
            self._take_tokens(group, draft)

    def _reserve_for_running(self, draft):
        for group in self.running:
            if group.status is not SequenceStatus.RUNNING:
                continue
            younger = [g for g in self.running if g.arrival > group.arrival]
            while younger and self.memory.fits(group) and not self.memory.can_append(group):
                victim = self._select_victim(younger)
                younger.remove(victim)
                self._preempt(victim, draft)
            if self.memory.can_append(group):
                for seq in group.sequences:
                    draft.copies += self.memory.append(seq)
            elif self.memory.fits(group):
                self._preempt(group, draft)
            else:
                self._end(group, draft)
""",
    "the_last_of_those_in_order": """
def youngest(candidates):
    return candidates[-1]
""",
}
