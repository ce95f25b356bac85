"""The simulation loop: requests arrive, the scheduler decides, the clock advances by the step.

It is the loop of `LLMEngine.step`, with a formula in place of the model.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from itertools import count

from minipaged.errors import InvalidOption
from minipaged.evaluation.sim.cost_model import CostModel
from minipaged.evaluation.sim.requests import GREEDY, Decoding, SimRequest
from minipaged.evaluation.sim.systems import Setting, System, build_scheduler
from minipaged.evaluation.sim.traces import TraceRequest
from minipaged.memory import MemoryUsage
from minipaged.scheduler.interface import Scheduler
from minipaged.scheduler.output import SchedulerOutput

LOOK_SECONDS = 1.0  # of simulated time, between two samples of the memory


@dataclass
class Report:
    """The results of a simulation. Means are over the time with at least one request."""

    num_requests: int
    finished: list[SimRequest] = field(default_factory=list[SimRequest])
    seconds: float = 0.0  # simulated
    num_steps: int = 0
    num_sequence_steps: int = 0  # counted once per sequence
    num_preemptions: int = 0
    num_blocks_swapped: int = 0  # out and in
    busy_seconds: float = 0.0  # simulated, in measured steps
    num_busy_steps: int = 0
    waits: list[float] = field(default_factory=list[float])  # seconds to the first token
    mean_batch: float = 0.0  # number of running requests
    looks: list[MemoryUsage] = field(default_factory=list[MemoryUsage])
    num_blocks_held: int = 0  # in the samples: blocks of groups with several sequences,
    num_blocks_unshared: int = 0  # and if each sequence had its own
    gave_up: bool = False  # normalised latency certainly exceeds the limit

    @property
    def normalized_latency(self) -> float:
        """Mean over requests of the seconds per output token (section 6.1)."""
        if self.gave_up or not self.finished:
            return float("inf")
        return sum(r.normalized_latency for r in self.finished) / len(self.finished)

    @property
    def blocks_saved(self) -> float:
        """The fraction of blocks that groups of several sequences saved by sharing."""
        return 1 - self.num_blocks_held / max(1, self.num_blocks_unshared)

    def share(self, part: Callable[[MemoryUsage], int]) -> float:
        """The average fraction of the memory's slots: `share(lambda usage: usage.used)`."""
        return sum(part(u) / u.total for u in self.looks) / max(1, len(self.looks))


class Simulation:
    """Simulates one system that serves one trace.

    Args:
        limit: stop once the mean normalised latency is certain to exceed this many seconds.
        until: simulated seconds after which measuring ends. None: at the last token.
        look_from: simulated seconds when measuring begins, so that the empty start does not count.
        watch_memory: whether to sample memory usage, which takes time.
    """

    def __init__(
        self,
        system: System,
        setting: Setting,
        costs: CostModel,
        trace: Many[TraceRequest],
        decoding: Decoding = GREEDY,
        *,
        limit: float | None = None,
        until: float | None = None,
        look_from: float = 0.0,
        watch_memory: bool = True,
    ) -> None:
        self.scheduler: Scheduler = build_scheduler(system, setting)
        self.now = 0.0
        self.report = Report(len(trace))
        self._system = system
        self._setting = setting
        self._costs = costs
        seq_ids = count()
        self._to_come = [SimRequest(i, t, decoding, seq_ids) for i, t in enumerate(trace)][::-1]
        self._requests: dict[str, SimRequest] = {}
        self._kept_back: list[SimRequest] = []  # finished, but others of their batch are not
        self._limit = limit
        self._until = until
        self._look_from = look_from
        self._watch_memory = watch_memory
        self._num_looks = 0
        self._next_look = look_from
        self._batch_seconds = 0.0
        self._longest_prompt = 0  # of a padded batch

    def run(self) -> Report:
        """Serve the whole trace, or until a limit is reached."""
        while (self._to_come or self._requests or self._kept_back) and not self.report.gave_up:
            if self._until is not None and self.now >= self._until:
                break
            self._let_come()
            if not self._requests:
                self.now = self._to_come[-1].arrival
                continue
            self.step()
        report = self.report
        report.seconds = self.now
        report.mean_batch = self._batch_seconds / max(report.busy_seconds, 1e-9)
        return report

    def step(self) -> None:
        """Run one step of the scheduler, and apply its decision."""
        scheduler = self.scheduler
        decision = scheduler.schedule()
        if decision.ended:
            slots = scheduler.memory.num_blocks * scheduler.memory.block_size
            raise InvalidOption(
                f"request {decision.ended[0].request_id} has outgrown the whole pool of {slots} "
                "token slots: simulate a larger pool, or shorter requests."
            )
        seconds = self._seconds(decision)
        self.now += seconds
        if self.now >= self._look_from:
            self.report.busy_seconds += seconds
            self.report.num_busy_steps += 1
            self._batch_seconds += seconds * (len(scheduler.running) + len(self._kept_back))
        self.report.num_steps += 1
        self.report.num_sequence_steps += len(decision.sequences)
        self.report.num_preemptions += len(decision.preempted)
        self.report.num_blocks_swapped += len(decision.swap_out) + len(decision.swap_in)
        if self.now >= self._next_look:
            self._look()  # while the step runs
        scheduler.commit(decision)
        self._advance(decision)

    def _let_come(self) -> None:
        while self._to_come and self._to_come[-1].arrival <= self.now:
            request = self._to_come.pop()
            self._requests[request.group.request_id] = request
            self.scheduler.add(request.group)

    def _seconds(self, decision: SchedulerOutput) -> float:
        if not self._system.forms_batches:
            return self._costs.of_step(decision, self._setting.block_size)
        # Padded: all prompts are as long as the longest, and ended sequences are still computed
        # with the others.
        batch = [*self.scheduler.running, *(request.group for request in self._kept_back)]
        size = sum(group.width for group in batch)
        prompt = self._longest_prompt = max(
            (s.num_new_tokens for s in decision.sequences if s.num_new_tokens > 1),
            default=self._longest_prompt,
        )
        generated = max((s.seq.num_output_tokens for s in decision.sequences), default=0)
        if generated == 0:
            return self._costs.step(0, 0, size * prompt, size * prompt**2 / 2, size)
        return self._costs.step(size, size * (prompt + generated), 0, 0)

    def _advance(self, decision: SchedulerOutput) -> None:
        """Append a token to every sequence that is completely computed."""
        advanced: set[str] = set()
        for group, seq, _, samples in decision.sequences:
            if not samples or group.request_id in advanced:
                continue
            request = self._requests[group.request_id]
            if request.first_token is None:
                request.first_token = self.now
                self.report.waits.append(self.now - request.arrival)
            if group.width > 1:
                advanced.add(group.request_id)
                ended = request.advance(self.scheduler)
            else:
                seq.append(0)
                ended = len(seq.token_ids) - seq.prompt_len == request.output_len
                if ended:
                    self.scheduler.finish(group, seq)
            if ended:
                self._kept_back.append(self._requests.pop(group.request_id))
        if self._kept_back and not (self._system.forms_batches and self.scheduler.running):
            for request in self._kept_back:
                request.finish = self.now
            self.report.finished += self._kept_back
            self._kept_back = []

    def _look(self) -> None:
        """Record memory usage, and stop if the limit is certain to be exceeded."""
        self._next_look = max(self._next_look + LOOK_SECONDS, self.now)
        self._num_looks += 1
        report, memory = self.report, self.scheduler.memory
        if self._watch_memory:
            report.looks.append(memory.usage())
            for group in self.scheduler.running:
                if group.width > 1:
                    held = memory.num_distinct_blocks(group)
                    unshared = sum(len(memory.tables[s.seq_id]) for s in group.sequences)
                    report.num_blocks_held += held
                    report.num_blocks_unshared += unshared
        if self._limit is not None and self._num_looks % 10 == 0:
            # The latency of an unfinished request is at least what it would be if it ended now.
            least = sum(r.normalized_latency for r in report.finished)
            least += sum((self.now - r.arrival) / r.output_len for r in self._requests.values())
            report.gave_up = least > self._limit * report.num_requests
