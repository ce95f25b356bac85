"""Enforces the rules of lab 9: a policy may only decide who runs.

A simulator computes nothing, so a policy could cheat: use more memory than there is, skip the
computation of prompts, or drop requests. The referee runs between the simulator and the scheduler
and simulates the keys and values. It records what each step writes to each block, carries out the
copies and swaps that the scheduler decided, and checks that every sequence can read what it needs.
A policy that keeps more tokens than the pool has slots overwrites another sequence's tokens, which
the referee detects.

It cannot detect code that bypasses the scheduler's methods. See tutorials/labs/09.md.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from minipaged.errors import CheckFailed, MinipagedError
from minipaged.evaluation.sim.systems import Setting
from minipaged.memory import BlockPair, Memory
from minipaged.memory.interface import ceil_div
from minipaged.scheduler.interface import Scheduler
from minipaged.scheduler.output import ScheduledSequence, SchedulerOutput
from minipaged.sequence import Sequence, SequenceGroup
from minipaged.utils.counts import counted

Content = int | tuple[int, ...] | None
"""The content of a block. A full block: one hash of its tokens and all tokens before them. A
partial block: the hash of the previous block, then its own tokens. None: nothing was written."""

NEW_TOKEN = 0  # the simulator generates this token for every sequence


@dataclass
class _Record:
    """The referee's own record of a request, which a policy cannot edit."""

    group: SequenceGroup
    tokens: list[int]
    full: list[int] = field(default_factory=list[int])  # contents of its full blocks

    def content(self, logical: int, size: int, num_tokens: int) -> Content:
        """What a logical block must contain once the first `num_tokens` tokens are computed."""
        for number in range(len(self.full), num_tokens // size):
            tokens = self.tokens[number * size : (number + 1) * size]
            self.full.append(hash((self.full[-1] if number else 0, *tokens)))
        if (logical + 1) * size <= num_tokens:
            return self.full[logical]
        tokens = self.tokens[logical * size : num_tokens]
        return (self.full[logical - 1] if logical else 0, *tokens)


class Referee:
    """Wraps a scheduler and checks its decisions.

    Raises CheckFailed if a rule is broken, with the step, the request and the fault.
    """

    def __init__(self, scheduler: Scheduler, setting: Setting) -> None:
        self._scheduler = scheduler
        self._setting = setting
        self._records: dict[int, _Record] = {}  # by sequence id
        self._pool: list[Content] = [None] * setting.num_blocks
        self._swap_pool: list[Content] = [None] * setting.num_blocks
        self._num_steps = 0

    @property
    def memory(self) -> Memory:
        return self._scheduler.memory

    @property
    def waiting(self) -> list[SequenceGroup]:
        return self._scheduler.waiting

    @property
    def running(self) -> list[SequenceGroup]:
        return self._scheduler.running

    @property
    def swapped(self) -> list[SequenceGroup]:
        return self._scheduler.swapped

    # ---- called by the simulator -----------------------------------------------------------------

    def add(self, group: SequenceGroup) -> None:
        """Add a request, and hide its output length, which a real server cannot know."""
        [seq] = group.sequences
        seq.max_output_len = None
        self._records[seq.seq_id] = _Record(group, list(seq.token_ids))
        self._let(self._scheduler.add, group)

    def schedule(self) -> SchedulerOutput:
        """The policy's decision for this step, if it keeps the rules."""
        self._num_steps += 1
        output = self._let(self._scheduler.schedule)
        self._judge(output)
        return output

    def commit(self, output: SchedulerOutput) -> None:
        """The step is over."""
        self._let(self._scheduler.commit, output)

    def fork(self, group: SequenceGroup, parent: Sequence, child_id: int) -> Sequence:
        """Not used here: every request has one sequence."""
        return self._scheduler.fork(group, parent, child_id)

    def finish(self, group: SequenceGroup, seq: Sequence) -> None:
        """A request has generated all its tokens."""
        self._expect_own_tokens(self._records.pop(seq.seq_id), seq)
        self._let(self._scheduler.finish, group, seq)

    def abort(self, group: SequenceGroup) -> None:
        """Not used here: no request is aborted."""
        self._scheduler.abort(group)

    def has_unfinished(self) -> bool:
        """Whether the policy still has requests."""
        return self._scheduler.has_unfinished()

    def see_the_end(self) -> None:
        """Check, once all requests have finished, that every block is free again."""
        lost = self._setting.num_blocks - self.memory.num_free
        if lost:
            self._refuse(
                f"all requests have finished, but {counted(lost, 'block is', 'blocks are')} not "
                "free"
            )

    # ---- the rules -------------------------------------------------------------------------------

    def _judge(self, output: SchedulerOutput) -> None:
        names = [record.group.request_id for record in self._records.values()]
        if output.ended:
            self._refuse(f"request {output.ended[0].request_id} is ended before its last token")
        if not output.sequences:
            self._refuse(
                f"nothing is scheduled, but {counted(len(names), 'request waits', 'requests wait')}"
                f": request {names[0]} came first"
            )
        num_tokens, num_seqs = (
            sum(s.num_new_tokens for s in output.sequences),
            len(output.sequences),
        )
        if num_tokens > (most := self._setting.max_num_batched_tokens):
            self._refuse(
                f"{counted(num_tokens, 'token is', 'tokens are')} scheduled, but at most {most} "
                "are allowed"
            )
        if num_seqs > (most := self._setting.max_num_seqs):
            self._refuse(
                f"{counted(num_seqs, 'sequence runs', 'sequences run')}, but at most {most} "
                "are allowed"
            )
        if len({scheduled.seq.seq_id for scheduled in output.sequences}) < num_seqs:
            self._refuse("a sequence is scheduled twice")
        self._move(output.swap_out, self._pool, self._swap_pool)
        self._move(output.swap_in, self._swap_pool, self._pool)
        self._move(output.copies, self._pool, self._pool)
        tables = [self._look_up(scheduled) for scheduled in output.sequences]
        writers: dict[int, int] = {}  # block -> id of the sequence that writes to it
        for scheduled, blocks in zip(output.sequences, tables, strict=True):
            self._write(scheduled, blocks, writers)
        for scheduled, blocks in zip(output.sequences, tables, strict=True):
            mine = scheduled.seq.seq_id
            for block in writers.keys() & set(blocks):
                if writers[block] != mine:
                    self._refuse(f"a sequence writes to block {block}, which another one reads")
            if scheduled.samples:
                self._records[mine].tokens.append(NEW_TOKEN)  # as the simulator does

    def _move(
        self, pairs: Iterable[BlockPair], source: list[Content], target: list[Content]
    ) -> None:
        for pair in pairs:
            for block in pair:
                self._expect_in_pool(block)
        for block, content in [(to, source[block]) for block, to in pairs]:  # all at once
            target[block] = content

    def _look_up(self, scheduled: ScheduledSequence) -> list[int]:
        """The blocks of a sequence, which must contain all its computed tokens."""
        group, seq, num_new, samples = scheduled
        name, computed, size = group.request_id, seq.num_computed_tokens, self._setting.block_size
        record = self._records.get(seq.seq_id)
        if record is None:
            self._refuse(f"request {name} runs, but it has finished or was never added")
        self._expect_own_tokens(record, seq)
        left = len(record.tokens) - computed
        if not 1 <= num_new <= left or samples != (num_new == left):
            self._refuse(
                f"request {name} has {counted(left, 'token')} left to compute, but {num_new} are "
                "scheduled"
            )
        blocks = self.memory.tables[seq.seq_id].blocks[: ceil_div(computed + num_new, size)]
        if len(blocks) * size < computed + num_new:
            self._refuse(
                f"request {name} has {counted(len(blocks), 'block')} for "
                f"{counted(computed + num_new, 'token')}"
            )
        if blocks and not (min(blocks) >= 0 and max(blocks) < len(self._pool)):
            self._refuse(f"request {name} has block {max(blocks)}, but {self._pool_is}")
        if not self._finds(record, blocks, computed):
            self._refuse(
                f"request {name} reads keys and values that were never written there, or that "
                "were overwritten"
            )
        return blocks

    def _finds(self, record: _Record, blocks: list[int], computed: int) -> bool:
        size = self._setting.block_size
        num_full = computed // size
        last = record.content(num_full, size, computed)  # also fills record.full
        if [self._pool[block] for block in blocks[:num_full]] != record.full[:num_full]:
            return False
        if computed % size == 0 or (found := self._pool[blocks[num_full]]) == last:
            return True
        # If the whole prompt is cached, its last token is still computed again, for its logits.
        filled = (num_full + 1) * size
        return filled <= len(record.tokens) and found == record.content(num_full, size, filled)

    def _write(
        self, scheduled: ScheduledSequence, blocks: list[int], writers: dict[int, int]
    ) -> None:
        seq, size = scheduled.seq, self._setting.block_size
        record, stop = self._records[seq.seq_id], seq.num_computed_tokens + scheduled.num_new_tokens
        for logical in range(seq.num_computed_tokens // size, len(blocks)):
            block = blocks[logical]
            if block in writers:
                self._refuse(f"two sequences write to block {block}")
            writers[block] = seq.seq_id
            self._pool[block] = record.content(logical, size, stop)

    def _expect_own_tokens(self, record: _Record, seq: Sequence) -> None:
        if len(seq.token_ids) != len(record.tokens):
            self._refuse(
                f"request {record.group.request_id} has {counted(len(seq.token_ids), 'token')}, "
                f"but should have {len(record.tokens)}"
            )

    def _expect_in_pool(self, block: int) -> None:
        if not 0 <= block < len(self._pool):
            self._refuse(f"keys and values are moved to or from block {block}, but {self._pool_is}")

    @property
    def _pool_is(self) -> str:
        return f"the pool has {counted(len(self._pool), 'block')}, numbered from 0"

    def _refuse(self, what: str) -> NoReturn:
        raise CheckFailed(f"step {self._num_steps}: {what}.")

    def _let(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call the policy, and report an error with its step."""
        try:
            return call(*arguments)
        except (MinipagedError, NotImplementedError):
            raise
        except Exception as error:
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            where = "" if trace is None else f", line {trace.tb_lineno}"
            file = "" if trace is None else trace.tb_frame.f_code.co_filename
            raise CheckFailed(
                f"step {self._num_steps}: {type(error).__name__}: {error} ({file}{where})."
            ) from error
