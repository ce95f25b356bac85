"""Connections between ranks: process groups of torch.distributed, over gloo or NCCL."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import Store


def connect_cpus(
    store: Store, rank: int, size: int, timeout: timedelta, host: str | None
) -> ProcessGroup:
    """Connect over gloo. `host`: this process's address for the others; see `Ranks`.

    Raises RuntimeError.
    """
    gloo: Any = dist.ProcessGroupGloo
    with _threads_that_wait_for_a_core():
        if host is None:
            return gloo(store, rank, size, timeout)  # which respects GLOO_SOCKET_IFNAME
        options = gloo._Options()
        options._timeout, options._devices = timeout, [gloo.create_device(hostname=host)]
        return gloo(store, rank, size, options)


def connect_gpus(
    store: Store, rank: int, size: int, timeout: timedelta, host: str | None
) -> ProcessGroup:
    """Connect over NCCL, which finds the interface itself. Raises RuntimeError."""
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timeout
    return nccl(store, rank, size, options)


@contextmanager
def _threads_that_wait_for_a_core() -> Generator[None]:
    """Threads started inside wait for a core instead of interrupting a running thread (Linux).

    gloo's thread wakes up when data arrives. If it interrupts the thread that is sending, it needs
    a lock which that thread has, and keeps trying until its time slice ends. On two cores, that
    made two ranks half as fast (docs/benchmarks.md, "Several ranks").
    """
    is_usual = hasattr(os, "SCHED_BATCH") and os.sched_getscheduler(0) == os.SCHED_OTHER
    if is_usual:  # threads inherit the policy of the thread that starts them
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        if is_usual:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
