"""From options to an engine: attention, weights, cache and scheduler, put together."""

from pathlib import Path
from typing import Any

from minipaged.attention import AttentionBackend
from minipaged.config import EngineConfig, require_share, require_whole
from minipaged.defaults import choose_config, open_tokenizer
from minipaged.engine import LLMEngine
from minipaged.graphs import DecodeGraphs, record_cuda_graphs
from minipaged.kv_cache import Cache, bytes_per_block, choose_kv_dtype
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
from minipaged.storage import build_storage, check_memory, choose_attention


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
    options |= check_memory(memory, parts, options["preemption"])
    head_dim = read_model_config(folder).head_dim
    backend = choose_attention(memory, attention_backend, where, head_dim, kv_cache_dtype)
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
    storage = build_storage(memory, parts, model.config, config, kv_dtype, where, backend)
    graphs = _graphs(model, storage.kv_cache, backend, config, enforce_eager)
    return LLMEngine(
        config,
        storage.parts.build_scheduler(config),
        storage.batches,
        ModelRunner(model, storage.kv_cache, graphs),
        open_tokenizer(folder),
        sampling_request=parts.sampling_request,
        seed=seed,
    )


def _graphs(
    model: Model,
    kv_cache: Cache,
    backend: AttentionBackend,
    config: EngineConfig,
    enforce_eager: bool,
) -> DecodeGraphs | None:
    device = kv_cache.device
    if device.type != "cuda" or not backend.reads_only_tensors or enforce_eager:
        return None
    record = record_cuda_graphs(device)
    return DecodeGraphs(model, kv_cache, config.max_num_seqs, config.max_blocks_per_seq, record)
