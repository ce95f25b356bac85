"""From options to an engine: attention, weights, cache and scheduler, put together."""

from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

from minipaged.attention.backend import AttentionBackend
from minipaged.attention.kv_cache import Cache, bytes_per_block, choose_kv_dtype
from minipaged.config import EngineConfig, ModelConfig, require_share, require_whole
from minipaged.engine.build_baseline import build_storage, check_memory, choose_attention
from minipaged.engine.llm_engine import LLMEngine
from minipaged.engine.parts import Parts
from minipaged.errors import InvalidOption
from minipaged.models.base import Model
from minipaged.models.linear import pack_weights
from minipaged.models.loader import load_model, read_model_config
from minipaged.tokenizer.load import open_tokenizer
from minipaged.utils.device import choose_device
from minipaged.worker.cache_size import SWAP_BYTES, blocks_that_fit, refuse_more_than_memory
from minipaged.worker.cuda_graphs import DecodeGraphs, record_cuda_graphs
from minipaged.worker.model_runner import ModelRunner

# Query tokens in a step: as many as it takes to multiply matrices at full speed. More would only
# let those who decode wait longer.
STEP_TOKENS = {"cpu": 512, "cuda": 2048}


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
    options |= check_memory(memory, parts, options["preemption"], where)
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
        ModelRunner(model, backend, storage.kv_cache, storage.batches, graphs),
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
    if device.type != "cuda" or not backend.cuda_graph_safe or enforce_eager:
        return None
    record = record_cuda_graphs(device)
    return DecodeGraphs(model, kv_cache, config.max_num_seqs, config.max_blocks_per_seq, record)


def choose_config(
    model: ModelConfig,
    device_type: str,
    room: Callable[[], int],
    swap_room: int,
    *,
    num_blocks: int | None,
    num_swap_blocks: int | None,
    max_model_len: int | None,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int | None,
    enable_chunked_prefill: bool,
    **others: Any,
) -> EngineConfig:
    """What was asked for, and a number for what was left open, within what memory has room for."""
    require_whole("max_num_seqs", max_num_seqs, 1)
    longest = model.max_position_embeddings
    if max_model_len is None:
        max_model_len = longest
    require_whole("max_model_len", max_model_len, 2)
    if max_model_len > longest:
        raise InvalidOption(
            f"max_model_len is {max_model_len}, but {model.architecture} was made for {longest} "
            f"tokens here: give at most {longest}."
        )
    if num_blocks is None:
        num_blocks = min(max_num_seqs * ceil(max_model_len / block_size), room())
    require_whole("num_blocks", num_blocks, 1)
    if num_swap_blocks is None:
        num_swap_blocks = min(num_blocks, swap_room)
    if max_num_batched_tokens is None:
        whole_prompt = 0 if enable_chunked_prefill else max_model_len
        max_num_batched_tokens = max(STEP_TOKENS[device_type], max_num_seqs, whole_prompt)
    return EngineConfig(
        num_blocks=num_blocks,
        num_swap_blocks=num_swap_blocks,
        max_model_len=max_model_len,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_chunked_prefill=enable_chunked_prefill,
        **others,
    )
