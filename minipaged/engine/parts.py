"""The parts of an engine. This is the only place where parts are connected, or replaced.

    LLM(parts=Parts(allocator=MyAllocator))      # a custom part
    LLM(parts=Parts().checked())                 # every block recounted after every call
    LLM(parts=Parts().traced(log))               # events of scheduler, memory, allocators, ranks

`checked` and `traced` wrap custom parts in the same way as the library's.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, cast

from minipaged.attention.backend import AttentionBackend, PagedAttention, StoreKV
from minipaged.config import EngineConfig
from minipaged.engine.request import Arrival, Request
from minipaged.engine.sampling_request import SamplingRequest
from minipaged.memory import (
    Allocator,
    BlockAllocator,
    BlockManager,
    BlockTable,
    CheckedAllocator,
    CheckedMemory,
    Memory,
    PrefixCache,
)
from minipaged.sampling import SamplingParams
from minipaged.sampling.sampler import AdjustLogits
from minipaged.scheduler.fcfs import FCFSScheduler, SelectVictim, youngest
from minipaged.scheduler.interface import Scheduler
from minipaged.tracing.events import (
    EventLog,
    TracedAllocator,
    TracedExecutor,
    TracedMemory,
    TracedScheduler,
)
from minipaged.worker.executor import Executor

BuildMemory = Callable[..., Memory]


@dataclass(frozen=True)
class Parts:
    """The replaceable parts of an engine, with the library's as defaults.

    allocator        called with the number of blocks; once for the pool, once for the swap pool
    block_table      a BlockTable: called with its four arguments
    prefix_cache     a PrefixCache: called with an allocator, the block size, whether it is on, and
                     the block table's class
    memory           called with the arguments of BlockManager, by keyword
    scheduler        called with the arguments of FCFSScheduler, by position
    select_victim    chooses the group to preempt, among the running ones younger than the group
                     that needs blocks
    paged_attention  None: the attention backend's
    store_kv         None: the attention backend's
    sampling_request a SamplingRequest: how the samples of a prompt begin, continue and end
    adjust_logits    None: only the requests' options change logits; see `Sampler`

    `checked` and `traced` add wrappers of memory, scheduler and executor to `memory_wrappers`,
    `scheduler_wrappers` and `executor_wrappers`.

    A part that the chosen memory would never call is refused: see `engine/refusals.py`.
    """

    allocator: Callable[[int], Allocator] = BlockAllocator
    block_table: type[BlockTable] = BlockTable
    prefix_cache: Callable[..., PrefixCache] = PrefixCache
    memory: BuildMemory = BlockManager
    scheduler: Callable[..., Scheduler] = FCFSScheduler
    select_victim: SelectVictim = youngest
    paged_attention: PagedAttention | None = None
    store_kv: StoreKV | None = None
    sampling_request: Callable[[Arrival, SamplingParams, int], Request] = SamplingRequest
    adjust_logits: AdjustLogits | None = None
    memory_wrappers: tuple[Callable[[BuildMemory], BuildMemory], ...] = ()
    scheduler_wrappers: tuple[Callable[[Scheduler], Scheduler], ...] = ()
    executor_wrappers: tuple[Callable[[Executor], Executor], ...] = ()

    @property
    def replaced(self) -> set[str]:
        """The names of the parts that are not the library's."""
        return {each.name for each in fields(self) if getattr(self, each.name) != each.default}

    def build_scheduler(self, config: EngineConfig) -> Scheduler:
        """Build the scheduler and, below it, the memory and its allocators."""
        build_memory = self.memory
        for wrap in self.memory_wrappers:
            build_memory = wrap(build_memory)
        memory = build_memory(
            num_blocks=config.num_blocks,
            num_swap_blocks=config.num_swap_blocks,
            block_size=config.block_size,
            watermark_blocks=config.watermark_blocks,
            allocator=self.allocator,
            enable_prefix_caching=config.enable_prefix_caching,
            prefix_cache=partial(self.prefix_cache, block_table=self.block_table),
        )
        scheduler = self.scheduler(config, memory, self.select_victim)
        for wrap in self.scheduler_wrappers:
            scheduler = wrap(scheduler)
        return scheduler

    def attention(self, backend: AttentionBackend) -> AttentionBackend:
        """Return the backend with the functions of custom parts."""
        if self.paged_attention is None and self.store_kv is None:
            return backend
        return replace(
            backend,
            paged_attention=self.paged_attention or backend.paged_attention,
            store_kv=self.store_kv or backend.store_kv,
            rope_and_store_kv=None,  # it would bypass a custom store_kv
            cuda_graph_safe=False,  # custom functions may read more than tensors
        )

    def checked(self) -> "Parts":
        """Return the same parts with a recount after every call; slow, for tests and labs."""

        def check(build: BuildMemory) -> BuildMemory:
            def memory(**options: Any) -> Memory:
                def allocator(num_blocks: int) -> Allocator:
                    return CheckedAllocator(options["allocator"](num_blocks))

                return cast(Memory, CheckedMemory(build(**{**options, "allocator": allocator})))

            return memory

        return replace(self, memory_wrappers=(*self.memory_wrappers, check))

    def traced(self, log: EventLog) -> "Parts":
        """Return the same parts, with every change to queues and blocks written to the log.

        With several ranks, the log also gets each rank's times per step.
        """

        def trace_scheduler(scheduler: Scheduler) -> Scheduler:
            return cast(Scheduler, TracedScheduler(scheduler, log))

        def trace_executor(executor: Executor) -> Executor:
            is_alone = executor.part is None  # then all events come from scheduler and memory
            return executor if is_alone else cast(Executor, TracedExecutor(executor, log))

        def trace(build: BuildMemory) -> BuildMemory:
            def memory(**options: Any) -> Memory:
                pools = iter(("pool", "swap"))  # the order in which a memory builds its allocators

                def allocator(num_blocks: int) -> Allocator:
                    one = options["allocator"](num_blocks)
                    return cast(Allocator, TracedAllocator(one, log, next(pools)))

                inner = build(**{**options, "allocator": allocator})
                log.emit(
                    "init",
                    num_blocks=inner.num_blocks,
                    num_swap_blocks=inner.num_swap_blocks,
                    block_size=inner.block_size,
                )
                return cast(Memory, TracedMemory(inner, log))

            return memory

        return replace(
            self,
            memory_wrappers=(*self.memory_wrappers, trace),
            scheduler_wrappers=(*self.scheduler_wrappers, trace_scheduler),
            executor_wrappers=(*self.executor_wrappers, trace_executor),
        )
