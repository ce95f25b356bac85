"""From options to an engine: attention, weights, cache and scheduler, put together."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from math import ceil

import torch

from minipaged.attention.backend import AttentionBackend
from minipaged.attention.kv_cache import bytes_per_block, choose_kv_dtype
from minipaged.config import EngineArgs, EngineConfig, ModelConfig
from minipaged.engine.arg_utils import Folders, LLMArgs
from minipaged.engine.build_baseline import Storage, build_storage, choose_attention
from minipaged.engine.llm_engine import LLMEngine
from minipaged.engine.parts import Parts
from minipaged.engine.refusals import refuse_what_is_ignored
from minipaged.errors import InvalidOption
from minipaged.models.base import Model
from minipaged.models.linear import pack_weights
from minipaged.models.loader import load_model, read_model_config
from minipaged.sampling.sampler import Sampler
from minipaged.tokenizer.load import open_tokenizer
from minipaged.worker.cache_size import (
    SWAP_BYTES,
    blocks_that_fit,
    refuse_large_tables,
    refuse_more_than_memory,
)
from minipaged.worker.cuda_graphs import choose_graphs
from minipaged.worker.executor import Executor, MultiExecutor, UniExecutor
from minipaged.worker.model_runner import ModelRunner
from minipaged.worker.process import WorkerArgs
from minipaged.worker.ranks import num_local_ranks
from minipaged.worker.spawn import choose_rank_device

# Query tokens in a step: as many as it takes to multiply matrices at full speed. With more,
# running requests would only wait longer for their next token.
STEP_TOKENS = {"cpu": 512, "cuda": 2048}


def build_engine(args: LLMArgs, folders: Folders) -> LLMEngine:
    """The engine of `LLM`. Raises InvalidOption, CheckpointError, WorkerLost."""
    parts = args.parts or Parts()
    device = choose_rank_device(args)
    refuse_what_is_ignored(args, parts, device.type)
    tokenizer = None if args.skip_tokenizer_init else open_tokenizer(folders.tokenizer)
    model_config = read_model_config(folders.model, args.hf_overrides, folders.generation)
    backend = parts.attention(choose_attention(args, device, model_config.head_dim))
    executor = _choose_executor(args, folders, model_config, device)
    with executor.starting():
        model = load_model(
            folders.model,
            backend,
            args.dtype,
            device,
            config=model_config,
            random_weights=args.load_format == "dummy",
            part=executor.part,
        )
        if device.type == "cpu":
            pack_weights(model)
        if tokenizer is not None:
            _add_end_token(model, tokenizer.eos_token_id)
        config, storage = _build_storage(args, parts, model, device, backend, executor)
        kv_cache = storage.kv_cache
        graphs = choose_graphs(model, kv_cache, backend, config, args.enforce_eager)
        gather = executor.gather
        runner = ModelRunner(model, backend, kv_cache, storage.batches, graphs, gather)
        executor.start(config, runner)
    for wrap in parts.executor_wrappers:
        executor = wrap(executor)
    return LLMEngine(
        config,
        partial(storage.parts.build_scheduler, config),
        executor,
        tokenizer,
        sampling_request=parts.sampling_request,
        sampler=Sampler(parts.adjust_logits),
        seed=args.seed,
    )


def _choose_executor(
    args: LLMArgs, folders: Folders, model_config: ModelConfig, device: torch.device
) -> Executor:
    if args.tensor_parallel_size == 1:
        return UniExecutor()
    options = EngineArgs(**{each.name: getattr(args, each.name) for each in fields(EngineArgs)})
    dummy = args.load_format == "dummy"
    chooses_num_blocks = args.num_blocks is None and args.kv_cache_memory_bytes is None
    told = WorkerArgs(options, folders.model, model_config, dummy, chooses_num_blocks)
    return MultiExecutor(told, device)


def _build_storage(
    args: LLMArgs,
    parts: Parts,
    model: Model,
    device: torch.device,
    backend: AttentionBackend,
    executor: Executor,
) -> tuple[EngineConfig, Storage]:
    """The sizes of the pools, and the pools."""
    kv_dtype = choose_kv_dtype(args.kv_cache_dtype, model.dtype)
    block_bytes = bytes_per_block(model.config, args.block_size, kv_dtype)
    num_ranks = num_local_ranks(args.tensor_parallel_size)
    room = partial(blocks_that_fit, block_bytes, device, args.gpu_memory_utilization, num_ranks)
    config = choose_config(
        args.in_blocks(block_bytes),
        model.config,
        device.type,
        room=lambda: executor.agree_on_least(room()),
        swap_room=max(1, SWAP_BYTES // block_bytes // num_ranks),
    )
    refuse_large_tables(config.max_num_seqs, config.max_blocks_per_seq)
    refuse_more_than_memory(
        config.num_blocks, config.num_swap_blocks, num_ranks * block_bytes, device
    )
    return config, build_storage(
        args.memory, parts, model.config, config, kv_dtype, device, backend
    )


def _add_end_token(model: Model, token_id: int | None) -> None:
    """End sequences at the tokenizer's own end token too, as vLLM does: chat models write that."""
    config = model.config
    if token_id is not None and token_id < config.vocab_size:
        ends = dict.fromkeys((*config.eos_token_ids, token_id))  # each once, in order
        model.config = replace(config, eos_token_ids=tuple(ends))


def choose_config(
    args: EngineArgs,
    model: ModelConfig,
    device_type: str,
    room: Callable[[], int],
    swap_room: int,
) -> EngineConfig:
    """A number for every option that was left open.

    Args:
        room: how many blocks fit in memory.
        swap_room: how many blocks a swap pool may have unless more are asked for.
    """
    longest = model.max_position_embeddings
    max_model_len = longest if args.max_model_len is None else args.max_model_len
    if max_model_len > longest:
        raise InvalidOption(
            f"max_model_len is {max_model_len}, but this {model.architecture} supports {longest} "
            f"tokens: lower max_model_len to {longest}.",
            "max_model_len",
        )
    num_blocks, num_swap_blocks = args.num_blocks, args.num_swap_blocks
    if num_blocks is None:
        num_blocks = min(args.max_num_seqs * ceil(max_model_len / args.block_size), room())
    if num_swap_blocks is None:
        num_swap_blocks = min(num_blocks, swap_room) if args.memory == "paged" else 0
    max_num_batched_tokens = args.max_num_batched_tokens
    if max_num_batched_tokens is None:
        whole_prompt = 0 if args.enable_chunked_prefill else max_model_len
        max_num_batched_tokens = max(STEP_TOKENS[device_type], args.max_num_seqs, whole_prompt)
    caches_prefixes = args.enable_prefix_caching
    return EngineConfig.from_args(
        args,
        num_blocks=num_blocks,
        num_swap_blocks=num_swap_blocks,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=args.memory == "paged"
        if caches_prefixes is None
        else caches_prefixes,
    )
