"""Paging and its baselines in the simulator: a memory manager and scheduler options for each."""

from collections.abc import Callable
from dataclasses import dataclass

from minipaged.config import EngineArgs, EngineConfig, PreemptionMode
from minipaged.errors import InvalidOption
from minipaged.evaluation.sim.catalogue import MODELS, ServedModel
from minipaged.memory import BlockManager, Memory
from minipaged.memory.baselines.contiguous import ContiguousMemory, Reserve
from minipaged.memory.baselines.regions import RegionLayout
from minipaged.memory.baselines.virtual import VirtualMemory
from minipaged.scheduler.fcfs import FCFSScheduler
from minipaged.scheduler.interface import Scheduler

LONGEST = 2048  # tokens of prompt and output together: the context of OPT
NO_LIMIT = 10**9  # tokens per step: the baselines are limited only by memory


@dataclass(frozen=True)
class Setting:
    """The options of memory and scheduler in a simulation."""

    num_slots: int  # token slots for keys and values
    block_size: int = EngineArgs.block_size
    longest: int = LONGEST
    max_num_seqs: int = 256  # as in the first vLLM
    max_num_batched_tokens: int = 2560  # the same
    watermark: float = EngineArgs.watermark
    prefix_caching: bool = False  # the paper had none, except for predefined prefixes
    preemption: PreemptionMode = EngineArgs.preemption
    model: ServedModel = MODELS["opt-13b"]  # for memory counted in bytes

    @property
    def num_blocks(self) -> int:
        return self.num_slots // self.block_size


@dataclass(frozen=True)
class System:
    """One of the systems that the paper compares (section 6.1)."""

    name: str
    title: str
    build_memory: Callable[[Setting], Memory]
    has_token_limit: bool = False  # it preempts, because it admits more than is certain to fit
    forms_batches: bool = False  # a batch is padded and runs until its longest request has ended
    scheduler: Callable[[EngineConfig, Memory], Scheduler] = FCFSScheduler


def _paged(setting: Setting) -> Memory:
    return BlockManager(
        num_blocks=setting.num_blocks,
        num_swap_blocks=setting.num_blocks,  # more are never needed (section 4.5)
        block_size=setting.block_size,
        watermark_blocks=int(setting.watermark * setting.num_blocks),
        enable_prefix_caching=setting.prefix_caching,
    )


def _contiguous(reserve: Reserve, joins: bool = True) -> Callable[[Setting], Memory]:
    def build(setting: Setting) -> Memory:
        size = setting.block_size
        return ContiguousMemory(setting.num_blocks, size, reserve, setting.longest, joins)

    return build


SYSTEMS = {
    system.name: system
    for system in (
        System("vllm", "vLLM (paged)", _paged, has_token_limit=True),
        System("orca-oracle", "Orca (Oracle)", _contiguous("oracle")),
        System("orca-pow2", "Orca (Pow2)", _contiguous("pow2")),
        System("orca-max", "Orca (Max)", _contiguous("max")),
        System(
            "fastertransformer",
            "FasterTransformer",
            _contiguous("max", joins=False),
            forms_batches=True,
        ),
    )
}


class NoPages:
    """Pages that are only counted, not mapped."""

    def map(self, region: int, groups: range) -> None: ...
    def unmap(self, region: int, groups: range) -> None: ...


def _virtual(page_bytes: int, sliced: bool = False) -> Callable[[Setting], Memory]:
    def build(setting: Setting) -> Memory:
        layout = virtual_layout(setting, page_bytes, sliced)
        budget = layout.groups_within(setting.num_slots * setting.model.kv_bytes_per_token)
        watermark = int(setting.watermark * budget)
        return VirtualMemory(layout, budget, NoPages(), watermark)

    return build


def virtual_layout(setting: Setting, page_bytes: int, sliced: bool) -> RegionLayout:
    """vAttention's regions for the model of a setting."""
    return RegionLayout.for_tokens(
        setting.model.kv_bytes_per_token,
        setting.model.num_layers,
        num_regions=setting.max_num_seqs,
        longest=setting.longest,
        page_bytes=page_bytes,
        sliced=sliced,
    )


KIB = 1024
VATTENTION = {
    system.name: system
    for system in (
        System("vattention-64k", "vAttention, 64 KiB", _virtual(64 * KIB), True),
        System("vattention-256k", "vAttention, 256 KiB", _virtual(256 * KIB), True),
        System("vattention-2m", "vAttention, 2 MiB", _virtual(2048 * KIB), True),
        System(
            "vattention-2m-sliced", "vAttention, 2 MiB, sliced", _virtual(2048 * KIB, True), True
        ),
    )
}
ORCAS = ("orca-oracle", "orca-pow2", "orca-max")


def find_system(name: str) -> System:
    """Return the system with this name. Raises InvalidOption with the valid names."""
    known = SYSTEMS | VATTENTION
    if name not in known:
        raise InvalidOption(f"there is no system {name!r}: choose one of {', '.join(known)}.")
    return known[name]


def build_scheduler(system: System, setting: Setting) -> Scheduler:
    """Build the system's scheduler, usually the library's own, over its memory.

    Steps mix prompts and decodes, and prompts are computed whole, as in the paper's vLLM.
    """
    limit = setting.max_num_batched_tokens if system.has_token_limit else NO_LIMIT
    config = EngineConfig(
        num_blocks=setting.num_blocks,
        num_swap_blocks=setting.num_blocks,
        max_model_len=setting.longest,
        block_size=setting.block_size,
        max_num_seqs=setting.max_num_seqs,
        max_num_batched_tokens=limit,
        enable_chunked_prefill=False,
        enable_prefix_caching=setting.prefix_caching,
        preemption=setting.preemption,
        watermark=setting.watermark,
    )
    return system.scheduler(config, system.build_memory(setting))
