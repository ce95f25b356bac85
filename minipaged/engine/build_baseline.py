"""Which tensors and which manager each kind of memory has, paging and its rivals."""

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
from minipaged.memory.baselines.kinds import KINDS, VIRTUAL, VirtualKind, contiguous
from minipaged.memory.baselines.pages import HUGE_PAGE, SMALL_PAGE
from minipaged.memory.baselines.slots import RegionLayout
from minipaged.memory.baselines.virtual import VirtualMemory


@dataclass(frozen=True)
class Storage:
    """Where keys and values lie, who decides it, and how batches speak of it."""

    kv_cache: Cache
    parts: Parts  # whose memory manages that cache
    batches: BatchBuilder


def check_memory(memory: str, parts: Parts, preemption: str) -> dict[str, Any]:
    """The options that must be changed for this kind of memory. Raises InvalidOption."""
    require_one_of("memory", memory, KINDS)
    if memory == "paged":
        return {}
    if parts.memory is not BlockManager:
        raise InvalidOption(
            f"memory is {memory!r}, and parts bring a memory of their own: leave out one of them."
        )
    if preemption == "swap":
        raise InvalidOption(
            f'only paged memory swaps, and memory is {memory!r}: leave out preemption="swap".'
        )
    return {"enable_prefix_caching": False, "num_swap_blocks": 0}


def choose_attention(
    memory: str, name: str, device: torch.device, head_dim: int, kv_cache_dtype: str
) -> AttentionBackend:
    """The backend of this name, where the memory leaves a choice. Raises InvalidOption."""
    if memory not in VIRTUAL:
        return choose_backend(name, device, head_dim, kv_cache_dtype)
    if name not in ("auto", UNPAGED.name):
        raise InvalidOption(
            f"attention_backend is {name!r}, which reads whole blocks, and with memory={memory!r} "
            'there is no memory behind a sequence\'s end: choose "auto".'
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
        return _virtual(VIRTUAL[memory], parts, model, config, dtype, device)
    columns = config.max_blocks_per_seq
    if memory != "paged":
        parts = replace(parts, memory=contiguous(memory, config.max_model_len))
        columns = 1 << (columns - 1).bit_length()  # a run is rounded up to a power of two
    kv_cache = KVCache.build(model, config, dtype, device, backend.copy_blocks)
    batches = BatchBuilder(config.max_num_seqs, columns, config.block_size, device)
    return Storage(kv_cache, parts, batches)


def _virtual(
    kind: VirtualKind,
    parts: Parts,
    model: ModelConfig,
    config: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> Storage:
    if dtype in LARGEST:
        raise InvalidOption(
            "in 8 bits, keys have scales that need pages of their own, which virtual memory does "
            'not give them: choose another kv_cache_dtype, or memory="paged".'
        )
    huge = kind.huge_pages or device.type == "cuda"
    layout = RegionLayout.for_model(
        model,
        dtype.itemsize,
        num_slots=config.max_num_seqs,
        longest=config.max_model_len,
        page_bytes=HUGE_PAGE if huge else SMALL_PAGE,
        sliced=kind.sliced,
    )
    budget = config.num_blocks * bytes_per_block(model, config.block_size, dtype)
    groups = layout.groups_within(budget)
    if device.type == "cuda":
        kv_cache = VirtualKVCache.on_gpu(model, layout, dtype, groups, device)
    else:
        kv_cache = VirtualKVCache.on_cpu(model, layout, dtype)

    def memory(**_: Any) -> VirtualMemory:
        return VirtualMemory(layout, groups, kv_cache.pages, int(config.watermark * groups))

    batches = BatchBuilder(config.max_num_seqs, 1, layout.region_len, device)
    return Storage(kv_cache, replace(parts, memory=memory), batches)
