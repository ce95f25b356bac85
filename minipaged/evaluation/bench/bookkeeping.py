"""The cost of bookkeeping: the allocator, a step's scheduling, a simulated step.

All are plain Python without tensors, and the model waits for them. A step's scheduling is therefore
reported with the number of running sequences and their lengths.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from minipaged.config import EngineConfig
from minipaged.engine.parts import Parts
from minipaged.evaluation.sim.catalogue import DEPLOYMENTS
from minipaged.evaluation.sim.cost_model import CostModel
from minipaged.evaluation.sim.simulator import Report, Simulation
from minipaged.evaluation.sim.systems import Setting, find_system
from minipaged.evaluation.sim.traces import WORKLOADS, poisson_trace
from minipaged.memory import BlockAllocator
from minipaged.sequence import Sequence, SequenceGroup

POOLS = (1_000, 10_000, 100_000, 1_000_000)  # blocks
RUNNING = (1, 32, 256, 1_000)  # sequences
BLOCK_SIZE = 16
NUM_TOKENS = 1_000  # of each sequence when the steps begin
ROUNDS, REPEATS = 9, 20_000
SIMULATED_SECONDS = 100.0


@dataclass(frozen=True)
class Row:
    """One operation that is repeated."""

    what: str
    size: int  # size of the pool in blocks, or of the batch in sequences
    seconds: float  # per operation, median of all rounds


def measure() -> Iterator[Row]:
    """Measure all operations at all sizes."""
    for num_blocks in POOLS:
        yield Row("allocate and free", num_blocks, _time_allocator(num_blocks))
    for num_seqs in RUNNING:
        yield Row("schedule and commit", num_seqs, _time_scheduler(num_seqs, NUM_TOKENS))
    for system in ("vllm", "orca-max"):
        yield _time_simulation(system, SIMULATED_SECONDS)


def _time_allocator(num_blocks: int) -> float:
    """A block is allocated and freed, while half of the pool is in use."""
    allocator = BlockAllocator(num_blocks)
    for _ in range(num_blocks // 2):
        allocator.allocate()
    seconds: list[float] = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(REPEATS):
            allocator.free(allocator.allocate())
        seconds.append((time.perf_counter() - begin) / REPEATS)
    assert allocator.num_free == num_blocks - num_blocks // 2, "blocks were lost"
    return statistics.median(seconds)


def _time_scheduler(num_seqs: int, num_tokens: int) -> float:
    """A decode step of all sequences: every one gets a token, one in sixteen needs a new block."""
    steps = 4 * BLOCK_SIZE
    blocks_each = -(-(num_tokens + steps + 2) // BLOCK_SIZE)
    config = EngineConfig(
        num_blocks=num_seqs * blocks_each + 1,
        num_swap_blocks=0,
        max_model_len=num_tokens + 2 * steps,
        block_size=BLOCK_SIZE,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_seqs * (num_tokens + BLOCK_SIZE),  # all prompts in one step
        enable_prefix_caching=False,  # they share nothing, so lookups would be useless
    )
    scheduler = Parts().build_scheduler(config)
    for number in range(num_seqs):
        # Lengths differ by up to a block, so that some sequence needs a new one in every step.
        prompt = range(num_tokens - number % BLOCK_SIZE)
        scheduler.add(SequenceGroup(str(number), [Sequence(number, prompt)]))
    seconds: list[float] = []
    for _ in range(steps):
        begin = time.perf_counter()
        decision = scheduler.schedule()
        scheduler.commit(decision)
        seconds.append(time.perf_counter() - begin)
        assert len(decision.sequences) == num_seqs, "a sequence did not run"
        for scheduled in decision.sequences:
            scheduled.seq.append(7)
    return statistics.median(seconds[1:])  # the first computed the prompts


def _time_simulation(system: str, simulated_seconds: float) -> Row:
    """Conversations with OPT-13B, as `minipaged paper` simulates them."""
    server = DEPLOYMENTS["opt-13b"]
    trace = poisson_trace(WORKLOADS["sharegpt"], 2.0, simulated_seconds)

    def run() -> tuple[float, Report]:
        setting = Setting(server.num_slots)
        simulation = Simulation(
            find_system(system), setting, CostModel(server), trace, watch_memory=False
        )
        begin = time.perf_counter()
        report = simulation.run()
        return (time.perf_counter() - begin) / report.num_steps, report

    runs = [run() for _ in range(3)]
    report = runs[0][1]  # all three are equal
    mean_batch = report.num_sequence_steps / report.num_steps
    seconds = statistics.median(seconds for seconds, _ in runs)
    return Row(f"simulate a step, {system}", round(mean_batch), seconds)


def as_table(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(box=None, padding=(0, 2))
    for title in ("what", "blocks", "sequences", "time", "each sequence"):
        table.add_column(title, justify="left" if title == "what" else "right")
    for row in rows:
        if row.what == "allocate and free":
            table.add_row(row.what, f"{row.size:,}", "", f"{1e9 * row.seconds:.0f} ns", "")
        else:
            each = f"{1e6 * row.seconds / row.size:.2f} us"
            table.add_row(row.what, "", f"{row.size:,}", f"{1e6 * row.seconds:.0f} us", each)
    return table
