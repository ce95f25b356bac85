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

from minipaged.worker.ranks import LARGEST_PIECE, MOST_EXCHANGED, Ranks

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


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 16])  # 5: two pieces, the second shorter
def test_rank_0_gets_the_parts_of_all_ranks_side_by_side(size, dtype, rows):
    columns = LARGEST_PIECE // dtype.itemsize // 4 + 3  # a piece has 3 rows

    def part(rank: int) -> Tensor:
        numbers = torch.arange(rows * columns, dtype=torch.float64) + rank / 4
        return (numbers.view(columns, rows).t() % 64).to(dtype)  # rows are not contiguous

    def gather_twice(ranks: Ranks) -> list[Tensor]:
        return [ranks.gather(part(ranks.rank)), ranks.gather(part(ranks.rank) + 1)]

    (first, second), *_ = on_each_rank(size, gather_twice)
    expected = torch.cat([part(rank) for rank in range(size)], dim=-1)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected + 1)


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
