"""Iteration-level scheduling, first come, first served (sections 2.3 and 4.5).

Iteration-level means that every step decides anew. `schedule()` takes the running, swapped and
waiting groups and decides how many tokens of each sequence the model computes. A prompt, a chunk
of one, a decode step and a recomputation differ only in that number. The order is the first vLLM's:

    1. running groups, oldest first, get blocks for their next tokens; when the pool runs out, the
       youngest group is preempted, by swapping or by recomputation
    2. if no group was preempted, others join, oldest first: swapped groups return, waiting groups
       are admitted. A swapped group has run before, so it is older than every waiting one: no
       group is admitted while another is swapped

A group of several sequences that was preempted by recomputation returns with one sequence, from
which the others fork again. A group that joins shares its cached blocks. If a running group is
computing the next block that it needs, it joins a step later.

The oldest running group can take blocks from all others, so it advances in every step and finishes.
No group overtakes the oldest of those that do not run. Therefore no group starves.
"""

from bisect import insort
from collections.abc import Callable
from collections.abc import Sequence as Many

from minipaged.config import EngineConfig
from minipaged.errors import InvalidOption
from minipaged.memory import Memory
from minipaged.scheduler.admission import reject_what_can_never_run, should_wait
from minipaged.scheduler.output import Draft, ScheduledSequence, SchedulerOutput
from minipaged.sequence import Sequence, SequenceGroup, SequenceStatus

SelectVictim = Callable[[Many[SequenceGroup]], SequenceGroup]


def youngest(candidates: Many[SequenceGroup]) -> SequenceGroup:
    """The role `select_victim`: choose the latest arrival, as in the paper (section 4.5)."""
    return max(candidates, key=lambda group: group.arrival)


class FCFSScheduler:
    """Schedules requests first come, first served.

    It owns the three queues and the status of every group. Blocks belong to the memory.
    """

    def __init__(
        self, config: EngineConfig, memory: Memory, select_victim: SelectVictim = youngest
    ) -> None:
        self.config = config
        self.memory = memory
        self.waiting: list[SequenceGroup] = []  # all three in order of arrival
        self.running: list[SequenceGroup] = []
        self.swapped: list[SequenceGroup] = []
        self._select_victim = select_victim
        self._arrivals = 0

    # ---- adding and ending requests ------------------------------------------------------------

    def add(self, group: SequenceGroup) -> None:
        """Queue a new group. Raises PromptTooLong or InvalidRequest if it could never run."""
        reject_what_can_never_run(group, self.memory, self.config)
        group.arrival = self._arrivals
        self._arrivals += 1
        self.waiting.append(group)

    def fork(self, group: SequenceGroup, parent: Sequence, child_id: int) -> Sequence:
        """Split a sequence in two: one more sample or beam, which shares all its blocks.

        Fork before a sequence of the step gets a token or ends: the child copies its parent.
        """
        child = parent.fork(child_id)
        group.sequences.append(child)
        self.memory.fork(parent, child)
        return child

    def finish(self, group: SequenceGroup, seq: Sequence) -> None:
        """Remove a sequence that has generated its last token, and free its blocks."""
        (group.awaiting_refork if seq in group.awaiting_refork else group.sequences).remove(seq)
        if seq.seq_id in self.memory.tables:  # a waiting sequence holds no blocks
            self.memory.free(seq)
        if not group.sequences and not group.awaiting_refork:
            self._move(group, SequenceStatus.FINISHED)

    def abort(self, group: SequenceGroup) -> None:
        """End a group in any queue, and free its blocks."""
        for seq in [*group.sequences, *group.awaiting_refork]:
            self.finish(group, seq)

    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running or self.swapped)

    # ---- one step ------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Decide one step and reserve its blocks, without computing it."""
        draft = Draft(tokens_left=self.config.max_num_batched_tokens)
        self._refork()
        self._reserve_for_running(draft)
        self._share_out_tokens(draft)
        # A step that takes blocks away from one group gives none to another.
        if not draft.preempted and (self.swapped or self.waiting):
            self._let_others_join(draft)
        progress = (
            draft.sequences
            or draft.ended
            or any(group.awaiting_refork for group in self.running)  # one forks in the next step
            or not self.has_unfinished()
        )
        assert progress, "a step must compute a token or end a group, or the engine would hang"
        return SchedulerOutput(
            swap_out=tuple(draft.swap_out),
            swap_in=tuple(draft.swap_in),
            copies=tuple(draft.copies),
            sequences=tuple(draft.sequences),
            preempted=tuple(draft.preempted),
            ended=tuple(draft.ended),
            num_queried_tokens=draft.num_queried_tokens,
            num_cached_tokens=draft.num_cached_tokens,
        )

    def commit(self, output: SchedulerOutput) -> None:
        """Record that a step has run: its keys and values are written, its full blocks cached."""
        for _, seq, num_new_tokens, _ in output.sequences:
            seq.mark_computed(num_new_tokens)
            self.memory.cache_blocks(seq)

    def _reserve_for_running(self, draft: Draft) -> None:
        """Reserve blocks for the next tokens of all running groups, oldest first (section 4.5)."""
        served = 0  # running[:served] have their blocks; victims are chosen from the rest
        while served < len(self.running):
            group = self.running[served]
            has_room = self.memory.can_append(group)
            if has_room or self._make_room(group, self.running[served + 1 :], draft):
                for seq in group.sequences:
                    draft.copies += self.memory.append(seq)
                served += 1

    def _make_room(self, group: SequenceGroup, younger: list[SequenceGroup], draft: Draft) -> bool:
        """Preempt younger groups until this one fits. False: this one was preempted or ended."""
        while not self.memory.can_append(group):
            if not self.memory.fits(group):
                self._end(group, draft)
                return False
            if not younger:
                self._preempt(group, draft)
                return False
            victim = self._select_victim(younger)
            if victim not in younger:
                raise InvalidOption(
                    f"the part `select_victim` chose {victim!r}, which is not one of the groups "
                    "passed to it: let it return one of them."
                )
            younger.remove(victim)
            self._preempt(victim, draft)
        return True

    def _share_out_tokens(self, draft: Draft) -> None:
        """Give each decode one token, so that no prompt delays it, and the rest to prompt chunks.

        There is a token for every decode, because max_num_batched_tokens >= max_num_seqs, so a
        group's sequences advance together. Prompts share the remaining tokens in order. At least
        one of them advances, because it has a batch slot that no decode uses.
        """
        prompts: list[SequenceGroup] = []
        for group in self.running:
            if group.is_decoding:
                for seq in group.sequences:
                    draft.sequences.append(ScheduledSequence(group, seq, 1, samples=True))
                draft.tokens_left -= len(group.sequences)
            else:
                prompts.append(group)
        for group in prompts:
            self._take_tokens(group, draft)

    def _take_tokens(self, group: SequenceGroup, draft: Draft) -> None:
        """Give each sequence of a group as many of the remaining tokens as it can use.

        The sequences of a group sample in the same step, because the next beams are chosen among
        the candidates of all. While a recomputed group has a sequence that is incomplete or
        awaiting refork, the others therefore wait with their last token.
        """
        several = len(group.sequences) + len(group.awaiting_refork) > 1
        last_token_waits = several and not group.is_decoding
        for seq in group.sequences:
            left = seq.num_uncomputed_tokens
            num_new_tokens = min(left - 1 if last_token_waits else left, draft.tokens_left)
            if num_new_tokens > 0:
                samples = num_new_tokens == left
                draft.sequences.append(ScheduledSequence(group, seq, num_new_tokens, samples))
                draft.tokens_left -= num_new_tokens

    def _let_others_join(self, draft: Draft) -> None:
        """Let swapped and waiting groups join, oldest first, up to the first that does not fit."""
        taken = sum(group.num_batch_slots for group in self.running)
        batch_slots_left = self.config.max_num_seqs - taken
        while oldest := self.swapped[:1] + self.waiting[:1]:
            group = min(oldest, key=lambda g: g.arrival)
            if group.num_batch_slots > batch_slots_left or not self._can_join(group, draft):
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
            batch_slots_left -= group.num_batch_slots

    def _admit(self, group: SequenceGroup, draft: Draft) -> None:
        """Admit a waiting group; its cached tokens count as computed."""
        num_cached, copies = self.memory.admit(group)
        draft.copies += copies
        for seq, cached in zip(group.sequences, num_cached, strict=True):
            seq.mark_cached(cached)
            draft.num_queried_tokens += seq.num_tokens
            draft.num_cached_tokens += cached

    def _can_join(self, group: SequenceGroup, draft: Draft) -> bool:
        """Return whether enough tokens and blocks are left for the whole group."""
        if group.status is SequenceStatus.WAITING:
            [seq] = group.sequences  # no blocks, no forks
            cached = self.memory.num_cached_tokens(seq)
            least = 1 if self.config.enable_chunked_prefill else seq.num_tokens - cached
            reads_cache = self.config.enable_prefix_caching and seq.reads_cache
            if reads_cache and should_wait(seq, cached, self.running, self.memory.block_size):
                return False
        else:
            least = len(group.sequences)
        return least <= draft.tokens_left and self.memory.can_admit(group, alone=not self.running)

    # ---- preemption (section 4.5) --------------------------------------------------------------

    def _preempt(self, group: SequenceGroup, draft: Draft) -> None:
        """Take all blocks of a group: "auto" swaps groups of several and recomputes the others.

        The paper compares both (section 7.3), and vLLM's first version had this rule. A group of
        several sequences is swapped in every mode, unless the swap pool is full: recomputing it
        may take one step per sequence. See `_refork`.
        """
        mode, several = self.config.preemption, len(group.sequences) > 1
        swap = several or mode == "swap" or (mode == "auto" and group.num_batch_slots > 1)
        if swap and self.memory.can_swap_out(group):
            draft.swap_out += self.memory.swap_out(group)
            self._move(group, SequenceStatus.SWAPPED)
        else:
            for seq in group.sequences:
                self.memory.free(seq)
                seq.forget_computed()
            group.awaiting_refork[:0] = group.sequences[1:]
            del group.sequences[1:]
            self._move(group, SequenceStatus.WAITING)
        group.num_preemptions += 1
        draft.preempted.append(group)

    def _refork(self) -> None:
        """Fork the sequences of recomputed groups again.

        If each were computed separately, they would share no blocks and might not fit. The group
        therefore returns with one sequence, and forks again before the tokens diverge:

            A  "once a frog sat"  computes all but its last token, and waits
            B  "once a frog ran"  forks from A after "once a frog", and waits as well
            C  "once a cat ran"   forks from A after "once a", and computes "cat"
            then all three compute their last tokens and sample together

        They share only full blocks: a fork inside a block would write to one that may be cached.
        """
        size = self.memory.block_size
        for group in self.running:
            while group.awaiting_refork:
                if any(seq.num_uncomputed_tokens > 1 for seq in group.sequences):
                    break  # the newest is still being computed
                child = group.awaiting_refork.pop(0)
                in_common = {s: s.num_in_common(child) for s in group.sequences}
                parent = max(group.sequences, key=lambda s: in_common[s])
                most = min(in_common[parent], parent.num_computed_tokens)
                child.mark_computed(most // size * size)
                self.memory.fork(parent, child)
                group.sequences.append(child)

    def _end(self, group: SequenceGroup, draft: Draft) -> None:
        """End a group that the pool can never hold, with its present output."""
        self.abort(group)
        draft.ended.append(group)

    def _move(self, group: SequenceGroup, status: SequenceStatus) -> None:
        """Move a group from the queue of its status to that of a new one, in order of arrival."""
        queues = {
            SequenceStatus.WAITING: self.waiting,
            SequenceStatus.RUNNING: self.running,
            SequenceStatus.SWAPPED: self.swapped,
        }
        queues[group.status].remove(group)
        group.status = status
        if status in queues:
            insort(queues[status], group, key=lambda g: g.arrival)
