"""The tensors and the manager of each kind of memory, paging and its baselines."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from minipaged.attention.backend import UNPAGED, AttentionBackend, choose_backend
from minipaged.attention.batch import BatchBuilder
from minipaged.attention.kv_cache import Cache, KVCache, bytes_per_block
from minipaged.attention.quantized_cache import LARGEST
from minipaged.attention.virtual_cache import VirtualKVCache
from minipaged.config import EngineConfig, ModelConfig, require_one_of
from minipaged.engine.parts import Parts
from minipaged.errors import InvalidOption
from minipaged.memory import BlockManager
from minipaged.memory.baselines.contiguous import CONTIGUOUS, contiguous
from minipaged.memory.baselines.pages import HUGE_PAGE, SMALL_PAGE
from minipaged.memory.baselines.regions import RegionLayout
from minipaged.memory.baselines.virtual import VIRTUAL, VirtualKind, VirtualMemory

KINDS = ("paged", *CONTIGUOUS, *VIRTUAL)


@dataclass(frozen=True)
class Storage:
    """Tensors for keys and values, their manager, and what builds batches over them."""

    kv_cache: Cache
    parts: Parts  # with the memory that manages this cache
    batches: BatchBuilder


def check_memory(
    memory: str, parts: Parts, preemption: str, device: torch.device
) -> dict[str, Any]:
    """The options that this kind of memory changes. Raises InvalidOption."""
    require_one_of("memory", memory, KINDS)
    if memory == "paged":
        return {}
    if parts.memory is not BlockManager:
        raise InvalidOption(
            f"memory is {memory!r}, and parts have a custom memory: leave out one of them."
        )
    if preemption == "swap":
        raise InvalidOption(
            f'only paged memory swaps, and memory is {memory!r}: leave out preemption="swap".'
        )
    if memory in VIRTUAL and device.type != "cpu":
        raise InvalidOption(
            f"memory={memory!r} maps pages of this process's memory, which a GPU cannot read: "
            'choose device="cpu", or memory="paged".'
        )
    return {"enable_prefix_caching": False, "num_swap_blocks": 0}


def choose_attention(
    memory: str, name: str, device: torch.device, head_dim: int, kv_cache_dtype: str
) -> AttentionBackend:
    """The backend of this name, if the memory leaves a choice. Raises InvalidOption."""
    if memory not in VIRTUAL:
        return choose_backend(name, device, head_dim, kv_cache_dtype)
    if name not in ("auto", UNPAGED.name):
        raise InvalidOption(
            f"attention_backend is {name!r}, which reads whole blocks, and with memory={memory!r} "
            'the pages after a sequence\'s last token are not mapped: choose "auto".'
        )
    return UNPAGED


def build_storage(
    memory: str,
    parts: Parts,
    model: ModelConfig,
    config: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
    backend: AttentionBackend,
) -> Storage:
    """Cache and manager of this kind, within the bytes of `config.num_blocks`."""
    if memory in VIRTUAL:
        return _virtual(VIRTUAL[memory], parts, model, config, dtype)
    columns = config.max_blocks_per_seq
    if memory != "paged":
        parts = replace(parts, memory=contiguous(memory, config.max_model_len))
        columns = 1 << (columns - 1).bit_length()  # a region is rounded up to a power of two
    kv_cache = KVCache.build(model, config, dtype, device, backend.copy_blocks)
    batches = BatchBuilder(config.max_num_seqs, columns, config.block_size, device)
    return Storage(kv_cache, parts, batches)


def _virtual(
    kind: VirtualKind,
    parts: Parts,
    model: ModelConfig,
    config: EngineConfig,
    dtype: torch.dtype,
) -> Storage:
    if dtype in LARGEST:
        raise InvalidOption(
            "keys in 8 bits have scales, for which virtual memory has no pages: choose another "
            'kv_cache_dtype, or memory="paged".'
        )
    layout = RegionLayout.for_model(
        model,
        dtype.itemsize,
        num_regions=config.max_num_seqs,
        longest=config.max_model_len,
        page_bytes=HUGE_PAGE if kind.huge_pages else SMALL_PAGE,
        sliced=kind.sliced,
    )
    budget = config.num_blocks * bytes_per_block(model, config.block_size, dtype)
    groups = layout.groups_within(budget)
    kv_cache = VirtualKVCache(model, layout, dtype)

    def memory(**_: Any) -> VirtualMemory:
        return VirtualMemory(layout, groups, kv_cache.pages, int(config.watermark * groups))

    batches = BatchBuilder(config.max_num_seqs, 1, layout.region_len)
    return Storage(kv_cache, replace(parts, memory=memory), batches)
