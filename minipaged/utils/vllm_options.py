"""The keyword arguments of vLLM's LLM, EngineArgs, generate and chat, and their meaning here.

A script for vLLM may pass any of them. Those with the same name and meaning are declared in
`EngineArgs` and `LLMArgs`. Every other one is in exactly one of the tables below:

    OTHER_NAMES     honoured under another name
    WITHOUT_EFFECT  accepted with any value, with the reason why it has no effect
    NOT_BUILT       refused except for its neutral value, with the reason (see `not_built`)

The names are those of vLLM 0.32.0, and of older versions that published scripts were written for.
`as_markdown` prints the tables for docs/guides/vllm_options.md.
"""

from collections.abc import Mapping
from typing import Any

from minipaged.errors import InvalidOption
from minipaged.utils.not_built import by_name, named, refuse_not_built
from minipaged.utils.options import Option

OTHER_NAMES = {
    "num_gpu_blocks_override": "num_blocks",
    "preemption_mode": "preemption",
}

OTHER_VALUES: dict[str, dict[object, object]] = {
    "kv_cache_dtype": {"fp8_e4m3": "fp8"},
    "attention_backend": {"TRITON_ATTN": "triton"},
}
"""Values that are spelt differently here."""

NONE_MEANS_DEFAULT = (
    "attention_backend", "block_size", "enable_chunked_prefill", "generation_config",
    "load_format", "max_num_seqs", "preemption", "seed",
)  # fmt: skip
"""Options that accept None in vLLM but not here."""

WITHOUT_EFFECT: dict[str, str] = {
    "no code that comes with a checkpoint is ever run":
        "trust_remote_code code_revision",
    "nothing is downloaded while a model is loaded: `minipaged fetch` does that":
        "hf_token ignore_patterns",
    "one thread reads safetensors directly into the parameters":
        "max_parallel_loading_workers safetensors_load_strategy safetensors_prefetch_num_threads "
        "safetensors_prefetch_block_size use_tqdm_on_load pt_load_map_location "
        "model_loader_extra_config",
    "it tunes how kernels are compiled and captured, and changes no token":
        "compilation_config optimization_level performance_mode cudagraph_capture_sizes "
        "max_cudagraph_capture_size max_seq_len_to_capture max_context_len_to_capture "
        "kernel_config ir_op_priority linear_backend enable_flashinfer_autotune "
        "jit_monitor_mode jit_monitor_verbose use_v2_block_manager",
    "the ranks find each other automatically, and the engine runs in one process":
        "disable_custom_all_reduce master_addr master_port "
        "distributed_timeout_seconds cpu_distributed_timeout_seconds enable_shm_tensor_arena "
        "disable_nccl_for_dp_synchronization data_parallel_backend dcp_comm_backend "
        "dcp_q_replicate dcp_kv_cache_interleave_size cp_kv_cache_interleave_size "
        "dp_sync_interval ray_workers_use_nsight enable_nccl_comm_suspend worker_use_ray "
        "tokenizer_pool_size renderer_num_workers shutdown_timeout "
        "fail_on_environ_validation",
    "nothing is logged per step; use Python's `logging` for the rest":
        "disable_log_stats disable_log_requests aggregate_engine_logging "
        "enable_logging_iteration_details logging_config log_level log_config_file",
    "only a server reads it":
        "served_model_name max_num_queued_reqs max_num_queued_tokens tokens_only "
        "reasoning_parser reasoning_parser_plugin reasoning_config",
    "cached blocks are compared by their tokens, not by a hash":
        "prefix_caching_hash_algo",
    "shared prefixes are read once where that is faster, which changes no token":
        "disable_cascade_attn",
    "a checkpoint with a sliding window is served up to its width in any case":
        "disable_sliding_window",
    "all layers share one kind of KV cache":
        "disable_hybrid_kv_cache_manager",
    "the models read text only, so there are no images, audio or video to act on":
        "allowed_local_media_path allowed_media_domains language_model_only limit_mm_per_prompt "
        "interleave_mm_strings media_io_kwargs mm_processor_kwargs mm_processor_cache_gb "
        "mm_processor_cache_type mm_hasher_algorithm mm_shm_cache_max_object_size_mb "
        "mm_encoder_tp_mode mm_encoder_attn_backend mm_encoder_attn_dtype "
        "mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path "
        "mm_encoder_fp8_scale_save_margin skip_mm_profiling video_pruning_rate "
        "video_pruning_method mm_tensor_ipc mm_processor_device mm_ipc_gpu_memory_gb "
        "mm_device_do_normalize disable_chunked_mm_input disable_mm_preprocessor_cache "
        "enable_mm_processor_stats ec_manager_config",
    "no model has experts or state-space layers":
        "moe_backend all2all_backend eplb_config expert_placement_strategy "
        "sparse_indexer_topk_backend elastic_ep_max_dp_size mamba_cache_dtype "
        "mamba_ssm_cache_dtype mamba_block_size mamba_cache_mode mamba_backend mamba_config "
        "mamba_ssu_algorithm enable_mamba_cache_stochastic_rounding mamba_cache_philox_rounds "
        "enable_mamba_shared_prefix_checkpoint replayssm_buffer_len use_replayssm "
        "gdn_prefill_backend kda_prefill_backend kda_decode_backend",
    "it belongs to enable_lora, which is refused":
        "max_loras max_lora_rank max_cpu_loras lora_dtype lora_target_modules "
        "lora_extra_vocab_size fully_sharded_loras enable_tower_connector_lora "
        "specialize_active_lora enable_mixed_moe_lora_format enable_moe_shared_loras "
        "max_lora_cls_labels",
    "it belongs to an option that is refused":
        "offload_backend offload_num_in_group offload_prefetch_step offload_params "
        "cpu_offload_params kv_offloading_backend sleep_mode_offload_cudagraph "
        "sleep_preserve_parameter_names dbo_decode_token_threshold dbo_prefill_token_threshold "
        "data_parallel_rank data_parallel_start_rank data_parallel_size_local "
        "data_parallel_address data_parallel_rpc_port node_rank numa_bind_nodes numa_bind_cpus "
        "allow_deprecated_quantization long_prefill_token_threshold_adaptive "
        "kv_cache_metrics_sample custom_histogram_buckets fault_tolerance_config",
}  # fmt: skip

NOT_BUILT: dict[str, dict[str, object]] = {
    "several ranks share one model by tensor parallelism only": {
        "pipeline_parallel_size": 1, "data_parallel_size": 1,
        "prefill_context_parallel_size": 1, "decode_context_parallel_size": 1, "nnodes": 1,
        "enable_expert_parallel": False, "enable_batch_sharded_sampling": False,
        "enable_ep_weight_filter": False, "enable_eplb": False, "enable_elastic_ep": False,
        "enable_hc_sp": False, "enable_dbo": False, "ubatch_size": 0,
        "data_parallel_hybrid_lb": False, "data_parallel_external_lb": False,
        "data_parallel_multi_port_external_lb": False, "numa_bind": False,
        "enable_fault_tolerance": False,
    },
    "ranks are started by the engine, or by torchrun": {
        "distributed_executor_backend": ("uni", "mp", "external_launcher"),
    },
    "the device is chosen by the option `device`": {"device_ids": None},
    "quantised weights are not read": {"quantization": None, "quantization_config": None},
    "weights and blocks stay where they are loaded; only preempted requests are swapped": {
        "cpu_offload_gb": 0, "offload_group_size": 0, "kv_offloading_size": None,
        "enable_sleep_mode": False, "enable_cumem_allocator": False,
    },
    "LoRA adapters are not built": {"enable_lora": False, "default_mm_loras": None},
    "speculative decoding is not built": {
        "speculative_config": None, "spec_method": None, "spec_model": None, "spec_tokens": None,
        "speculative_model": None, "num_speculative_tokens": None, "num_lookahead_slots": 0,
        "per_request_spec_decode_metrics": "none",
    },
    "guided decoding and structured outputs are not built": {
        "structured_outputs_config": None, "guided_decoding_backend": ("auto", "outlines"),
    },
    "requests are served in the order of their arrival (the paper's FCFS)": {
        "scheduling_policy": "fcfs", "scheduler_cls": None, "scheduler_delay_factor": 0,
        "long_prefill_token_threshold": 0, "max_num_partial_prefills": 1,
        "max_long_partial_prefills": 1, "prefill_schedule_interval": 1,
        "num_scheduler_steps": 1, "scheduler_reserve_full_isl": True,
        "max_num_scheduled_tokens": None, "max_num_active_seqs": None,
    },
    "custom code goes into `parts` (see `Parts`)": {
        "worker_cls": "auto", "worker_extension_cls": None, "model_class_overrides": None,
        "io_processor_plugin": None, "additional_config": None, "logits_processors": None,
    },
    "only text generation with the models built here is possible": {
        "runner": ("auto", "generate"), "task": ("auto", "generate"), "convert": ("auto", "none"),
        "pooler_config": None, "override_pooler_config": None, "model_impl": ("auto", "vllm"),
        "diffusion_config": None, "engram_config": None, "enable_prompt_embeds": False,
        "enable_mm_embeds": False, "mm_encoder_only": False,
    },
    "config.json, safetensors and the tokenizer are read in Hugging Face's formats only": {
        "tokenizer_mode": ("auto", "hf", "slow"), "config_format": ("auto", "hf"),
        "hf_config_path": None, "model_weights": None,
    },
    "keys and values are kept in the pool, in one format for all layers": {
        "kv_transfer_config": None, "kv_events_config": None, "ec_transfer_config": None,
        "weight_transfer_config": None, "kv_cache_dtype_skip_layers": None,
        "calculate_kv_scales": False, "kv_sharing_fast_prefill": False,
        "swa_bounded_replay": False, "prefix_match_unit": None,
        "prefix_cache_retention_interval": None, "attention_config": None,
    },
    "log-probabilities are those of the model, and outputs hold nothing else of a step": {
        "logprobs_mode": "raw_logprobs", "return_sampling_mask": False,
        "enable_return_routed_experts": False, "aux_output_config": None,
        "use_fp64_gumbel": False, "watermark_config": None,
    },
    "every step reports every new token": {"stream_interval": 1},
    "profiles, metrics and traces are those of `minipaged bench` and `minipaged trace`": {
        "profiler_config": None, "otlp_traces_endpoint": None, "collect_detailed_traces": None,
        "kv_cache_metrics": False, "cudagraph_metrics": False, "enable_mfu_metrics": False,
        "enable_layerwise_nvtx_tracing": False, "enable_trace_replay": False,
        "show_hidden_metrics_for_version": None,
    },
}  # fmt: skip

CALLS_NOT_BUILT: dict[str, dict[str, object]] = {
    "LoRA adapters are not built": {"lora_request": None},
    "requests are served in the order of their arrival (the paper's FCFS)": {"priority": 0},
    "guided decoding and structured outputs are not built": {"guided_options_request": None},
    "`max_num_seqs` limits how many sequences run": {"concurrency_limit": None},
    "the engine records when a request arrives": {"arrival_time": None},
    "requests are not traced over a network": {"trace_headers": None},
    "text and token ids go into one prompt, as a dict": {"prompt_text": None},
    "the models read text only": {"mm_processor_kwargs": None},
    "prompts are encoded by the checkpoint's tokenizer": {"tokenization_kwargs": None},
    "a message's content is given to the chat template as text": {
        "chat_template_content_format": ("auto", "string"),
    },
}  # fmt: skip
"""`NOT_BUILT` for arguments of `LLM.generate`, `LLM.chat` and `LLMEngine.add_request`."""


def translate(given: Mapping[str, Any], known: Mapping[str, Option]) -> dict[str, Any]:
    """Replace vLLM's names and values of options by ours, and check the others.

    Raises InvalidOption for an option that is not supported, and for a name unknown to vLLM.
    """
    ours: dict[str, Any] = {}
    for name, value in given.items():
        if (theirs := OTHER_NAMES.get(name)) is not None:
            if theirs in given:
                raise InvalidOption(
                    f"{name} and {theirs} are two names of one option: leave out one of them.", name
                )
            name = theirs
        if name in known:
            if value is not None or name not in NONE_MEANS_DEFAULT:
                ours[name] = _our_value(name, value)
        elif name not in _NAMES_WITHOUT_EFFECT:
            refuse_not_built(name, value, _NOT_BUILT, known)
    return ours


def refuse_call_options(given: Mapping[str, Any]) -> None:
    """Refuse unsupported arguments of vLLM's `generate` and `chat`. Raises InvalidOption."""
    for name, value in given.items():
        each = [value]
        if name == "priority" and isinstance(value, list | tuple):
            each = list(value)  # one for each prompt
        for one in each:
            refuse_not_built(name, one, _CALLS_NOT_BUILT, _CALL_ARGUMENTS)


def _our_value(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return OTHER_VALUES.get(name, {}).get(value, value)
    kind = type(value)
    if name == "dtype" and (kind.__module__, kind.__name__) == ("torch", "dtype"):
        return str(value).removeprefix("torch.")  # torch.float16; this module imports no torch
    return value


_NAMES_WITHOUT_EFFECT = {
    name: reason for reason, names in WITHOUT_EFFECT.items() for name in names.split()
}
_NOT_BUILT = by_name(NOT_BUILT)
_CALLS_NOT_BUILT = by_name(CALLS_NOT_BUILT)
_CALL_ARGUMENTS = ("prompts", "sampling_params", "use_tqdm", "prompt_token_ids")
CALL_NAMES = tuple(_CALLS_NOT_BUILT)


def as_markdown() -> str:
    """Return all tables as Markdown, for docs/guides/vllm_options.md."""
    lines = ["| vLLM's name | name here |", "|---|---|"]
    lines += [f"| `{theirs}` | `{ours}` |" for theirs, ours in OTHER_NAMES.items()]
    lines += [
        f"| `{name}={theirs!r}` | `{name}={ours!r}` |"
        for name, values in OTHER_VALUES.items()
        for theirs, ours in values.items()
    ]
    lines += ["", "| accepted, without effect | why |", "|---|---|"]
    for reason, names in WITHOUT_EFFECT.items():
        lines.append(f"| {', '.join(f'`{name}`' for name in names.split())} | {reason} |")
    lines += ["", "| refused, unless it has this value | why |", "|---|---|"]
    for reason, names in (*NOT_BUILT.items(), *CALLS_NOT_BUILT.items()):
        each = ", ".join(f"`{name}={named(value)}`" for name, value in names.items())
        lines.append(f"| {each} | {reason} |")
    return "\n".join(lines) + "\n"
