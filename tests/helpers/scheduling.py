"""A scheduler and the part of an engine around it, without a model."""

from dataclasses import replace

from minipaged.config import EngineConfig
from minipaged.engine.parts import Parts
from minipaged.scheduler.fcfs import Scheduler
from minipaged.sequence import Sequence, SequenceGroup

CONFIG = EngineConfig(
    num_blocks=100, num_swap_blocks=100, max_model_len=400, block_size=4, watermark=0.0
)


def build(parts: Parts | None = None, **options) -> Scheduler:
    return (parts or Parts()).checked().build_scheduler(replace(CONFIG, **options))


class Engine:
    """Plays the engine without a model: computes, adds a token, forks, finishes."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.lengths: dict[str, int] = {}  # how many tokens each request generates
        self.groups: dict[str, SequenceGroup] = {}
        self.sequences: dict[str, list[Sequence]] = {}  # of each request, also the finished ones
        self.finished: list[str] = []
        self.ended: list[str] = []
        self.next_id = 0

    def add(
        self, prompt_len: int, num_tokens: int = 5, num_seqs: int = 1, *, alike: bool = False
    ) -> SequenceGroup:
        first = 0 if alike else 1000 * (1 + self.next_id)
        seq = Sequence(self.next_id, range(first, first + prompt_len))
        group = SequenceGroup(str(len(self.groups)), [seq], width=num_seqs)
        self.sequences[group.request_id] = [seq]
        self.scheduler.add(group)
        self.next_id += 1
        self.groups[group.request_id] = group
        self.lengths[group.request_id] = num_tokens
        return group

    def step(self):
        plan = self.scheduler.schedule()
        self.scheduler.commit(plan)
        for scheduled in plan.sequences:
            group, seq = scheduled.group, scheduled.seq
            if scheduled.samples:
                if seq.num_output_tokens == 0:
                    self.fork(group, seq)
                for each in group.sequences if seq.num_output_tokens == 0 else [seq]:
                    each.append(10**6 + each.seq_id)  # no two generate alike
                for each in list(group.sequences):
                    if each.num_output_tokens >= self.length_of(group, each):
                        self.scheduler.finish(group, each)
                if not group.sequences:
                    self.finished.append(group.request_id)
        self.ended += [g.request_id for g in plan.ended]
        return plan

    def length_of(self, group: SequenceGroup, seq: Sequence) -> int:
        """The sequences of a group end one after the other."""
        return self.lengths[group.request_id] + self.sequences[group.request_id].index(seq)

    def fork(self, group: SequenceGroup, parent: Sequence) -> None:
        while len(group.sequences) < group.width:
            child = self.scheduler.fork(group, parent, 1000 + self.next_id)
            self.sequences[group.request_id].append(child)
            self.next_id += 1

    def run(self, limit: int = 10_000) -> list:
        plans = []
        while self.scheduler.has_unfinished():
            plans.append(self.step())
            check_plan(self, plans[-1])
            assert len(plans) < limit, "the scheduler does not finish"
        return plans


def tokens_of(plan) -> dict[str, int]:
    return {s.group.request_id: s.num_new_tokens for s in plan.sequences}


def step_until(engine: Engine, condition, limit: int = 300) -> None:
    while not condition():
        engine.step()
        limit -= 1
        assert limit, "what was waited for did not happen"


def check_plan(engine: "Engine", plan) -> None:
    """What must hold in every step."""
    config = engine.scheduler.config
    assert sum(s.num_new_tokens for s in plan.sequences) <= config.max_num_batched_tokens
    assert len(plan.sequences) <= config.max_num_seqs
    assert all(s.num_new_tokens >= 1 for s in plan.sequences)
    assert not (plan.swap_in and plan.swap_out)
    queues = engine.scheduler
    for queue in (queues.waiting, queues.running, queues.swapped):
        assert [g.arrival for g in queue] == sorted(g.arrival for g in queue)
    for group in queues.swapped:  # gang-scheduled: all sequences of a group are out together
        assert all(queues.memory.is_swapped(s.seq_id) for s in group.sequences)
