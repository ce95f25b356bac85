"""What each step of an engine computes, and which blocks its sequences hold."""

from dataclasses import dataclass

from checkpoints import VOCAB_SIZE
from engine_runs import checked

from minipaged import LLM
from minipaged.memory import BlockPair
from minipaged.sequence import SequenceGroup, SequenceStatus


def small(folder, **options) -> LLM:
    """A pool that is ample for these tests, and quickly recounted."""
    return checked(folder, **{"block_size": 4, "num_blocks": 200, **options})


def prompt(length: int, first: int = 0) -> list[int]:
    """Tokens that are like those of no other prompt here, from the first one on."""
    return [(7 * i + 13 * first + i * i) % (VOCAB_SIZE - 3) + 3 for i in range(length)]


def all_tokens(outputs) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@dataclass
class Step:
    """What a step did, noted when it was scheduled."""

    computed: dict[str, int]  # by request: how many tokens of it
    tables: dict[str, list[list[int]]]  # by request: the blocks of each of its sequences
    copies: list[BlockPair]

    def held(self, request_id: str) -> int:
        return len({block for table in self.tables[request_id] for block in table})

    def unshared(self, request_id: str) -> int:
        return sum(map(len, self.tables[request_id]))


def watch(llm: LLM) -> list[Step]:
    """A list to which every step from now on is added."""
    steps: list[Step] = []
    schedule, memory = llm.engine.scheduler.schedule, llm.engine.scheduler.memory

    def schedule_and_note():
        decision = schedule()
        step = Step({}, {}, list(decision.copies))
        for scheduled in decision.sequences:
            name = scheduled.group.request_id
            step.computed[name] = step.computed.get(name, 0) + scheduled.num_new_tokens
            blocks = memory.tables[scheduled.seq.seq_id].blocks
            step.tables.setdefault(name, []).append(blocks.copy())
        steps.append(step)
        return decision

    llm.engine.scheduler.schedule = schedule_and_note
    return steps


def num_computed(steps: list[Step]) -> int:
    return sum(sum(step.computed.values()) for step in steps)


def step_to_the_end(llm: LLM):
    """Yields after every step what it has finished."""
    while llm.engine.has_unfinished_requests():
        progresses = llm.engine.step()
        yield [progress.output() for progress in progresses if progress.finished]


def assert_only_the_living_hold_blocks(llm: LLM, groups: list[SequenceGroup]) -> None:
    memory = llm.engine.scheduler.memory
    begun = [group for group in groups if group.status is not SequenceStatus.WAITING]
    living = [seq.seq_id for group in begun for seq in group.sequences]
    blocks = {b for seq_id in living for b in memory.tables[seq_id].blocks}
    assert sorted(memory.tables) == sorted(living)
    assert memory.num_blocks - memory.num_free == len(blocks)
