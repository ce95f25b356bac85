"""The scheduler under requests that come, fork and end at any time, and a model of the tensors.

The model plays runner and engine: it carries out the block operations of each step in their order,
writes into each slot what its keys and values depend on, and lets samples and beams fork. Whatever
a step reads must be what the sequence itself, or an equal one, has written.
"""

from collections.abc import Sequence as Many
from dataclasses import replace
from random import Random

import pytest
from full_set import examples
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from scheduling import CONFIG

from minipaged.config import EngineConfig
from minipaged.engine.parts import Parts
from minipaged.errors import CheckFailed, DoubleFree, OutOfBlocks, PromptTooLong
from minipaged.evaluation.testing.engine_without_model import EngineWithoutModel
from minipaged.scheduler.fcfs import FCFSScheduler
from minipaged.scheduler.output import ScheduledSequence, SchedulerOutput
from minipaged.sequence import Sequence, SequenceGroup, SequenceStatus


class EngineWithTensors(EngineWithoutModel):
    """Plays the tensors too: each slot holds what its keys and values depend on."""

    def __init__(self, scheduler: FCFSScheduler, seed: int) -> None:
        super().__init__(scheduler)
        config = scheduler.config
        self.block_size = config.block_size
        self.pool = {block: [None] * config.block_size for block in range(config.num_blocks)}
        self.swap_pool = {
            block: [None] * config.block_size for block in range(config.num_swap_blocks)
        }
        self.random = Random(seed)
        self.tokens_left: dict[str, int] = {}
        self.beams: set[str] = set()

    def compute(self, decision: SchedulerOutput) -> None:
        self.move_blocks(decision.swap_out, self.pool, self.swap_pool)
        self.move_blocks(decision.swap_in, self.swap_pool, self.pool)
        self.move_blocks(decision.copies, self.pool, self.pool)
        for scheduled in decision.sequences:
            self.write(scheduled)
        for scheduled in decision.sequences:
            self.check_reads(scheduled)

    def move_blocks(self, pairs, source: dict[int, list], target: dict[int, list]) -> None:
        contents = [list(source[block]) for block, _ in pairs]
        for (_, block), content in zip(pairs, contents, strict=True):
            target[block] = content

    def content(self, seq: Sequence, position: int) -> tuple:
        return seq.cache_salt, tuple(seq.token_ids[: position + 1])

    def place(self, seq: Sequence, position: int) -> tuple[int, int]:
        table = self.memory.tables[seq.seq_id]
        return divmod(table.slot(position), self.block_size)

    def write(self, scheduled: ScheduledSequence) -> None:
        seq = scheduled.seq
        start = seq.num_computed_tokens
        for position in range(start, start + scheduled.num_new_tokens):
            block, offset = self.place(seq, position)
            before, now = self.pool[block][offset], self.content(seq, position)
            own = self.memory.ref_count(block) == 1 and block not in self.memory.cached
            assert own or before == now, "written while shared, or while others can find it"
            self.pool[block][offset] = now

    def check_reads(self, scheduled: ScheduledSequence) -> None:
        seq = scheduled.seq
        for position in range(seq.num_computed_tokens + scheduled.num_new_tokens):
            block, offset = self.place(seq, position)
            assert self.pool[block][offset] == self.content(seq, position)

    def sample(self, group: SequenceGroup, sequences: Many[Sequence]) -> None:
        """One token more; samples fork once, beams fork and are pruned in every step."""
        assert sequences == group.sequences, "the sequences of a group sample together"
        parents = group.sequences.copy()
        chosen = parents
        if parents[0].num_output_tokens == 0:
            chosen = parents * group.width
        elif group.request_id in self.beams:
            chosen = self.random.choices(parents, k=group.width)
        going_on: list[Sequence] = []
        for parent in chosen:
            again = parent in going_on
            going_on.append(self.scheduler.fork(group, parent, self.new_id()) if again else parent)
        for seq in parents:
            if seq not in going_on:
                self.scheduler.finish(group, seq)
        for seq in going_on:
            seq.append(self.random.randrange(2))
        self.tokens_left[group.request_id] -= 1
        if self.tokens_left[group.request_id] == 0:
            for seq in group.sequences.copy():
                self.scheduler.finish(group, seq)
        elif group.request_id not in self.beams and self.random.random() < 0.1:
            self.scheduler.finish(group, group.sequences[-1])  # one sample ends before the others


class AnyRequests(RuleBasedStateMachine):
    """Requests of one sequence, of several samples or of beams are added, computed and aborted."""

    scheduler_class = FCFSScheduler

    @initialize(
        num_blocks=st.integers(4, 24),
        num_swap_blocks=st.sampled_from([0, 3, 40]),
        block_size=st.sampled_from([1, 2, 4]),
        preemption=st.sampled_from(["auto", "recompute", "swap"]),
        chunked=st.booleans(),
        budget=st.integers(8, 40),
        caching=st.sampled_from([True, True, False]),
        watermark=st.sampled_from([0.0, 0.2]),
        seed=st.integers(0, 1000),
    )
    def build(
        self, num_blocks, num_swap_blocks, block_size, preemption, chunked, budget, caching,
        watermark, seed,
    ) -> None:  # fmt: skip
        config = EngineConfig(
            num_blocks=num_blocks,
            num_swap_blocks=max(1, num_swap_blocks) if preemption == "swap" else num_swap_blocks,
            block_size=block_size,
            preemption=preemption,
            enable_chunked_prefill=chunked,
            max_num_batched_tokens=budget if chunked else CONFIG.max_model_len,
            max_model_len=CONFIG.max_model_len,
            max_num_seqs=8,
            enable_prefix_caching=caching,
            watermark=watermark,
        )
        scheduler = Parts(scheduler=self.scheduler_class).checked().build_scheduler(config)
        self.engine = EngineWithTensors(scheduler, seed)
        self.prefixes: list[Sequence] = []

    @property
    def scheduler(self) -> FCFSScheduler:
        return self.engine.scheduler

    @property
    def alive(self) -> list[SequenceGroup]:
        queues = self.scheduler
        return [*queues.waiting, *queues.running, *queues.swapped]

    # ---- requests come and go --------------------------------------------------------------------

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        num_tokens=st.integers(1, 16),
        width=st.sampled_from([1, 1, 1, 2, 3, 4]),
        beams=st.booleans(),
        salt=st.sampled_from([None, None, "salt"]),
    )
    def add(self, prompt, num_tokens, width, beams, salt) -> None:
        self.add_request(prompt, num_tokens, width, beams, salt)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), num_tokens=st.integers(1, 16), times=st.integers(1, 2))
    def add_alike(self, data, num_tokens, times) -> None:
        """The same prompt as another's, or what another has generated already, once or twice."""
        seq = data.draw(st.sampled_from(self.alive)).sequences[0]
        for _ in range(times):
            self.add_request(seq.token_ids, num_tokens, 1, False, seq.cache_salt)

    def add_request(self, prompt, num_tokens, width, beams, salt) -> None:
        seq = Sequence(self.engine.new_id(), prompt, cache_salt=salt)
        group = SequenceGroup(str(seq.seq_id), [seq], width=width)
        try:
            self.scheduler.add(group)
        except PromptTooLong:
            return
        self.engine.tokens_left[group.request_id] = num_tokens
        if beams:
            self.engine.beams.add(group.request_id)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data) -> None:
        self.scheduler.abort(data.draw(st.sampled_from(self.alive)))

    @precondition(lambda self: self.alive and len(self.prefixes) < 2)
    @rule(data=st.data(), length=st.integers(1, 8))
    def pin(self, data, length: int) -> None:
        model = data.draw(st.sampled_from(self.alive)).sequences[0]
        seq = Sequence(self.engine.new_id(), model.token_ids[:length], cache_salt=model.cache_salt)
        self.scheduler.memory.pin(seq)
        self.prefixes.append(seq)

    @precondition(lambda self: self.prefixes)
    @rule()
    def release(self) -> None:
        self.scheduler.memory.free(self.prefixes.pop())

    # ---- a step ----------------------------------------------------------------------------------

    @precondition(lambda self: self.alive)
    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            if self.alive:
                self.engine.step()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(5_000):
            if not self.alive:
                break
            self.engine.step()
        assert not self.scheduler.has_unfinished(), "the scheduler never finishes these requests"
        for seq in self.prefixes:
            self.scheduler.memory.free(seq)
        memory = self.scheduler.memory
        assert memory.num_free == memory.num_blocks
        assert memory.num_free_swap_blocks == memory.num_swap_blocks
        assert not memory.tables


TestAnyRequests = AnyRequests.TestCase
TestAnyRequests.settings = settings(max_examples=examples(100, full=1000), stateful_step_count=30)


# ---- deliberate faults: each must be caught ------------------------------------------------------


class FindsBeforeTheStepHasRun(FCFSScheduler):
    def schedule(self):
        decision = super().schedule()
        for scheduled in decision.sequences:
            seq = scheduled.seq
            computed, seq.num_computed_tokens = seq.num_computed_tokens, seq.num_tokens
            self.memory.cache_blocks(seq)
            seq.num_computed_tokens = computed
        return decision


class ForgetsTheCopies(FCFSScheduler):
    def schedule(self):
        return replace(super().schedule(), copies=())


class RemembersWhatWasTakenAway(FCFSScheduler):
    """A group that is to be recomputed still has its keys marked as computed."""

    def _preempt(self, group, decision):
        computed = {s: s.num_computed_tokens for s in group.sequences}
        super()._preempt(group, decision)
        for seq, number in computed.items():
            if group.status is SequenceStatus.WAITING:
                seq.num_computed_tokens = number
                seq.mark_cached = lambda _: None


class TearsAGroupApart(FCFSScheduler):
    def _preempt(self, group, decision):
        if len(group.sequences) > 1:
            self.finish(group, group.sequences[-1])
        super()._preempt(group, decision)
        if group.status is SequenceStatus.SWAPPED:
            decision.swap_out.pop()


class SamplesWithoutTheOthers(FCFSScheduler):
    def _take_tokens(self, group, draft):
        for seq in group.sequences:
            number = min(seq.num_uncomputed_tokens, draft.tokens_left)
            if number:
                samples = number == seq.num_uncomputed_tokens
                draft.sequences.append(ScheduledSequence(group, seq, number, samples))
                draft.tokens_left -= number


class LeavesTheBlocksOfFinishedSequences(FCFSScheduler):
    def finish(self, group, seq):
        group.sequences.remove(seq)
        if not group.sequences:
            self._move(group, SequenceStatus.FINISHED)


class ForksAfterAnEnd(FCFSScheduler):
    """The fork copies the table of a parent that has been freed."""

    def fork(self, group, parent, child_id):
        self.memory.free(parent)
        return super().fork(group, parent, child_id)


class AdmitsWhatDoesNotFit(FCFSScheduler):
    def _can_join(self, group, decision):
        return len(self.running) + group.num_batch_slots <= self.config.max_num_seqs


class WaitsForPrefixesThatStay(FCFSScheduler):
    """Pinned blocks are counted as if they were free."""

    def schedule(self):
        self.memory._memory._pinned.clear()
        return super().schedule()


FAULTS = [
    FindsBeforeTheStepHasRun, ForgetsTheCopies, RemembersWhatWasTakenAway, TearsAGroupApart,
    SamplesWithoutTheOthers, LeavesTheBlocksOfFinishedSequences, ForksAfterAnEnd,
    AdmitsWhatDoesNotFit, WaitsForPrefixesThatStay,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_deliberate_fault_is_caught(fault):
    machine = type(fault.__name__, (AnyRequests,), {"scheduler_class": fault})
    quick = settings(
        max_examples=1500, phases=[Phase.generate], derandomize=True, deadline=None, database=None
    )
    caught = (CheckFailed, AssertionError, DoubleFree, OutOfBlocks, LookupError, ValueError)
    with pytest.raises(caught):
        run_state_machine_as_test(machine, settings=quick)
