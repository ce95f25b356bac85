"""`minipaged soak memory`: random operations on block managers, checked against a model."""

from itertools import count as numbers
from statistics import median
from typing import Any

from minipaged.evaluation.soak.pool import BuildMemory, Pool
from minipaged.evaluation.soak.run import Soak, describe
from minipaged.memory import BlockManager

NUM_POOLS = 16
TURN = 500
"""Operations per turn of a pool, followed by a full recount; then the next pool has its turn."""
TURNS_TO_DRAIN = 16
"""Turns after which a pool is emptied: all blocks must come back."""


class MemorySoak(Soak):
    """Operations on pools of many sizes, which last as long as the run.

    The time of the manager's calls is measured. It must not grow with the number of operations.
    """

    command = "memory"
    unit = "memory operations"

    def __init__(self, count: int, seed: int, build: BuildMemory = BlockManager) -> None:
        super().__init__(count, seed)
        self._build = build
        self._pool_ids = numbers()  # a pool with a mismatch is replaced
        self._pools = [self._new_pool() for _ in range(NUM_POOLS)]
        self._num_turns = 0
        self.medians: list[float] = []
        """The median time per operation of each turn, in nanoseconds."""

    def _new_pool(self) -> Pool:
        return Pool(f"{self.seed}/{next(self._pool_ids)}", self._build)

    def run_some(self) -> None:
        """Run one turn of one pool."""
        number = self._num_turns % NUM_POOLS
        pool, times = self._pools[number], list[int]()
        count = min(TURN, self.count - self.num_done)
        try:
            for nanoseconds in pool.operate(count):
                times.append(nanoseconds)
                self.num_done += 1
            pool.recount()
            if self._num_turns // NUM_POOLS % TURNS_TO_DRAIN == TURNS_TO_DRAIN - 1:
                pool.drain()
        except Exception as error:
            self.num_done += len(times) < count  # the operation that failed
            self._note(pool, error)
            self._pools[number] = self._new_pool()
        self._num_turns += 1
        if times:
            self.medians.append(median(times))

    def finish(self) -> None:
        """Check that all blocks of all pools come back."""
        for pool in self._pools:
            try:
                pool.drain()
            except Exception as error:
                self._note(pool, error)

    def _note(self, pool: Pool, error: Exception) -> None:
        mismatch = f"operation {self.num_done:,}, {pool}: {describe(error)}"
        self.note(mismatch, self.seed, self.num_done)

    def time_per_operation(self) -> tuple[float, float]:
        """Median microseconds in the first and in the last tenth of the run."""
        tenth = max(1, len(self.medians) // 10 // NUM_POOLS) * NUM_POOLS  # each pool as often
        return median(self.medians[:tenth]) / 1e3, median(self.medians[-tenth:]) / 1e3

    def details(self) -> list[str]:
        if not self.medians:
            return []
        first, last = self.time_per_operation()
        return [f"time per operation: {first:.1f} us in the first tenth, {last:.1f} us in the last"]

    def as_dict(self) -> dict[str, Any]:
        first, last = self.time_per_operation() if self.medians else (None, None)
        return super().as_dict() | {
            "first_microseconds": first,
            "last_microseconds": last,
        }
