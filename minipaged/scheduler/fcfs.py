"""Who runs next: iteration-level scheduling, first come first served (sections 2.3 and 4.5).

Iteration-level means that every step begins anew: `schedule()` looks at who is running, swapped and
waiting, and says how many tokens of which sequence the model computes now. A prompt, a chunk of
one, a decode step and a recomputation differ only in that number. The order is the first vLLM's:

    1. the running, oldest first, get the blocks for their next tokens; when the pool runs out, the
       youngest is preempted, by swapping or by recomputation
    2. if nobody was preempted, those who do not run join, oldest first: the swapped come back, the
       waiting are admitted. Whoever is swapped has run before, and so is older than all who have
       not: nobody new is admitted while somebody is swapped

A group of several sequences that was preempted by recomputation comes back with one, from which the
others fork again. Whoever joins shares what the prefix cache finds of it; and if someone is just
computing the block that it would look for next, it joins a step later and finds it.

The oldest of the running can take all blocks from the others, so it advances in every step and
finishes; and nobody overtakes the oldest of those who do not run. So nobody starves.
"""

from bisect import insort
from collections.abc import Callable
from collections.abc import Sequence as Many
from operator import attrgetter
from typing import Protocol

from minipaged.config import EngineConfig
from minipaged.errors import InvalidOption
from minipaged.memory import Memory
from minipaged.scheduler.admission import reject_what_can_never_run
from minipaged.scheduler.output import SchedulerOutput
from minipaged.sequence import Sequence, SequenceGroup, SequenceStatus

SelectVictim = Callable[[Many[SequenceGroup]], SequenceGroup]


def youngest(candidates: Many[SequenceGroup]) -> SequenceGroup:
    """The role `select_victim`, as the paper plays it: last come, first preempted (section 4.5)."""
    return max(candidates, key=lambda group: group.arrival)


class Scheduler(Protocol):
    """The role `scheduler`: what the engine may ask and do. See `FCFSScheduler` for each."""

    @property
    def memory(self) -> Memory: ...
    @property
    def waiting(self) -> list[SequenceGroup]: ...
    @property
    def running(self) -> list[SequenceGroup]: ...
    @property
    def swapped(self) -> list[SequenceGroup]: ...
    def add(self, group: SequenceGroup) -> None: ...
    def schedule(self) -> SchedulerOutput: ...
    def commit(self, plan: SchedulerOutput) -> None: ...
    def fork(self, group: SequenceGroup, parent: Sequence, child_id: int) -> Sequence: ...
    def finish(self, group: SequenceGroup, seq: Sequence) -> None: ...
    def abort(self, group: SequenceGroup) -> None: ...
    def has_unfinished(self) -> bool: ...


class FCFSScheduler:
    """First come, first served.

    Owns the three queues and the status of every group. Holds no tokens and no blocks itself.
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

    # ---- requests come and go ------------------------------------------------------------------

    def add(self, group: SequenceGroup) -> None:
        """Queue a new group. Raises PromptTooLong or InvalidRequest if it could never run."""
        reject_what_can_never_run(group, self.memory, self.config)
        group.arrival = self._arrivals
        self._arrivals += 1
        self.waiting.append(group)

    def fork(self, group: SequenceGroup, parent: Sequence, child_id: int) -> Sequence:
        """Let a sequence go on in two ways: a sample or a beam more, which shares all its blocks.

        After a step, fork before anyone is given a token or ends: a child begins as its parent was.
        """
        child = parent.fork(child_id)
        group.sequences.append(child)
        self.memory.fork(parent, child)
        return child

    def finish(self, group: SequenceGroup, seq: Sequence) -> None:
        """A sequence has generated its last token: its blocks return at once."""
        (group.awaiting_refork if seq in group.awaiting_refork else group.sequences).remove(seq)
        if seq.seq_id in self.memory.tables:  # a waiting sequence holds no blocks
            self.memory.free(seq)
        if not group.sequences and not group.awaiting_refork:
            self._move(group, SequenceStatus.FINISHED)

    def abort(self, group: SequenceGroup) -> None:
        """End a group, wherever it stands; its blocks return at once."""
        for seq in [*group.sequences, *group.awaiting_refork]:
            self.finish(group, seq)

    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running or self.swapped)

    # ---- one step ------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Decide one step and reserve its blocks; nothing is computed yet."""
        plan = SchedulerOutput(tokens_left=self.config.max_num_batched_tokens)
        self._refork()
        self._reserve_for_running(plan)
        self._share_out_tokens(plan)
        # Whoever takes blocks away in a step gives none to newcomers.
        if not plan.preempted and (self.swapped or self.waiting):
            self._let_others_join(plan)
        comes_back = any(
            group.awaiting_refork for group in self.running
        )  # its next one forks a step later
        progress = plan.sequences or plan.ended or comes_back or not self.has_unfinished()
        assert progress, "a step must compute a token or end a group, or the engine would hang"
        return plan

    def commit(self, plan: SchedulerOutput) -> None:
        """The step has run: its keys and values are written, and full blocks can be found."""
        for scheduled in plan.sequences:
            scheduled.seq.mark_computed(scheduled.num_new_tokens)
            self.memory.cache_blocks(scheduled.seq)

    def _reserve_for_running(self, plan: SchedulerOutput) -> None:
        """Blocks for the next token of all who run, the oldest first (section 4.5)."""
        served = 0  # running[:served] have all they need; preemption takes only from behind them
        while served < len(self.running):
            group = self.running[served]
            has_room = self.memory.can_append(group)
            if has_room or self._make_room(group, self.running[served + 1 :], plan):
                self._append(group, plan)
                served += 1

    def _make_room(
        self, group: SequenceGroup, younger: list[SequenceGroup], plan: SchedulerOutput
    ) -> bool:
        """Preempt younger groups until this one can go on; False if it had to yield or end."""
        while not self.memory.can_append(group):
            if not self.memory.fits(group):
                self._end(group, plan)
                return False
            if not younger:
                self._preempt(group, plan)
                return False
            victim = self._select_victim(younger)
            if victim not in younger:
                raise InvalidOption(
                    f"the part `select_victim` chose {victim!r}, which is none of the groups that "
                    "it was given: let it return one of them."
                )
            younger.remove(victim)
            self._preempt(victim, plan)
        return True

    def _share_out_tokens(self, plan: SchedulerOutput) -> None:
        """Decodes first, one token each, so that no prompt makes them wait; then prompt chunks.

        There is a token for every decode, because max_num_batched_tokens >= max_num_seqs. So a
        group's sequences advance together. Prompts share what is left in order, and at least one of
        them advances: not all seats can be taken by decodes then.
        """
        # The sort is stable, and stays so in reverse.
        for group in sorted(self.running, key=attrgetter("is_decoding"), reverse=True):
            plan.add(group)

    def _let_others_join(self, plan: SchedulerOutput) -> None:
        """The swapped and the waiting, by age; the first that does not fit holds up the others."""
        batch_slots_left = self.config.max_num_seqs - sum(
            group.num_batch_slots for group in self.running
        )
        while oldest := self.swapped[:1] + self.waiting[:1]:
            group = min(oldest, key=lambda g: g.arrival)
            if group.num_batch_slots > batch_slots_left or not self._can_join(group, plan):
                if self.memory.fits(group):
                    break
                self._end(group, plan)
                continue
            if group.status is SequenceStatus.SWAPPED:
                plan.swap_in += self.memory.swap_in(group)
                self._append(group, plan)
            else:
                plan.copies += self.memory.admit(group)
            self._move(group, SequenceStatus.RUNNING)
            plan.add(group)
            batch_slots_left -= group.num_batch_slots

    def _can_join(self, group: SequenceGroup, plan: SchedulerOutput) -> bool:
        """Whether tokens and blocks are left for the whole group."""
        if group.status is SequenceStatus.WAITING:
            [seq] = group.sequences  # no blocks, no forks
            found = self.memory.num_cached_tokens(seq)
            least = 1 if self.config.enable_chunked_prefill else seq.num_tokens - found
            if self._finds_more_a_step_later(seq, found):
                return False
        else:
            least = len(group.sequences)
        alone = not self.running
        return least <= plan.tokens_left and self.memory.can_admit(group, alone)

    def _finds_more_a_step_later(self, seq: Sequence, found: int) -> bool:
        """Whether the block that a waiting prompt would look for next is just being computed.

        Nobody finds a block before it is written, so of two equal prompts that come together the
        second lets the first go ahead. It is a short wait: the block is written in this step, or as
        soon as the prompts before it have left tokens for it, which newcomers need as well.
        """
        size = self.memory.block_size
        stop = (found // size + 1) * size
        if not self.config.enable_prefix_caching or not seq.reads_cache:
            return False
        if found % size or stop > seq.num_tokens:  # all of it is found already
            return False
        return any(
            found <= other.num_computed_tokens < stop <= other.num_tokens
            and other.cache_salt == seq.cache_salt
            and other.token_ids[:stop] == seq.token_ids[:stop]
            for running in self.running
            if not running.is_decoding
            for other in running.sequences
        )

    # ---- preemption (section 4.5) --------------------------------------------------------------

    def _preempt(self, group: SequenceGroup, plan: SchedulerOutput) -> None:
        """Take all blocks of a group: "auto" swaps groups of several and recomputes the others.

        The paper describes both and compares them (section 7.3); the rule is the first vLLM's.
        A group of several sequences is swapped whatever the option says, unless the swap pool is
        full: to recompute it may take a step for every sequence. See `_refork`.
        """
        mode, several = self.config.preemption, len(group.sequences) > 1
        swap = several or mode == "swap" or (mode == "auto" and group.num_batch_slots > 1)
        if swap and self.memory.can_swap_out(group):
            plan.swap_out += self.memory.swap_out(group)
            self._move(group, SequenceStatus.SWAPPED)
        else:
            for seq in group.sequences:
                self.memory.free(seq)
                seq.forget_computed()
            group.sequences, group.awaiting_refork = (
                group.sequences[:1],
                group.sequences[1:] + group.awaiting_refork,
            )
            self._move(group, SequenceStatus.WAITING)
        group.num_preemptions += 1
        plan.preempted.append(group)

    def _refork(self) -> None:
        """Bring back the sequences of groups that were recomputed after they had forked.

        Computed each for itself, they would share nothing any more, and might not even fit. So such
        a group comes back as it came, with one sequence, and forks again before the tokens part:

            A  "once a frog sat"  is computed, all but its last token, and waits with that one
            B  "once a frog ran"  forks from A behind "once a frog", and waits as well
            C  "once a cat ran"   forks from A behind "once a", and computes "cat"
            then all three compute their last tokens, and sample together

        They share full blocks only. To fork inside a block would be to write into one that may be
        known by the parent's tokens.
        """
        size = self.memory.block_size
        for group in self.running:
            while group.awaiting_refork and all(
                s.num_uncomputed_tokens == 1 for s in group.sequences
            ):
                child = group.awaiting_refork.pop(0)
                in_common = {s: s.num_in_common(child) for s in group.sequences}
                parent = max(group.sequences, key=lambda s: in_common[s])
                most = min(in_common[parent], parent.num_computed_tokens)
                child.mark_computed(most // size * size)
                self.memory.fork(parent, child)
                group.sequences.append(child)

    def _end(self, group: SequenceGroup, plan: SchedulerOutput) -> None:
        """Out of memory for good: the group ends with what it has, and the others go on."""
        self.abort(group)
        plan.ended.append(group)

    def _append(self, group: SequenceGroup, plan: SchedulerOutput) -> None:
        for seq in group.sequences:
            plan.copies += self.memory.append(seq)

    def _move(self, group: SequenceGroup, status: SequenceStatus) -> None:
        """From the queue of its status to the queue of the new one, in order of arrival."""
        queues = {
            SequenceStatus.WAITING: self.waiting,
            SequenceStatus.RUNNING: self.running,
            SequenceStatus.SWAPPED: self.swapped,
        }
        queues[group.status].remove(group)
        group.status = status
        if status in queues:
            insort(queues[status], group, key=lambda g: g.arrival)
