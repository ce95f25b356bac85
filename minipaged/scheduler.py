"""Who runs next: iteration-level, first come first served (sections 4.5 and 5).

Every step begins anew: `schedule()` looks at who is running, swapped and waiting, and says how many
tokens of which sequence the model computes now. A prompt, a chunk of one, a decode step and a
recomputation differ only in that number. The order is the paper's:

    1. the running, oldest first, get the blocks for their next tokens; when the pool runs out, the
       youngest is preempted, by swapping or by recomputation
    2. if nobody was preempted, the swapped come back
    3. if nobody is swapped any more, the waiting are admitted

The oldest group can always take all blocks from the others, so it always advances, finishes, and
makes the next one the oldest: nobody starves.
"""

from bisect import insort
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Protocol

from minipaged.config import EngineConfig
from minipaged.errors import InvalidRequest, PromptTooLong
from minipaged.memory import BlockPair, Memory
from minipaged.sequence import Sequence, SequenceGroup, SequenceStatus

Victim = Callable[[Many[SequenceGroup]], SequenceGroup]


def youngest(candidates: Many[SequenceGroup]) -> SequenceGroup:
    """The role `victim`, as the paper plays it: last come, first preempted (section 4.5)."""
    return max(candidates, key=lambda group: group.arrival)


@dataclass(frozen=True)
class ScheduledSequence:
    """One sequence's part in a step: its first `num_new_tokens` uncomputed tokens are computed."""

    group: SequenceGroup
    seq: Sequence
    num_new_tokens: int

    @property
    def samples(self) -> bool:
        """Whether nothing is left uncomputed, so that the next token can be sampled."""
        return self.num_new_tokens == self.seq.num_uncomputed_tokens


@dataclass
class ScheduledBatch:
    """What one step does. The block operations come first, in this order, then the model."""

    tokens_left: int
    swap_out: list[BlockPair] = field(default_factory=list[BlockPair])
    swap_in: list[BlockPair] = field(default_factory=list[BlockPair])
    copies: list[BlockPair] = field(default_factory=list[BlockPair])
    sequences: list[ScheduledSequence] = field(default_factory=list[ScheduledSequence])
    preempted: list[SequenceGroup] = field(default_factory=list[SequenceGroup])
    outgrown: list[SequenceGroup] = field(default_factory=list[SequenceGroup])  # ended: no room

    def add(self, group: SequenceGroup, seq: Sequence) -> None:
        """Give a sequence as many of the tokens that are left as it can use."""
        num_new_tokens = min(seq.num_uncomputed_tokens, self.tokens_left)
        if num_new_tokens > 0:
            self.sequences.append(ScheduledSequence(group, seq, num_new_tokens))
            self.tokens_left -= num_new_tokens


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
    def schedule(self) -> ScheduledBatch: ...
    def finish(self, group: SequenceGroup, seq: Sequence) -> None: ...
    def abort(self, group: SequenceGroup) -> None: ...
    def has_unfinished(self) -> bool: ...


class FCFSScheduler:
    """First come, first served.

    Owns the three queues and the status of every group. Holds no tokens and no blocks itself.
    """

    def __init__(self, config: EngineConfig, memory: Memory, victim: Victim = youngest) -> None:
        self.config = config
        self.memory = memory
        self.waiting: list[SequenceGroup] = []  # all three in order of arrival
        self.running: list[SequenceGroup] = []
        self.swapped: list[SequenceGroup] = []
        self._victim = victim
        self._arrivals = 0

    # ---- requests come and go ------------------------------------------------------------------

    def add(self, group: SequenceGroup) -> None:
        """Queue a new group. Raises PromptTooLong or InvalidRequest if it could never run."""
        self._refuse_what_can_never_run(group)
        group.arrival = self._arrivals
        self._arrivals += 1
        self.waiting.append(group)

    def finish(self, group: SequenceGroup, seq: Sequence) -> None:
        """A sequence has generated its last token: its blocks return at once."""
        self._release(group, seq)
        if not group.unfinished:
            self._queue_of(group).remove(group)
            group.status = SequenceStatus.FINISHED

    def abort(self, group: SequenceGroup) -> None:
        """End a group, wherever it stands; its blocks return at once."""
        for seq in group.unfinished:
            self.finish(group, seq)

    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running or self.swapped)

    # ---- one step ------------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch:
        """Decide one step and reserve its blocks; nothing is computed yet."""
        plan = ScheduledBatch(tokens_left=self.config.max_num_batched_tokens)
        self._reserve_for_running(plan)
        if not plan.preempted:  # whoever takes blocks away in a step gives none to newcomers
            self._swap_in(plan)
        self._share_out_tokens(plan)
        if not plan.preempted and not self.swapped:
            self._admit(plan)
        progress = plan.sequences or plan.outgrown or not self.has_unfinished()
        assert progress, "a step must compute a token or end a group, or the engine would hang"
        return plan

    def _reserve_for_running(self, plan: ScheduledBatch) -> None:
        """Blocks for the next token of all who run, the oldest first (section 4.5)."""
        todo, self.running = self.running, []
        while todo:
            group = todo.pop(0)
            if self._make_room(group, todo, plan):
                self._append(group, plan)
                self.running.append(group)

    def _make_room(
        self, group: SequenceGroup, younger: list[SequenceGroup], plan: ScheduledBatch
    ) -> bool:
        """Preempt younger groups until this one can go on; False if it had to yield itself."""
        while not self.memory.can_append(group):
            if self._has_outgrown_the_pool(group):
                self._end(group, plan)
                return False
            if not younger:
                self._preempt(group, plan)
                return False
            victim = self._victim(younger)
            younger.remove(victim)
            self._preempt(victim, plan)
        return True

    def _swap_in(self, plan: ScheduledBatch) -> None:
        """The swapped return in order, each as a whole, while blocks and seats last."""
        while self.swapped:
            group = self.swapped[0]
            if self._has_outgrown_the_pool(group):
                self.swapped.pop(0)
                self._end(group, plan)
                continue
            alone = not self.running
            if not self._has_seats(group) or not self.memory.can_swap_in(group, alone):
                break
            self.swapped.pop(0)
            plan.swap_in += self.memory.swap_in(group)
            self._append(group, plan)
            self._enqueue(group, self.running, SequenceStatus.RUNNING)

    def _share_out_tokens(self, plan: ScheduledBatch) -> None:
        """Decodes first, one token each, so that no prompt makes them wait; then prompt chunks.

        There is a token for every decode, because max_num_batched_tokens >= max_num_seqs. So a
        group's sequences advance together, and a prompt always gets at least one token.
        """
        for decoding in (True, False):
            for group in self.running:
                for seq in group.unfinished:
                    if (seq.num_uncomputed_tokens == 1) is decoding:
                        plan.add(group, seq)

    def _admit(self, plan: ScheduledBatch) -> None:
        """New groups in order; the first that does not fit holds up those behind it."""
        while self.waiting:
            group = self.waiting[0]
            if self._has_outgrown_the_pool(group):
                self.waiting.pop(0)
                self._end(group, plan)
                continue
            assert len(group.unfinished) == 1, "a group is admitted with one sequence, then forked"
            seq = group.unfinished[0]
            whole = not self.config.enable_chunked_prefill
            fits_the_step = plan.tokens_left >= (seq.num_tokens if whole else 1)
            alone = not self.running
            if not (
                fits_the_step and self._has_seats(group) and self.memory.can_admit(group, alone)
            ):
                break
            self.waiting.pop(0)
            self.memory.admit(group)
            self._enqueue(group, self.running, SequenceStatus.RUNNING)
            plan.add(group, seq)

    # ---- preemption (section 4.5) --------------------------------------------------------------

    def _preempt(self, group: SequenceGroup, plan: ScheduledBatch) -> None:
        """Take all blocks of a group: the paper swaps groups of several, recomputes the others.

        Forks share blocks, which recomputation would undo; so a group that has forked is swapped
        whatever the option says. If the swap pool is full, keys and values of a single sequence
        can still be computed again.
        """
        group.num_preemptions += 1
        plan.preempted.append(group)
        mode, forked = self.config.preemption, len(group.unfinished) > 1
        swap = forked or mode == "swap" or (mode == "auto" and group.max_num_seqs > 1)
        if swap and self.memory.can_swap_out(group):
            plan.swap_out += self.memory.swap_out(group)
            self._enqueue(group, self.swapped, SequenceStatus.SWAPPED)
        elif forked:
            self._end(group, plan)
        else:
            for seq in group.unfinished:
                self.memory.free(seq)
                seq.forget_computed()
            self._enqueue(group, self.waiting, SequenceStatus.WAITING)  # old, so at the front

    def _has_outgrown_the_pool(self, group: SequenceGroup) -> bool:
        """Whether the group could not go on even with the pool to itself."""
        return self.memory.blocks_needed(group) > self.memory.num_blocks

    def _end(self, group: SequenceGroup, plan: ScheduledBatch) -> None:
        """Out of memory for good: the group ends with what it has, and the others go on."""
        for seq in group.unfinished:
            self._release(group, seq)
        group.status = SequenceStatus.FINISHED
        plan.outgrown.append(group)

    # ---- small things --------------------------------------------------------------------------

    def _append(self, group: SequenceGroup, plan: ScheduledBatch) -> None:
        for seq in group.unfinished:
            plan.copies += self.memory.append(seq)

    def _release(self, group: SequenceGroup, seq: Sequence) -> None:
        group.finished_ids.add(seq.seq_id)
        if seq.seq_id in self.memory.tables:  # a waiting sequence holds no blocks
            self.memory.free(seq)

    def _has_seats(self, group: SequenceGroup) -> bool:
        taken = sum(other.num_seats for other in self.running)
        return taken + group.num_seats <= self.config.max_num_seqs

    def _enqueue(
        self, group: SequenceGroup, queue: list[SequenceGroup], status: SequenceStatus
    ) -> None:
        insort(queue, group, key=lambda g: g.arrival)
        group.status = status

    def _queue_of(self, group: SequenceGroup) -> list[SequenceGroup]:
        return {
            SequenceStatus.WAITING: self.waiting,
            SequenceStatus.RUNNING: self.running,
            SequenceStatus.SWAPPED: self.swapped,
        }[group.status]

    def _refuse_what_can_never_run(self, group: SequenceGroup) -> None:
        length = group.sequences[0].num_tokens
        needed, has = self.memory.blocks_needed(group), self.memory.num_blocks
        if length >= self.config.max_model_len:
            over = length - self.config.max_model_len + 1
            raise PromptTooLong(
                f"the prompt has {length} tokens, and prompt and output together may have "
                f"{self.config.max_model_len} (max_model_len). Shorten the prompt by {over} "
                f"{'token' if over == 1 else 'tokens'}, or raise max_model_len if the model allows."
            )
        if needed > has:
            size = self.memory.block_size
            raise PromptTooLong(
                f"the prompt needs {needed} blocks of {size} tokens, the pool has {has}. "
                f"Raise num_blocks to {needed} or shorten the prompt by {length - has * size} "
                "tokens."
            )
        if group.max_num_seqs > self.config.max_num_seqs:
            raise InvalidRequest(
                f"the request may hold {group.max_num_seqs} sequences at once, but max_num_seqs is "
                f"{self.config.max_num_seqs}. Ask for fewer, or raise max_num_seqs."
            )
