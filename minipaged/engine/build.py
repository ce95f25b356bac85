"""Builds an engine from options: attention, weights, cache and scheduler."""

from dataclasses import fields, replace
from functools import partial

import torch

from minipaged.attention.backend import AttentionBackend
from minipaged.attention.kv_cache import bytes_per_block, choose_kv_dtype
from minipaged.config import EngineArgs, EngineConfig, ModelConfig
from minipaged.engine.arg_utils import Folders, LLMArgs
from minipaged.engine.build_baseline import Storage, build_storage, choose_attention
from minipaged.engine.choose_config import choose_config, choose_limits
from minipaged.engine.llm_engine import LLMEngine
from minipaged.engine.parts import Parts
from minipaged.engine.refusals import refuse_what_is_ignored, why_steps_cannot_overlap
from minipaged.models.base import Model
from minipaged.models.linear import pack_weights
from minipaged.models.loader import build_empty, load_model, read_model_config
from minipaged.models.parallel import refuse_uneven_parts
from minipaged.sampling.sampler import Sampler
from minipaged.tokenizer.load import open_tokenizer
from minipaged.utils.device import warn_if_bfloat16_is_slow
from minipaged.worker.cache_size import SWAP_BYTES, refuse_large_tables, refuse_more_than_memory
from minipaged.worker.cuda_graphs import choose_graphs
from minipaged.worker.executor import Executor, MultiExecutor, UniExecutor
from minipaged.worker.model_runner import ModelRunner
from minipaged.worker.process import WorkerArgs
from minipaged.worker.ranks import num_local_ranks
from minipaged.worker.spawn import choose_rank_device
from minipaged.worker.warm_up import StepLimits, room_for_blocks


def build_engine(args: LLMArgs, folders: Folders) -> LLMEngine:
    """Build the engine of `LLM`. Raises InvalidOption, CheckpointError, WorkerLost."""
    parts = args.parts or Parts()
    device = choose_rank_device(args)
    refuse_what_is_ignored(args, parts, device.type)
    if args.async_scheduling is None:
        overlap = device.type == "cuda" and why_steps_cannot_overlap(args, parts) is None
        args = replace(args, async_scheduling=overlap)
    tokenizer = None if args.skip_tokenizer_init else open_tokenizer(folders.tokenizer)
    model_config = read_model_config(folders.model, args.hf_overrides, folders.generation)
    backend = parts.attention(choose_attention(args, device, model_config.head_dim))
    limits = choose_limits(args, model_config, device.type)
    executor = _choose_executor(args, folders, model_config, limits, device, backend)
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
        warn_if_bfloat16_is_slow(model.dtype, device)
        if device.type == "cpu":
            pack_weights(model, args.weight_dtype)
        if tokenizer is not None:
            _add_end_token(model, tokenizer.eos_token_id)
        config, storage = _build_storage(args, parts, model, limits, device, backend, executor)
        kv_cache, batches = storage.kv_cache, storage.batches
        graphs = choose_graphs(model, kv_cache, backend, batches, args.enforce_eager)
        runner = ModelRunner(model, backend, kv_cache, batches, graphs, executor.gather)
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
    args: LLMArgs,
    folders: Folders,
    model_config: ModelConfig,
    limits: StepLimits,
    device: torch.device,
    backend: AttentionBackend,
) -> Executor:
    if args.tensor_parallel_size == 1:
        return UniExecutor()
    # Refuse this before any process is started.
    refuse_uneven_parts(build_empty(model_config, backend), args.tensor_parallel_size)
    options = EngineArgs(**{each.name: getattr(args, each.name) for each in fields(EngineArgs)})
    dummy = args.load_format == "dummy"
    chooses_num_blocks = args.num_blocks is None and args.kv_cache_memory_bytes is None
    told_limits = limits if chooses_num_blocks else None
    told = WorkerArgs(options, folders.model, model_config, dummy, told_limits)
    return MultiExecutor(told, device)


def _build_storage(
    args: LLMArgs,
    parts: Parts,
    model: Model,
    limits: StepLimits,
    device: torch.device,
    backend: AttentionBackend,
    executor: Executor,
) -> tuple[EngineConfig, Storage]:
    """Choose the sizes of the pools, and build the pools."""
    kv_dtype = choose_kv_dtype(args.kv_cache_dtype, model.dtype)
    block_bytes = bytes_per_block(model.config, args.block_size, kv_dtype)
    ranks = num_local_ranks(args.tensor_parallel_size)
    room = partial(room_for_blocks, model, backend, args, limits, device, executor.gather)
    config = choose_config(
        args.in_blocks(block_bytes),
        limits,
        room=lambda: executor.agree_on_least(room()),
        swap_room=max(1, SWAP_BYTES // block_bytes // ranks),
    )
    refuse_large_tables(config.max_num_seqs, config.max_blocks_per_seq)
    refuse_more_than_memory(config.num_blocks, config.num_swap_blocks, ranks * block_bytes, device)
    return config, build_storage(
        args.memory, parts, model.config, config, kv_dtype, device, backend
    )


def _add_end_token(model: Model, token_id: int | None) -> None:
    """Add the tokenizer's end token, which chat models generate, as vLLM does."""
    config = model.config
    if token_id is not None and token_id < config.vocab_size:
        ends = dict.fromkeys((*config.eos_token_ids, token_id))  # each once, in order
        model.config = replace(config, eos_token_ids=tuple(ends))
