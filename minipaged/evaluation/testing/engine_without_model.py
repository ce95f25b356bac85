"""An engine around a scheduler, without a model: it carries out and checks the decisions.

It adds requests, commits each step as if a model had computed it, forks prompts into samples,
appends a token to each sequence that samples, and finishes the sequences that have enough. The
tests of the scheduler, of the events and of the labs use it.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many

from minipaged.scheduler.fcfs import FCFSScheduler
from minipaged.scheduler.output import SchedulerOutput
from minipaged.sequence import Sequence, SequenceGroup, SequenceStatus
from minipaged.utils.counts import counted


class EngineWithoutModel:
    """One scheduler and its requests, numbered in the order in which they are added."""

    def __init__(self, scheduler: FCFSScheduler) -> None:
        self.scheduler = scheduler
        self.memory = scheduler.memory
        self.groups: list[SequenceGroup] = []
        self.lengths: list[int] = []  # number of tokens that each request generates
        self.samples: list[list[Sequence]] = []  # of each request, including those that have ended
        self.finished: list[int] = []
        self.ended: list[int] = []  # requests that have outgrown the pool
        self._next_id = 0

    def add(
        self, prompt_len: int, num_tokens: int = 5, width: int = 1, *, shared_prefix: bool = False
    ) -> SequenceGroup:
        """Add a request. All prompts with `shared_prefix` share their first tokens."""
        number = len(self.groups)
        first = 0 if shared_prefix else 1000 * (1 + number)
        seq = Sequence(self.new_id(), range(first, first + prompt_len))
        group = SequenceGroup(f"{number}", [seq], width=width)
        self.scheduler.add(group)
        self.groups.append(group)
        self.lengths.append(num_tokens)
        self.samples.append([seq])
        return group

    def step(self) -> SchedulerOutput:
        """One step, from the scheduler's decision to the new tokens."""
        decision = self.scheduler.schedule()
        self.check(decision)
        self.compute(decision)
        before = [scheduled.seq.num_computed_tokens for scheduled in decision.sequences]
        self.scheduler.commit(decision)
        sampling: dict[SequenceGroup, list[Sequence]] = {}
        for scheduled, computed in zip(decision.sequences, before, strict=True):
            seq, num_new = scheduled.seq, scheduled.num_new_tokens
            assert seq.num_computed_tokens == computed + num_new, (
                f"the step has computed {counted(num_new, 'token')} of {seq} after {computed}, "
                "but commit() has not recorded it"
            )
            if scheduled.samples:
                sampling.setdefault(scheduled.group, []).append(seq)
        for group, sequences in sampling.items():
            self.sample(group, sequences)
        self.ended += [int(group.request_id) for group in decision.ended]
        return decision

    def run(self, limit: int = 2000) -> list[SchedulerOutput]:
        """Run steps until every request has ended, and check that all blocks came back."""
        decisions: list[SchedulerOutput] = []
        while self.scheduler.has_unfinished():
            assert len(decisions) < limit, f"after {limit} steps there are still requests"
            decisions.append(self.step())
        self.check_that_all_came_back()
        return decisions

    def step_until(self, condition: Callable[[], object], limit: int = 300) -> None:
        """Run steps until `condition()` is true."""
        for _ in range(limit):
            if condition():
                return
            self.step()
        raise AssertionError(f"the expected event did not happen in {limit} steps")

    # ---- what a subclass may replace -------------------------------------------------------------

    def compute(self, decision: SchedulerOutput) -> None:
        """The model's part of a step: here nothing."""

    def sample(self, group: SequenceGroup, sequences: Many[Sequence]) -> None:
        """Append a token to each of these sequences of a group; fork and finish them when due."""
        number = int(group.request_id)
        if sequences[0].num_output_tokens == 0:
            while len(group.sequences) < group.width:
                child = self.scheduler.fork(group, sequences[0], self.new_id())
                self.samples[number].append(child)
            sequences = group.sequences
        for seq in sequences:
            seq.append(10**6 + seq.seq_id)  # no two sequences generate the same tokens
        for seq in list(group.sequences):
            if seq.num_output_tokens >= self.length_of(seq, number):
                self.scheduler.finish(group, seq)
        if not group.sequences:
            self.finished.append(number)

    def length_of(self, seq: Sequence, number: int) -> int:
        """The number of tokens that a sequence generates; each sample of a request ends later."""
        return self.lengths[number] + self.samples[number].index(seq)

    def new_id(self) -> int:
        """The next sequence's id."""
        self._next_id += 1
        return self._next_id - 1

    # ---- checks ----------------------------------------------------------------------------------

    def check(self, decision: SchedulerOutput) -> None:
        """Invariants in every step. Raises AssertionError."""
        config = self.scheduler.config
        total = sum(scheduled.num_new_tokens for scheduled in decision.sequences)
        num_seqs = len(decision.sequences)
        assert total <= config.max_num_batched_tokens, (
            f"{counted(total, 'token')} in a step, but max_num_batched_tokens is "
            f"{config.max_num_batched_tokens}"
        )
        assert num_seqs <= config.max_num_seqs, (
            f"{counted(num_seqs, 'sequence')} in a step, but max_num_seqs is {config.max_num_seqs}"
        )
        assert not (decision.swap_in and decision.swap_out), "swapped in and out in one step"
        scheduled_ids = [scheduled.seq.seq_id for scheduled in decision.sequences]
        assert len(scheduled_ids) == len(set(scheduled_ids)), "a sequence is in the step twice"
        for group, seq, num_new, _ in decision.sequences:
            assert group.status is SequenceStatus.RUNNING, f"{group} is in the step"
            assert num_new >= 1, f"{seq} is in the step, but computes nothing"
            slots = self.memory.tables[seq.seq_id].num_tokens
            last = seq.num_computed_tokens + num_new
            assert last <= slots, (
                f"{seq} computes {counted(last, 'token')}, but has slots for {slots}"
            )
        self._check_queues()

    def _check_queues(self) -> None:
        for name in ("waiting", "running", "swapped"):
            arrivals = [group.arrival for group in getattr(self.scheduler, name)]
            assert arrivals == sorted(arrivals), f"`{name}` is not in order of arrival: {arrivals}"
        for group in self.scheduler.swapped:
            swapped = [self.memory.is_swapped(seq.seq_id) for seq in group.sequences]
            assert all(swapped), f"only some sequences of {group} are swapped out"

    def check_that_all_came_back(self) -> None:
        """Check that all blocks are free after every request has ended. Raises AssertionError."""
        memory = self.memory
        lost = memory.num_blocks - memory.num_free
        assert lost == 0, f"all requests have ended, but {counted(lost, 'block')} did not come back"
        lost = memory.num_swap_blocks - memory.num_free_swap_blocks
        assert lost == 0, (
            f"all requests have ended, but {counted(lost, 'swap block')} did not come back"
        )


def tokens_of(decision: SchedulerOutput) -> dict[int, int]:
    """The number of tokens that a step computes, by request."""
    tokens: dict[int, int] = {}
    for scheduled in decision.sequences:
        number = int(scheduled.group.request_id)
        tokens[number] = tokens.get(number, 0) + scheduled.num_new_tokens
    return tokens


def numbers(groups: Many[SequenceGroup]) -> list[int]:
    """The numbers of these requests."""
    return [int(group.request_id) for group in groups]
