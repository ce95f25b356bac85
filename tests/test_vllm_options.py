"""Arguments of vLLM's LLM, EngineArgs, generate and chat: honoured, without effect, or refused."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from tqdm import tqdm

import minipaged
from minipaged import LLM, EngineArgs, LLMEngine, SamplingParams
from minipaged.engine.arg_utils import OPTIONS_OF_LLM
from minipaged.errors import CheckpointError, InvalidOption, InvalidRequest, MissingTokenizer
from minipaged.sampling import RequestOutputKind
from minipaged.sampling.logprobs import Logprob
from minipaged.utils.argparse_utils import FlexibleArgumentParser
from minipaged.utils.vllm_options import (
    CALLS_NOT_BUILT,
    NOT_BUILT,
    OTHER_NAMES,
    WITHOUT_EFFECT,
    as_markdown,
)

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "vllm_options.md"
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
SMALL = {"num_blocks": 32, "num_swap_blocks": 0, "max_num_seqs": 4}

# Fields of vLLM 0.32.0's EngineArgs, and the arguments of its LLM.__init__ that are not among them.
VLLM_0_32 = """
model enable_return_routed_experts return_sampling_mask model_weights served_model_name tokenizer
hf_config_path runner convert skip_tokenizer_init enable_prompt_embeds tokenizer_mode
trust_remote_code allowed_local_media_path allowed_media_domains download_dir
safetensors_load_strategy safetensors_prefetch_num_threads safetensors_prefetch_block_size
load_format config_format dtype kv_cache_dtype seed max_model_len cudagraph_capture_sizes
max_cudagraph_capture_size ir_op_priority distributed_executor_backend pipeline_parallel_size
master_addr master_port nnodes node_rank distributed_timeout_seconds
cpu_distributed_timeout_seconds numa_bind numa_bind_nodes numa_bind_cpus device_ids
tensor_parallel_size prefill_context_parallel_size decode_context_parallel_size dcp_comm_backend
dcp_q_replicate dcp_kv_cache_interleave_size cp_kv_cache_interleave_size data_parallel_size
data_parallel_rank data_parallel_start_rank data_parallel_size_local data_parallel_address
data_parallel_rpc_port data_parallel_hybrid_lb data_parallel_external_lb
data_parallel_multi_port_external_lb data_parallel_backend enable_hc_sp enable_expert_parallel
enable_batch_sharded_sampling enable_ep_weight_filter moe_backend linear_backend
sparse_indexer_topk_backend all2all_backend enable_elastic_ep elastic_ep_max_dp_size enable_dbo
ubatch_size dbo_decode_token_threshold dp_sync_interval dbo_prefill_token_threshold
disable_nccl_for_dp_synchronization eplb_config enable_eplb expert_placement_strategy
max_parallel_loading_workers block_size enable_prefix_caching prefix_caching_hash_algo
prefix_cache_retention_interval disable_sliding_window disable_cascade_attn offload_backend
cpu_offload_gb cpu_offload_params offload_group_size offload_num_in_group offload_prefetch_step
offload_params gpu_memory_utilization kv_cache_memory_bytes max_num_batched_tokens
max_num_scheduled_tokens long_prefill_token_threshold long_prefill_token_threshold_adaptive
max_num_seqs max_num_active_seqs max_num_queued_reqs max_num_queued_tokens max_logprobs
logprobs_mode use_fp64_gumbel enable_trace_replay disable_log_stats aggregate_engine_logging
revision code_revision hf_token hf_overrides model_class_overrides tokenizer_revision quantization
quantization_config allow_deprecated_quantization enforce_eager disable_custom_all_reduce
enable_shm_tensor_arena language_model_only limit_mm_per_prompt enable_mm_embeds
interleave_mm_strings media_io_kwargs mm_processor_kwargs mm_processor_cache_gb
mm_processor_cache_type mm_hasher_algorithm mm_shm_cache_max_object_size_mb mm_encoder_only
mm_encoder_tp_mode mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path
mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin io_processor_plugin
renderer_num_workers skip_mm_profiling video_pruning_rate video_pruning_method mm_tensor_ipc
mm_processor_device mm_ipc_gpu_memory_gb mm_device_do_normalize enable_lora max_loras
max_lora_rank default_mm_loras fully_sharded_loras max_cpu_loras lora_dtype lora_target_modules
enable_tower_connector_lora specialize_active_lora enable_mixed_moe_lora_format
enable_moe_shared_loras max_lora_cls_labels ray_workers_use_nsight num_gpu_blocks_override
model_loader_extra_config ignore_patterns enable_chunked_prefill disable_chunked_mm_input
scheduler_reserve_full_isl prefill_schedule_interval watermark disable_hybrid_kv_cache_manager
structured_outputs_config aux_output_config reasoning_parser reasoning_parser_plugin
speculative_config spec_method spec_model spec_tokens watermark_config diffusion_config
show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces
per_request_spec_decode_metrics kv_cache_metrics kv_cache_metrics_sample custom_histogram_buckets
cudagraph_metrics enable_layerwise_nvtx_tracing enable_mfu_metrics enable_logging_iteration_details
jit_monitor_mode jit_monitor_verbose enable_mm_processor_stats scheduling_policy scheduler_cls
pooler_config compilation_config attention_config engram_config mamba_config kernel_config
enable_flashinfer_autotune worker_cls worker_extension_cls profiler_config logging_config log_level
log_config_file kv_transfer_config kv_events_config ec_transfer_config ec_manager_config
reasoning_config generation_config enable_sleep_mode sleep_mode_offload_cudagraph
sleep_preserve_parameter_names enable_cumem_allocator enable_nccl_comm_suspend
override_generation_config model_impl attention_backend kv_cache_dtype_skip_layers
mamba_cache_dtype mamba_ssm_cache_dtype mamba_block_size prefix_match_unit mamba_cache_mode
enable_mamba_shared_prefix_checkpoint replayssm_buffer_len use_replayssm mamba_backend
mamba_ssu_algorithm enable_mamba_cache_stochastic_rounding mamba_cache_philox_rounds
additional_config use_tqdm_on_load pt_load_map_location logits_processors async_scheduling
stream_interval kv_sharing_fast_prefill swa_bounded_replay optimization_level performance_mode
fault_tolerance_config enable_fault_tolerance kv_offloading_size kv_offloading_backend tokens_only
shutdown_timeout weight_transfer_config fail_on_environ_validation gdn_prefill_backend
kda_prefill_backend kda_decode_backend chat_template
""".split()

REFUSED = {name: neutral for names in NOT_BUILT.values() for name, neutral in names.items()}
IGNORED = [name for names in WITHOUT_EFFECT.values() for name in names.split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llm(folder) -> LLM:
    return LLM(folder, **SMALL)


# ---- the tables ----------------------------------------------------------------------------------


def test_every_argument_of_vllm_is_in_exactly_one_group():
    groups = [list(OPTIONS_OF_LLM), list(OTHER_NAMES), IGNORED, list(REFUSED)]
    names = [name for group in groups for name in group]
    assert len(names) == len(set(names))
    assert not set(VLLM_0_32) - set(names)


def test_the_page_shows_the_tables():
    assert as_markdown() in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", IGNORED)
def test_an_argument_without_effect_is_accepted(name):
    assert EngineArgs(**{name: True}) == EngineArgs()


@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_option_is_refused_by_name_unless_neutral(name):
    neutral = REFUSED[name] if isinstance(REFUSED[name], tuple) else (REFUSED[name],)
    for value in (*neutral, None):
        assert EngineArgs(**{name: value}) == EngineArgs()
    for value in ("something", 7, object(), torch.ones(2)):
        with pytest.raises(InvalidOption, match=rf"^{name} is .*, but .*: leave it out") as error:
            EngineArgs(**{name: value})
        assert error.value.param == name


def test_1_is_not_true_and_true_is_not_a_number():
    with pytest.raises(InvalidOption, match="pipeline_parallel_size is True"):
        EngineArgs(pipeline_parallel_size=True)
    with pytest.raises(InvalidOption, match="enable_lora is 0"):
        EngineArgs(enable_lora=0)


def test_a_name_unknown_to_vllm_is_refused_with_the_closest_name():
    with pytest.raises(InvalidOption, match="'tensor_paralel': did you mean 'tensor_parallel_size"):
        LLM(tensor_paralel=1)


# ---- other names and values ----------------------------------------------------------------------


def test_other_names_and_values_mean_what_they_mean_in_vllm():
    assert EngineArgs(num_gpu_blocks_override=7).num_blocks == 7
    assert EngineArgs(preemption_mode="swap").preemption == "swap"
    assert EngineArgs(preemption_mode=None).preemption == "auto"
    assert EngineArgs(kv_cache_dtype="fp8_e4m3").kv_cache_dtype == "fp8"
    assert EngineArgs(dtype=torch.bfloat16).dtype == "bfloat16"
    assert EngineArgs(max_num_seqs=None, block_size=None) == EngineArgs()


def test_two_names_of_one_option_are_refused():
    with pytest.raises(InvalidOption, match="num_gpu_blocks_override and num_blocks are two names"):
        EngineArgs(num_gpu_blocks_override=7, num_blocks=8)


def test_other_fp8_formats_are_refused():
    with pytest.raises(InvalidOption, match="kv_cache_dtype is 'fp8_e5m2'"):
        EngineArgs(kv_cache_dtype="fp8_e5m2")


# ---- sizes in bytes ------------------------------------------------------------------------------


def test_pools_given_in_bytes_have_as_many_blocks_as_fit(folder):
    block_bytes = 16 * 2 * 2 * 2 * 12 * 4  # tokens, k and v, layers, heads, head_dim, float32
    config = LLM(folder, kv_cache_memory_bytes=10 * block_bytes - 1, swap_space=0.001).engine.config
    assert config.num_blocks == 9
    assert config.num_swap_blocks == int(0.001 * 2**30) // block_bytes
    with pytest.raises(InvalidOption, match=f"a block of keys and values takes {block_bytes}"):
        LLM(folder, kv_cache_memory_bytes=block_bytes - 1)


@pytest.mark.parametrize(
    ("given", "also"),
    [
        ("kv_cache_memory_bytes", {"num_blocks": 3}),
        ("kv_cache_memory_bytes", {"gpu_memory_utilization": 0.5}),
        ("swap_space", {"num_swap_blocks": 3}),
        ("swap_space", {"memory": "contiguous-max"}),
    ],
)
def test_a_second_size_of_one_pool_is_refused(given, also):
    with pytest.raises(InvalidOption, match=f"^{given} is 4") as error:
        EngineArgs(**{given: 4}, **also)
    assert error.value.param == given


# ---- files ---------------------------------------------------------------------------------------


def test_another_tokenizer_or_none_can_be_chosen(folder):
    own = LLM(folder, tokenizer="storyteller", **SMALL)
    assert own.get_tokenizer().encode("Theo") == LLM(**SMALL).get_tokenizer().encode("Theo")
    none = LLM("storyteller", skip_tokenizer_init=True, **SMALL)
    assert none.get_tokenizer() is None
    assert none.generate([5, 6], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    with pytest.raises(MissingTokenizer, match="skip_tokenizer_init"):
        none.generate("Theo", GREEDY, use_tqdm=False)


def test_values_of_config_json_can_be_replaced(folder):
    assert (
        LLM(folder, hf_overrides={"max_position_embeddings": 64}).engine.config.max_model_len == 64
    )
    one_layer = LLM(folder, hf_overrides={"num_hidden_layers": 1}, load_format="dummy", **SMALL)
    assert one_layer.engine.executor.runner.model.config.num_layers == 1


def test_a_replaced_value_that_is_not_read_is_refused(folder):
    message = "hf_overrides sets 'max_positions', which this architecture"
    with pytest.raises(InvalidOption, match=message):
        LLM(folder, hf_overrides={"max_positions": 64}, **SMALL)


def test_random_weights_need_only_config_json_and_are_reproducible(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    first, second = (LLM(tmp_path, load_format="dummy", **SMALL) for _ in range(2))
    parameters = dict(first.engine.executor.runner.model.named_parameters())
    assert all(p.isfinite().all() for p in parameters.values())
    assert parameters["embedding.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    tokens = [m.generate([[5, 6]], GREEDY, use_tqdm=False)[0].outputs[0] for m in (first, second)]
    assert tokens[0].token_ids == tokens[1].token_ids
    with pytest.raises(CheckpointError):
        LLM(tmp_path, **SMALL)


def test_a_revision_of_a_folder_is_refused(folder):
    assert LLM(folder, revision="main", **SMALL).folder == folder
    with pytest.raises(InvalidOption, match=r"revision is 'v2', but .* is a folder"):
        LLM(folder, revision="v2")


def test_a_revision_is_looked_up_by_its_name_and_first_in_download_dir(folder, tmp_path):
    snapshot = tmp_path / "models--me--mine" / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    (snapshot / "tokenizer.json").write_text("{}")
    found = EngineArgs("me/mine", revision="abc", download_dir=tmp_path).find_folders()
    assert found.model == found.tokenizer == snapshot
    with pytest.raises(CheckpointError, match="me/mine@def"):
        EngineArgs("me/mine", revision="def", download_dir=tmp_path).find_folders()
    revisions = {"revision": "abc", "tokenizer_revision": "def"}
    with pytest.raises(CheckpointError, match="me/mine@def"):
        EngineArgs("me/mine", download_dir=tmp_path, **revisions).find_folders()


def test_a_chat_template_is_used_in_place_of_the_checkpoints(tmp_path):
    text = "{{ messages[0]['content'] }}!"
    (tmp_path / "own.jinja").write_text(text)
    messages = [{"role": "user", "content": "Theo"}]
    for given in (text, tmp_path / "own.jinja", str(tmp_path / "own.jinja")):
        own = LLM(chat_template=given, **SMALL)
        assert own.chat(messages, GREEDY, use_tqdm=False)[0].prompt == "Theo!"
        [output] = own.chat(messages, GREEDY, use_tqdm=False, chat_template="{{ 'Ida' }}")
        assert output.prompt == "Ida"
    with pytest.raises(InvalidOption, match="chat_template is 'nowhere'"):
        EngineArgs(chat_template="nowhere")


# ---- default sampling parameters -----------------------------------------------------------------


def with_defaults(folder: Path, target: Path, values: object) -> Path:
    copy = Path(shutil.copytree(folder, target))
    (copy / "generation_config.json").write_text(json.dumps(values))
    return copy


def test_default_sampling_parameters_come_from_the_checkpoint(folder, tmp_path):
    values = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_new_tokens": 3, "do_sample": True}
    own = LLM(with_defaults(folder, tmp_path / "own", values | {"min_p": None}), **SMALL)
    expected = SamplingParams(temperature=0.5, top_p=0.9, top_k=7, max_tokens=3)
    assert own.get_default_sampling_params() == expected
    assert own.get_default_sampling_params() is not own.get_default_sampling_params()
    [output] = own.generate([[5, 6]], use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 3
    for _, streamed in own.stream([[5, 6]]):
        output = streamed
    assert len(output.outputs[0].token_ids) == 3


def test_default_sampling_parameters_may_be_ignored_or_come_from_elsewhere(folder, tmp_path, llm):
    assert llm.get_default_sampling_params() == SamplingParams()
    other = with_defaults(folder, tmp_path / "other", {"top_k": 3, "eos_token_id": [9]})
    assert LLM(other, generation_config="vllm", **SMALL).get_default_sampling_params().top_k == 0
    elsewhere = LLM(
        folder, generation_config=other, override_generation_config={"top_p": 0.5}, **SMALL
    )
    assert elsewhere.get_default_sampling_params() == SamplingParams(top_k=3, top_p=0.5)
    assert 9 in elsewhere.engine.executor.runner.model.config.eos_token_ids
    with pytest.raises(InvalidOption, match="override_generation_config sets 'beams'"):
        EngineArgs(override_generation_config={"beams": 2})


def test_default_sampling_parameters_that_cannot_work_name_their_file(folder, tmp_path):
    own = LLM(with_defaults(folder, tmp_path / "own", {"top_p": 7}), **SMALL)
    with pytest.raises(CheckpointError, match=r'top_p is 7.*generation_config="vllm"'):
        own.generate([[5, 6]], use_tqdm=False)


# ---- calls ---------------------------------------------------------------------------------------


def tokens(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_prompts_may_be_passed_as_prompt_token_ids(llm):
    expected = llm.generate([[5, 6], [7]], GREEDY, use_tqdm=False)
    run = partial(llm.generate, sampling_params=GREEDY, use_tqdm=False)
    assert tokens(run(prompt_token_ids=[[5, 6], [7]])) == tokens(expected)
    assert tokens(run(prompt_token_ids=[5, 6])) == tokens(expected[:1])
    both = run(["one", "two"], prompt_token_ids=[[5, 6], [7]])
    assert tokens(both) == tokens(expected)
    assert [output.prompt for output in both] == ["one", "two"]
    with pytest.raises(InvalidRequest, match="1 prompt came with 2 lists of token ids"):
        run(["one"], prompt_token_ids=[[5, 6], [7]])


@pytest.mark.parametrize("call", ["generate", "chat", "beam_search"])
@pytest.mark.parametrize("name", [name for names in CALLS_NOT_BUILT.values() for name in names])
def test_unsupported_arguments_of_a_call_are_refused_by_name(call, name):
    llm = LLM(**SMALL)
    message = [{"role": "user", "content": "Theo"}] if call == "chat" else "Theo"
    params = GREEDY
    if call == "beam_search":
        params = minipaged.BeamSearchParams(beam_width=2, max_tokens=2)
    run = partial(getattr(llm, call), message, params, use_tqdm=False)
    run(**{name: None})
    with pytest.raises(InvalidOption, match=f"^{name} is ") as error:
        run(**{name: object()})
    assert error.value.param == name


def test_priorities_of_zero_have_no_effect(llm):
    llm.generate([[5], [6]], GREEDY, use_tqdm=False, priority=[0, 0])
    with pytest.raises(InvalidOption, match="priority is 1"):
        llm.generate([[5], [6]], GREEDY, use_tqdm=False, priority=[0, 1])


@pytest.mark.parametrize("key", ["multi_modal_data", "mm_processor_kwargs", "prompt_embeds"])
def test_a_multimodal_prompt_is_refused_by_its_key(llm, key):
    llm.generate({"prompt_token_ids": [5], key: None}, GREEDY, use_tqdm=False)
    with pytest.raises(InvalidRequest, match=f"{key}.*read text only"):
        llm.generate({"prompt_token_ids": [5], key: {"image": 1}}, GREEDY, use_tqdm=False)


def test_use_tqdm_may_be_a_callable(llm):
    made = []

    def make(*positional, **named) -> tqdm:
        made.append(tqdm(*positional, **named, disable=True))
        return made[-1]

    llm.generate([[5], [6]], GREEDY, use_tqdm=make)
    assert [bar.total for bar in made] == [2]
    with pytest.raises(InvalidOption, match=r"use_tqdm is .* makes no tqdm bar"):
        llm.generate([[5]], GREEDY, use_tqdm=lambda *positional, **named: 3)


def test_the_prefix_cache_is_reset_unless_its_blocks_are_in_use(folder):
    llm = LLM(folder, **SMALL)
    prompt = [5 + n for n in range(40)]
    llm.generate([prompt], GREEDY, use_tqdm=False)
    assert llm.generate([prompt], GREEDY, use_tqdm=False)[0].num_cached_tokens == 32
    llm.engine.add_request("open", prompt, GREEDY)
    assert llm.reset_prefix_cache() is False
    llm.engine.abort_request("open")
    assert llm.reset_prefix_cache() is True
    assert llm.generate([prompt], GREEDY, use_tqdm=False)[0].num_cached_tokens == 0
    prefix = llm.cache_prefix(prompt)
    assert llm.reset_prefix_cache() is False
    llm.release_prefix(prefix)
    assert llm.reset_prefix_cache() is True


# ---- EngineArgs and the engine -------------------------------------------------------------------


def test_engine_args_build_the_engine_of_llm(folder, llm):
    args = EngineArgs(model=folder, tensor_parallel_size=1, **SMALL)
    engine = LLMEngine.from_engine_args(args)
    assert engine.config == llm.engine.config
    assert LLM.from_engine_args(args).engine.config == llm.engine.config
    assert LLM(**dataclasses.asdict(args)).engine.config == llm.engine.config
    assert llm.llm_engine is llm.engine
    with pytest.raises(InvalidOption, match="engine_args is 3"):
        LLMEngine.from_engine_args(3)


def test_several_requests_can_be_counted_and_aborted(folder):
    engine = LLMEngine.from_engine_args(EngineArgs(folder, **SMALL))
    for name in "abc":
        engine.add_request(name, [5, 6], GREEDY)
    assert engine.get_num_unfinished_requests() == 3
    assert engine.abort_request(["a", "unknown", "b"]) is None
    assert engine.unfinished_request_ids == {"c"}
    assert engine.abort_request("c").request_id == "c"
    assert not engine.has_unfinished_requests()
    assert engine.get_tokenizer() is None


def test_a_parser_reads_the_options_of_a_script(folder):
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("--max-tokens", type=int)
    words = f"--model {folder} --max_num_seqs=3 --enforce-eager --max_tokens 5 --num-blocks 9"
    args = parser.parse_args(words.split())
    read = EngineArgs.from_cli_args(args)
    assert read == EngineArgs(str(folder), max_num_seqs=3, enforce_eager=True, num_blocks=9)
    given = vars(args)
    assert given.pop("max_tokens") == 5
    assert LLM(**given).engine.config.num_blocks == 9


def test_options_of_vllm_are_no_flags_of_our_commands():
    from minipaged.config import OPTIONS

    assert not set(OPTIONS) & {*OTHER_NAMES, *IGNORED, *REFUSED, "tokenizer", "hf_overrides"}


# ---- modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "home"),
    [
        ("from minipaged import EngineArgs, PromptType, TextPrompt, TokensPrompt", None),
        ("from minipaged.sampling_params import SamplingParams", SamplingParams),
        ("from minipaged.sampling_params import BeamSearchParams", minipaged.BeamSearchParams),
        ("from minipaged.sampling_params import RequestOutputKind", RequestOutputKind),
        ("from minipaged.logprobs import Logprob", Logprob),
        ("from minipaged.outputs import CompletionOutput", minipaged.CompletionOutput),
        ("from minipaged.outputs import RequestOutput", minipaged.RequestOutput),
        ("from minipaged.inputs import TokensPrompt", minipaged.TokensPrompt),
        ("from minipaged.engine.arg_utils import EngineArgs", EngineArgs),
        ("from minipaged.engine.llm_engine import LLMEngine", LLMEngine),
        ("from minipaged.entrypoints.llm import LLM", LLM),
        ("from minipaged.utils.argparse_utils import FlexibleArgumentParser", None),
    ],
)
def test_vllm_imports_work_with_the_name_replaced(line, home):
    names: dict[str, object] = {}
    exec(line, names)
    if home is not None:
        assert names[line.split()[-1]] is home


def test_a_mirrored_module_of_vllm_has_only_our_names():
    import minipaged.entrypoints.llm

    assert minipaged.entrypoints.llm.LLM is LLM
    with pytest.raises(ImportError, match="LoRARequest"):
        exec("from minipaged.inputs import LoRARequest")
    with pytest.raises(ImportError):
        exec("import minipaged.lora")
