"""From options to an engine: attention, weights, cache and scheduler, put together."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from minipaged.attention import AttentionBackend, choose_backend
from minipaged.batch import BatchBuilder
from minipaged.config import EngineConfig, require_one_of, require_share, require_whole
from minipaged.defaults import choose_config, open_tokenizer
from minipaged.engine import LLMEngine
from minipaged.errors import InvalidOption
from minipaged.graphs import DecodeGraphs, record_cuda_graphs
from minipaged.kv_cache import KVCache, bytes_per_block, choose_kv_dtype
from minipaged.memory import BlockManager
from minipaged.memory.kinds import KINDS, contiguous
from minipaged.models import Model
from minipaged.models.linear import pack_weights
from minipaged.models.loader import load_model, read_model_config
from minipaged.parts import Parts
from minipaged.runner import (
    SWAP_BYTES,
    ModelRunner,
    blocks_that_fit,
    choose_device,
    refuse_more_than_memory,
)


def build_engine(
    folder: Path,
    parts: Parts,
    *,
    device: str,
    dtype: str,
    attention_backend: str,
    kv_cache_dtype: str,
    memory: str,
    block_size: int,
    gpu_memory_utilization: float,
    enforce_eager: bool,
    seed: int,
    **options: Any,
) -> LLMEngine:
    """The engine of `LLM`, whose options these are. Raises InvalidOption, CheckpointError."""
    where = choose_device(device)
    require_share("gpu_memory_utilization", gpu_memory_utilization, 0.01, 1.0)
    options |= _options_of(memory, parts, options)
    head_dim = read_model_config(folder).head_dim
    backend = choose_backend(attention_backend, where, head_dim, kv_cache_dtype)
    backend = parts.attention(backend)
    model = load_model(folder, backend, dtype, where)
    if where.type == "cpu":
        pack_weights(model)
    kv_dtype = choose_kv_dtype(kv_cache_dtype, next(model.parameters()).dtype)
    require_whole("block_size", block_size, 1)
    block_bytes = bytes_per_block(model.config, block_size, kv_dtype)
    config = choose_config(
        model.config,
        where.type,
        lambda: blocks_that_fit(block_bytes, where, gpu_memory_utilization),
        max(1, SWAP_BYTES // block_bytes),
        block_size=block_size,
        **options,
    )
    refuse_more_than_memory(config.num_blocks, config.num_swap_blocks, block_bytes, where)
    kv_cache = KVCache.build(model.config, config, kv_dtype, where, backend.copy_blocks)
    columns = config.max_blocks_per_seq
    if memory != "paged":
        parts = replace(parts, memory=contiguous(memory, config.max_model_len))
        columns = 1 << (columns - 1).bit_length()  # a run is rounded up to a power of two
    return LLMEngine(
        config,
        parts.build_scheduler(config),
        BatchBuilder(config.max_num_seqs, columns, block_size, where),
        ModelRunner(model, kv_cache, _graphs(model, kv_cache, backend, config, enforce_eager)),
        open_tokenizer(folder),
        seed=seed,
    )


def _options_of(memory: str, parts: Parts, options: dict[str, Any]) -> dict[str, Any]:
    """What must be changed for a memory that is not paged. Raises InvalidOption."""
    require_one_of("memory", memory, KINDS)
    if memory == "paged":
        return {}
    if parts.memory is not BlockManager:
        raise InvalidOption(
            f"memory is {memory!r}, and parts bring a memory of their own: leave out one of them."
        )
    if options["preemption"] == "swap":
        raise InvalidOption(
            f'only paged memory swaps, and memory is {memory!r}: leave out preemption="swap".'
        )
    return {"enable_prefix_caching": False, "num_swap_blocks": 0}


def _graphs(
    model: Model,
    kv_cache: KVCache,
    backend: AttentionBackend,
    config: EngineConfig,
    enforce_eager: bool,
) -> DecodeGraphs | None:
    device = kv_cache.device
    if device.type != "cuda" or not backend.reads_only_tensors or enforce_eager:
        return None
    record = record_cuda_graphs(device)
    return DecodeGraphs(model, kv_cache, config.max_num_seqs, config.max_blocks_per_seq, record)
