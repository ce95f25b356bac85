"""Cache tensors and memory manager for each kind of memory: paging and the baselines."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from minipaged.attention.backend import UNPAGED, AttentionBackend, choose_backend
from minipaged.attention.batch import BatchBuilder
from minipaged.attention.device_batch import choose_builder
from minipaged.attention.kv_cache import Cache, KVCache, bytes_per_block
from minipaged.attention.virtual_cache import VirtualKVCache
from minipaged.config import EngineArgs, EngineConfig, ModelConfig
from minipaged.engine.parts import Parts
from minipaged.memory.baselines.contiguous import contiguous
from minipaged.memory.baselines.pages import HUGE_PAGE, SMALL_PAGE
from minipaged.memory.baselines.regions import RegionLayout
from minipaged.memory.baselines.virtual import VIRTUAL, VirtualKind, VirtualMemory


@dataclass(frozen=True)
class Storage:
    """The cache for keys and values, the parts that manage it, and the batches that index it."""

    kv_cache: Cache
    parts: Parts  # with the memory that manages this cache
    batches: BatchBuilder


def choose_attention(args: EngineArgs, device: torch.device, head_dim: int) -> AttentionBackend:
    """Return the requested backend, if the memory allows a choice. Raises InvalidOption."""
    if args.memory in VIRTUAL:
        return UNPAGED
    return choose_backend(
        args.attention_backend, device, head_dim, args.kv_cache_dtype, args.fixed_split_size
    )


def build_storage(
    memory: str,
    parts: Parts,
    model: ModelConfig,
    config: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
    backend: AttentionBackend,
) -> Storage:
    """Build cache and manager of this kind, within the bytes of `config.num_blocks`."""
    if memory in VIRTUAL:
        return _virtual(VIRTUAL[memory], parts, model, config, dtype)
    columns = config.max_blocks_per_seq
    if memory != "paged":
        parts = replace(parts, memory=contiguous(memory, config.max_model_len))
        columns = 1 << (columns - 1).bit_length()  # a region is rounded up to a power of two
    kv_cache = KVCache.build(model, config, dtype, device, backend.copy_blocks)
    batches = choose_builder(config.max_num_seqs, columns, config.block_size, device)
    return Storage(kv_cache, parts, batches)


def _virtual(
    kind: VirtualKind,
    parts: Parts,
    model: ModelConfig,
    config: EngineConfig,
    dtype: torch.dtype,
) -> Storage:
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
        kv_cache.pages.unmap_all()
        return VirtualMemory(layout, groups, kv_cache.pages, int(config.watermark * groups))

    batches = BatchBuilder(config.max_num_seqs, 1, layout.region_len)
    return Storage(kv_cache, replace(parts, memory=memory), batches)
