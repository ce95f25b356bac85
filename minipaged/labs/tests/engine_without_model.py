"""The engine's part of a step, without a model: to see what a scheduler decides, and check it.

It adds requests, commits each plan as if it had been computed, lets prompts fork into samples, adds
a token to whoever may sample, and finishes who has enough.
"""

from collections.abc import Sequence as Many
from typing import Any

from minipaged.config import EngineConfig
from minipaged.labs.lab import Lab
from minipaged.memory import BlockManager, CheckedMemory
from minipaged.scheduler.output import SchedulerOutput
from minipaged.sequence import Sequence, SequenceGroup, SequenceStatus

DEFAULTS: dict[str, Any] = {
    "num_blocks": 100, "num_swap_blocks": 100, "block_size": 4, "max_model_len": 400,
    "max_num_seqs": 8, "watermark": 0.0,
}  # fmt: skip


def with_the_librarys(cls: type, library: type, lab: Lab, task: int) -> type:
    """A student's class, for the tests of one task: bodies of later tasks are the library's."""
    later = [hole for each in lab.tasks if each.number > task for hole in each.holes]
    names = [hole.partition(".")[2] for hole in later if hole.startswith(f"{library.__name__}.")]
    bodies = {name: getattr(library, name) for name in names if hasattr(cls, name)}
    return type(cls.__name__, (cls,), bodies)


class Engine:
    """One scheduler, its requests, and what became of them. Requests are called by number."""

    def __init__(self, scheduler_class: Any, victim: Any, **options: Any) -> None:
        config = EngineConfig(**{**DEFAULTS, **options})
        self.memory: Any = CheckedMemory(
            BlockManager(
                num_blocks=config.num_blocks,
                num_swap_blocks=config.num_swap_blocks,
                block_size=config.block_size,
                watermark_blocks=config.watermark_blocks,
                enable_prefix_caching=config.enable_prefix_caching,
            )
        )
        self.config = config
        self.scheduler = scheduler_class(config, self.memory, victim)
        self.groups: list[SequenceGroup] = []
        self.lengths: list[int] = []  # how many tokens each request generates
        self.samples: list[list[Sequence]] = []  # of each request, also those that have ended
        self.finished: list[int] = []
        self.ended: list[int] = []  # for want of memory
        self.next_id = 0

    def add(
        self, prompt_len: int, num_tokens: int = 5, width: int = 1, alike: bool = False
    ) -> SequenceGroup:
        """A request; `alike`: its prompt begins as that of all others that are alike."""
        number = len(self.groups)
        first = 0 if alike else 1000 * (1 + number)
        seq = Sequence(self._new_id(), range(first, first + prompt_len))
        group = SequenceGroup(f"{number}", [seq], width=width)
        self.scheduler.add(group)
        self.groups.append(group)
        self.lengths.append(num_tokens)
        self.samples.append([seq])
        return group

    def step(self) -> SchedulerOutput:
        """One step, from its plan to the new tokens."""
        plan = self.scheduler.schedule()
        self._check(plan)
        computed = [part.seq.num_computed_tokens for part in plan.sequences]
        self.scheduler.commit(plan)
        for part, before in zip(plan.sequences, computed, strict=True):
            after = part.seq.num_computed_tokens
            assert after == before + part.num_new_tokens, (
                f"the step has computed {part.num_new_tokens} tokens of {part.seq} after {before}, "
                "and commit() has not noted it"
            )
        for part in plan.sequences:
            if part.samples:
                self._sample(part.group, part.seq)
        self.ended += [self.groups.index(group) for group in plan.ended]
        return plan

    def run(self, limit: int = 2000) -> list[SchedulerOutput]:
        """Steps until nobody is left."""
        plans: list[SchedulerOutput] = []
        while self.scheduler.has_unfinished():
            assert len(plans) < limit, f"after {limit} steps there are still requests"
            plans.append(self.step())
        self.check_that_all_came_back()
        return plans

    def step_until(self, condition: Any, limit: int = 300) -> None:
        for _ in range(limit):
            if condition():
                return
            self.step()
        raise AssertionError(f"what should happen did not happen in {limit} steps")

    def check_that_all_came_back(self) -> None:
        memory = self.memory
        lost = memory.num_blocks - memory.num_free
        assert lost == 0, f"all requests have ended, and {lost} blocks did not come back"
        lost = memory.num_swap_blocks - memory.num_free_swap_blocks
        assert lost == 0, f"all requests have ended, and {lost} swap blocks did not come back"

    def _sample(self, group: SequenceGroup, seq: Sequence) -> None:
        number = self.groups.index(group)
        begins = seq.num_output_tokens == 0
        while begins and len(group.sequences) < group.width:
            self.samples[number].append(self.scheduler.fork(group, seq, self._new_id()))
        for each in group.sequences if begins else [seq]:
            each.append(10**6 + each.seq_id)  # no two generate alike
        for each in list(group.sequences):
            # The samples of a request end one after the other.
            if each.num_output_tokens >= self.lengths[number] + self.samples[number].index(each):
                self.scheduler.finish(group, each)
        if not group.sequences:
            self.finished.append(number)

    def _new_id(self) -> int:
        self.next_id += 1
        return self.next_id - 1

    def _check(self, plan: SchedulerOutput) -> None:
        """What must hold in every step."""
        total, budget = sum(part.num_new_tokens for part in plan.sequences), self.config
        assert total <= budget.max_num_batched_tokens, (
            f"{total} tokens in a step, and max_num_batched_tokens is "
            f"{budget.max_num_batched_tokens}"
        )
        num_seqs = len(plan.sequences)
        assert num_seqs <= budget.max_num_seqs, (
            f"{num_seqs} sequences in a step, and max_num_seqs is {budget.max_num_seqs}"
        )
        assert not (plan.swap_in and plan.swap_out), "swapped in and out in one step"
        planned = [part.seq.seq_id for part in plan.sequences]
        assert len(planned) == len(set(planned)), "a sequence is in the plan twice"
        for part in plan.sequences:
            assert part.group.status is SequenceStatus.RUNNING, f"{part.group} is in the plan"
            slots = self.memory.tables[part.seq.seq_id].num_tokens
            last = part.seq.num_computed_tokens + part.num_new_tokens
            assert last <= slots, f"{part.seq} computes {last} tokens, and has slots for {slots}"
        queues = self.scheduler
        for name in ("waiting", "running", "swapped"):
            arrivals = [group.arrival for group in getattr(queues, name)]
            assert arrivals == sorted(arrivals), f"`{name}` is not in order of arrival: {arrivals}"


def tokens_of(plan: SchedulerOutput) -> dict[int, int]:
    """How many tokens of each request a step computes."""
    tokens: dict[int, int] = {}
    for part in plan.sequences:
        number = int(part.group.request_id)
        tokens[number] = tokens.get(number, 0) + part.num_new_tokens
    return tokens


def numbers(groups: Many[SequenceGroup]) -> list[int]:
    return [int(group.request_id) for group in groups]
