"""What ranks send each other. The ranks are threads of one process here."""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minipaged.worker.ranks import MOST_EXCHANGED, Ranks

T = TypeVar("T")


def on_each_rank(size: int, act: Callable[[Ranks], T]) -> list[T]:
    store = dist.HashStore()
    cpu = torch.device("cpu")

    def be(rank: int) -> T:
        ranks = Ranks(store, rank, size, cpu, start_timeout=20, step_timeout=20, host="127.0.0.1")
        found = act(ranks)
        ranks.agree_on_least(0)  # no rank leaves while another is still reading
        ranks.disconnect()
        return found

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(be, range(size)))


def summands(rank: int) -> list[Tensor]:
    """Of many sizes, some of them again later, and some as large as others but of other shapes."""
    random = torch.Generator().manual_seed(rank)
    shapes = [(1, 64), (3, 64), (1, 64), (64, 3), (3, 64), (700, 64), (1, 64), (2, 32), (3, 64)] * 2
    tensors = [torch.randn(*shape, generator=random) for shape in shapes]
    tensors.insert(5, torch.randn(6, 64, generator=random).bfloat16())  # as many bytes as (3, 64)
    assert max(each.nbytes for each in tensors) > MOST_EXCHANGED
    return tensors


@pytest.mark.parametrize("size", [2, 3])
def test_sums_of_all_sizes_are_right_and_the_same_bits_on_each_rank(size):
    found = on_each_rank(
        size, lambda ranks: [ranks.all_reduce(each) for each in summands(ranks.rank)]
    )
    given = [summands(rank) for rank in range(size)]
    for number, sums in enumerate(zip(*found, strict=True)):
        expected = torch.stack([each[number].double() for each in given]).sum(0)
        assert all(torch.equal(each, sums[0]) for each in sums)
        tolerance = 0.05 if sums[0].dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(sums[0].double(), expected, atol=tolerance, rtol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are read from /proc")
def test_threads_of_connections_do_not_interrupt_a_running_thread():
    def threads() -> set[int]:
        return {int(each.name) for each in Path("/proc/self/task").iterdir()}

    def policies(ranks: Ranks) -> tuple[int, list[int]]:
        ranks.all_reduce(torch.ones(4))
        own = os.sched_getscheduler(0)
        return own, [os.sched_getscheduler(each) for each in threads() - before]

    before = threads()
    (own, others), _ = on_each_rank(2, policies)
    assert own == os.SCHED_OTHER
    # Both ranks' threads, and the two that act as ranks, which have their own state again.
    assert others.count(os.SCHED_OTHER) == 2
    assert others.count(os.SCHED_BATCH) >= 4
