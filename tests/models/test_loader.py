"""From a folder to a model: checkpoints that are whole, old, foreign or broken in every way."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES as MADE
from checkpoints import LINEAR_SCALING, LLAMA3_SCALING, VOCAB_SIZE, make_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from minipaged.attention.backend import BACKENDS
from minipaged.errors import CheckpointError, InvalidOption, UnsupportedModel
from minipaged.evaluation.bench.load import load_in_new_process
from minipaged.models import loader
from minipaged.models import safetensors_reader as weight_files
from minipaged.models.llama import LlamaConfig
from minipaged.models.loader import (
    FAMILIES,
    check_checkpoint,
    choose_dtype,
    load_model,
    read_model_config,
)


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def llama(saved_llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved_llama, tmp_path / "llama"))


# -------------------------------------------------------------------------------- configurations


def llama_config(**options: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 128,
    } | options


def gpt2_config(**options: Any) -> dict[str, Any]:
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": VOCAB_SIZE}
    return {"architectures": ["GPT2LMHeadModel"]} | sizes | options


def opt_config(**options: Any) -> dict[str, Any]:
    return llama_config() | {"architectures": ["OPTForCausalLM"], "ffn_dim": 64} | options


def folder_with(tmp_path: Path, config: dict[str, Any]) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("family", MADE)
def test_the_config_is_read_without_the_weights(family: str, tmp_path: Path) -> None:
    (make_checkpoint(family, tmp_path) / "model.safetensors").unlink()
    config = read_model_config(tmp_path)
    assert (config.num_layers, config.hidden_size, config.num_heads) == (2, 48, 4)
    assert (config.vocab_size, config.max_position_embeddings) == (VOCAB_SIZE, 128)
    assert config.eos_token_ids == (2,)


def test_kv_heads_and_their_size_are_derived_when_old_files_leave_them_out() -> None:
    config = LlamaConfig.from_hf(llama_config(head_dim=None))
    assert (config.num_kv_heads, config.head_dim) == (4, 12)


# The fields of published checkpoints' config.json that matter, or might be thought to matter.
_GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "eos_token_id": 50256,
    "layer_norm_epsilon": 1e-05,
    "n_ctx": 1024,
    "n_positions": 1024,
    "summary_type": "cls_index",
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
_OPT = {
    "architectures": ["OPTForCausalLM"],
    "_remove_final_layer_norm": False,
    "activation_function": "relu",
    "attention_dropout": 0.0,
    "do_layer_norm_before": True,
    "eos_token_id": 2,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "torch_dtype": "float16",
    "vocab_size": 50272,
}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}
_SMOL = _LLAMA | {
    "eos_token_id": 0,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
_LLAMA_3_2 = _LLAMA | {
    "eos_token_id": 128001,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
_QWEN2_5 = {
    "architectures": ["Qwen2ForCausalLM"],
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_MISTRAL = _LLAMA | {
    "architectures": ["MistralForCausalLM"],
    "eos_token_id": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def _gpt2(layers: int, heads: int, hidden: int) -> dict[str, Any]:
    return _GPT2 | {"n_layer": layers, "n_head": heads, "n_embd": hidden}


def _opt(layers: int, heads: int, hidden: int, **options: Any) -> dict[str, Any]:
    sizes = _sizes(layers, heads, None, hidden) | {"word_embed_proj_dim": hidden}
    return _OPT | sizes | {"ffn_dim": 4 * hidden} | options


def _sizes(
    layers: int, heads: int, kv_heads: int | None, hidden: int, inner: int | None = None
) -> dict[str, Any]:
    named = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "intermediate_size": inner,
    }
    return {name: number for name, number in named.items() if number is not None}


# The config; layers, heads, kv heads, head_dim, vocabulary, context, tied, eos; all parameters.
PUBLISHED: dict[str, tuple[dict[str, Any], tuple[Any, ...], int]] = {
    "distilgpt2": (_gpt2(6, 12, 768), (6, 12, 12, 64, 50257, 1024, True, 50256), 81_912_576),
    "gpt2": (_gpt2(12, 12, 768), (12, 12, 12, 64, 50257, 1024, True, 50256), 124_439_808),
    "gpt2-medium": (_gpt2(24, 16, 1024), (24, 16, 16, 64, 50257, 1024, True, 50256), 354_823_168),
    "gpt2-large": (_gpt2(36, 20, 1280), (36, 20, 20, 64, 50257, 1024, True, 50256), 774_030_080),
    "gpt2-xl": (_gpt2(48, 25, 1600), (48, 25, 25, 64, 50257, 1024, True, 50256), 1_557_611_200),
    "opt-125m": (_opt(12, 12, 768), (12, 12, 12, 64, 50272, 2048, True, 2), 125_239_296),
    "opt-350m": (
        _opt(24, 16, 1024, word_embed_proj_dim=512, do_layer_norm_before=False),
        (24, 16, 16, 64, 50272, 2048, True, 2),
        331_196_416,
    ),
    "opt-1.3b": (_opt(24, 32, 2048), (24, 32, 32, 64, 50272, 2048, True, 2), 1_315_758_080),
    "opt-2.7b": (_opt(32, 32, 2560), (32, 32, 32, 80, 50272, 2048, True, 2), 2_651_596_800),
    "opt-6.7b": (_opt(32, 32, 4096), (32, 32, 32, 128, 50272, 2048, True, 2), 6_658_473_984),
    "SmolLM-135M": (
        _SMOL | _sizes(30, 9, 3, 576, 1536) | {"max_position_embeddings": 2048},
        (30, 9, 3, 64, 49152, 2048, True, 0),
        134_515_008,
    ),
    "SmolLM2-135M": (
        _SMOL | _sizes(30, 9, 3, 576, 1536),
        (30, 9, 3, 64, 49152, 8192, True, 0),
        134_515_008,
    ),
    "SmolLM2-360M": (
        _SMOL | _sizes(32, 15, 5, 960, 2560),
        (32, 15, 5, 64, 49152, 8192, True, 0),
        361_821_120,
    ),
    "SmolLM2-1.7B": (
        _SMOL | _sizes(24, 32, 32, 2048, 8192),
        (24, 32, 32, 64, 49152, 8192, True, 0),
        1_711_376_384,
    ),
    "TinyLlama-1.1B": (
        _LLAMA
        | _sizes(22, 32, 4, 2048, 5632)
        | {"max_position_embeddings": 2048, "vocab_size": 32000, "eos_token_id": 2},
        (22, 32, 4, 64, 32000, 2048, False, 2),
        1_100_048_384,
    ),
    "Llama-3.2-1B": (
        _LLAMA_3_2 | _sizes(16, 32, 8, 2048) | {"head_dim": 64},
        (16, 32, 8, 64, 128256, 131072, True, 128001),
        1_235_814_400,
    ),
    "Llama-3.2-3B": (
        _LLAMA_3_2 | _sizes(28, 24, 8, 3072) | {"head_dim": 128},
        (28, 24, 8, 128, 128256, 131072, True, 128001),
        3_212_749_824,
    ),
    "Qwen2.5-0.5B": (
        _QWEN2_5 | _sizes(24, 14, 2, 896, 4864),
        (24, 14, 2, 64, 151936, 32768, True, 151643),
        494_032_768,
    ),
    "Qwen2.5-1.5B": (
        _QWEN2_5 | _sizes(28, 12, 2, 1536, 8960) | {"max_position_embeddings": 131072},
        (28, 12, 2, 128, 151936, 131072, True, 151643),
        1_543_714_304,
    ),
    "Qwen2.5-3B": (
        _QWEN2_5 | _sizes(36, 16, 2, 2048, 11008),
        (36, 16, 2, 128, 151936, 32768, True, 151643),
        3_085_938_688,
    ),
    "Qwen2.5-7B": (
        _QWEN2_5
        | _sizes(28, 28, 4, 3584, 18944)
        | {"vocab_size": 152064, "tie_word_embeddings": False, "max_position_embeddings": 131072},
        (28, 28, 4, 128, 152064, 131072, False, 151643),
        7_615_616_512,
    ),
    "Qwen3-0.6B": (
        _QWEN3 | _sizes(28, 16, 8, 1024, 3072),
        (28, 16, 8, 128, 151936, 40960, True, 151645),
        596_049_920,
    ),
    "Qwen3-1.7B": (
        _QWEN3 | _sizes(28, 16, 8, 2048, 6144),
        (28, 16, 8, 128, 151936, 40960, True, 151645),
        1_720_574_976,
    ),
    "Qwen3-4B": (
        _QWEN3 | _sizes(36, 32, 8, 2560, 9728),
        (36, 32, 8, 128, 151936, 40960, True, 151645),
        4_022_468_096,
    ),
    "Qwen3-8B": (
        _QWEN3 | _sizes(36, 32, 8, 4096, 12288) | {"tie_word_embeddings": False},
        (36, 32, 8, 128, 151936, 40960, False, 151645),
        8_190_735_360,
    ),
    "Mistral-7B-v0.1": (
        _MISTRAL | _sizes(32, 32, 8, 4096, 14336) | {"sliding_window": 4096},
        (32, 32, 8, 128, 32000, 4096, False, 2),
        7_241_732_096,
    ),
    "Mistral-7B-v0.2": (
        _MISTRAL | _sizes(32, 32, 8, 4096, 14336),
        (32, 32, 8, 128, 32000, 32768, False, 2),
        7_241_732_096,
    ),
    "Mistral-7B-v0.3": (
        _MISTRAL | _sizes(32, 32, 8, 4096, 14336) | {"vocab_size": 32768, "head_dim": None},
        (32, 32, 8, 128, 32768, 32768, False, 2),
        7_248_023_552,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_model_its_published_size(name: str, tmp_path: Path) -> None:
    hf, expected, num_parameters = PUBLISHED[name]
    config: Any = read_model_config(folder_with(tmp_path, hf))
    numbers = config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim
    numbers += config.vocab_size, config.max_position_embeddings
    assert (*numbers, config.tied, *config.eos_token_ids) == expected
    with torch.device("meta"):
        assert torch.empty(0).is_meta
        model = FAMILIES[config.architecture].build(config, BACKENDS["reference"])
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == num_parameters


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {"rope_type": "default"}),
        ({"rope_scaling": None}, {}),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, LINEAR_SCALING),
        ({"rope_scaling": LLAMA3_SCALING}, LLAMA3_SCALING),
    ],
)
def test_rope_of_old_checkpoints_is_read_as_that_of_new_ones(
    old: dict[str, Any], new: dict[str, Any]
) -> None:
    from_old = LlamaConfig.from_hf(llama_config(rope_theta=500.0, **old)).rope
    in_one_place = {"rope_parameters": {"rope_theta": 500.0} | new}
    assert from_old == LlamaConfig.from_hf(llama_config(**in_one_place)).rope
    assert from_old.theta == 500.0


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [(2, None, (2,)), (None, 7, (7,)), ([2, 5], [5, 9], (2, 5, 9)), (None, None, ())],
)
def test_an_end_token_in_either_config_file_ends_a_sequence(
    in_config: Any, in_generation: Any, expected: tuple[int, ...], tmp_path: Path
) -> None:
    folder = folder_with(tmp_path, llama_config(eos_token_id=in_config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": in_generation}))
    assert read_model_config(folder).eos_token_ids == expected


UNSUPPORTED = {
    "another architecture": (
        llama_config(architectures=["MambaForCausalLM"]),
        "MambaForCausalLM, but only LlamaForCausalLM, Mistral.*OPTForCausalLM are supported",
    ),
    "quantised": (llama_config(quantization_config={"quant_method": "gptq"}), "quantised weights"),
    "rope longrope": (
        llama_config(rope_scaling={"type": "longrope", "factor": 2.0}),
        "RoPE as 'longrope', but only default, linear, dynamic, yarn, llama3 are supported",
    ),
    "partial rope": (llama_config(partial_rotary_factor=0.5), "rotates 0.5 of each head"),
    "activation": (llama_config(hidden_act="relu6"), "the activation 'relu6', but only relu, silu"),
    "layers of another kind": (
        llama_config(layer_types=["full_attention", "chunked_attention"]),
        "a layer with 'chunked_attention', but only full_attention, and sliding_attention up to",
    ),
    "gpt2, unscaled": (gpt2_config(scale_attn_weights=False), "sets scale_attn_weights to False"),
    "gpt2, scaled by layer": (
        gpt2_config(scale_attn_by_inverse_layer_idx=True),
        "sets scale_attn_by_inverse_layer_idx to True, but only False is supported",
    ),
    "gpt2, upcast": (gpt2_config(reorder_and_upcast_attn=True), "reorder_and_upcast_attn"),
    "gpt2, cross attention": (gpt2_config(add_cross_attention=True), "add_cross_attention"),
    "opt without its last norm": (
        opt_config(_remove_final_layer_norm=True),
        "_remove_final_layer_norm",
    ),
    "galactica, no biases": (opt_config(enable_bias=False), "enable_bias"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_an_unsupported_architecture_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    config, sentence = UNSUPPORTED[case]
    with pytest.raises(UnsupportedModel, match=sentence) as refused:
        load_model(folder_with(tmp_path, config), BACKENDS["reference"])
    assert_one_sentence(refused)


# Fields about windows in a config.json of 2 layers and context 128; the context read from it.
WINDOWS: dict[str, tuple[str, dict[str, Any], int]] = {
    "mistral v0.1": ("Mistral", {"sliding_window": 32}, 32),
    "mistral v0.2": ("Mistral", {"sliding_window": None}, 128),
    "mistral, as wide as the context": ("Mistral", {"sliding_window": 128}, 128),
    "mistral, wider": ("Mistral", {"sliding_window": 4096}, 128),
    "qwen2, named and unused": ("Qwen2", {"sliding_window": 32, "use_sliding_window": False}, 128),
    "qwen2, unsaid whether used": ("Qwen2", {"sliding_window": 32}, 128),
    "qwen2, used by no layer": (
        "Qwen2",
        {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2},
        128,
    ),
    "qwen2, used by the last layer": (
        "Qwen2",
        {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1},
        32,
    ),
    "qwen2, used by all layers": (
        "Qwen2",
        {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0},
        32,
    ),
    "qwen3, unused by every layer": (
        "Qwen3",
        {"sliding_window": 32, "layer_types": ["full_attention"] * 2},
        128,
    ),
    "qwen3, used by one layer": (
        "Qwen3",
        {"sliding_window": 32, "layer_types": ["full_attention", "sliding_attention"]},
        32,
    ),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_the_context_ends_where_a_sliding_window_would_begin_to_hide_tokens(case: str) -> None:
    family, options, context = WINDOWS[case]
    hf = llama_config(architectures=[f"{family}ForCausalLM"], **options)
    assert LlamaConfig.from_hf(hf).max_position_embeddings == context


BROKEN_CONFIGS = {
    "no architecture": (llama_config(architectures=None), "names no architecture"),
    "no hidden size": (llama_config(hidden_size=None), "has no hidden_size"),
    "text for a number": (llama_config(vocab_size="many"), "vocab_size as 'many'"),
    "no layers": (llama_config(num_hidden_layers=0), "num_hidden_layers as 0"),
    "uneven heads": (llama_config(num_attention_heads=5), "hidden size of 48 and 5 heads"),
    "uneven groups": (llama_config(num_key_value_heads=3), "4 query heads and 3 KV heads"),
    "a window without its width": (
        llama_config(layer_types=["sliding_attention"] * 2),
        "has no sliding_window",
    ),
    "no number": (llama_config(rms_norm_eps="x"), "rms_norm_eps as 'x'"),
    "not above 0": (llama_config(rms_norm_eps=0), "rms_norm_eps as 0"),
    "rope turned by no number": (llama_config(rope_theta="a"), "rope_theta as 'a'"),
    "rope with factor 0": (
        llama_config(rope_scaling={"type": "linear", "factor": 0}),
        "factor as 0",
    ),
    "rope without numbers": (
        llama_config(rope_scaling={**LLAMA3_SCALING, "factor": None}),
        "RoPE as 'llama3' but gives no 'factor'",
    ),
    "rope as text": (llama_config(rope_parameters="x"), "gives rope_parameters as 'x'"),
    "layers of no kind": (llama_config(layer_types=5), "is not a valid config.json"),
    "an end that is text": (llama_config(eos_token_id="x"), "eos_token_id as 'x'"),
    "ends in a list in a list": (llama_config(eos_token_id=[[1]]), r"eos_token_id as \[\[1\]\]"),
    "an end that is an object": (llama_config(eos_token_id={}), "eos_token_id as {}"),
    "too large a vocabulary": (llama_config(vocab_size=10**20), "vocab_size as 10000"),
    "rope without its factor": (
        llama_config(rope_scaling={"type": "linear"}),
        "RoPE as 'linear' but gives no 'factor'",
    ),
}


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_an_impossible_config_is_refused_with_the_wrong_number(case: str, tmp_path: Path) -> None:
    config, sentence = BROKEN_CONFIGS[case]
    with pytest.raises(CheckpointError, match=sentence) as refused:
        read_model_config(folder_with(tmp_path, config))
    assert_one_sentence(refused)
    assert refused.type is CheckpointError


def assert_one_sentence(refused: pytest.ExceptionInfo[CheckpointError]) -> None:
    message = str(refused.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert ": " in message, "an error says what is wrong, a colon, and what to change"


# ------------------------------------------------------------------------------------- the files


def weights(folder: Path, **options: Any) -> dict[str, Tensor]:
    return load_model(folder, BACKENDS["reference"], **options).state_dict(keep_vars=True)


def assert_equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        assert torch.equal(tensor, others[name]), name


def test_shards_load_as_one_file_does(llama: Path, tmp_path: Path) -> None:
    sharded = make_checkpoint("llama", tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert not (sharded / "model.safetensors").exists()
    assert_equal(weights(sharded), weights(llama))


@pytest.mark.parametrize("saved", [torch.float32, torch.float16, torch.bfloat16])
def test_auto_is_float32_on_a_cpu_and_another_dtype_is_honoured(
    saved: torch.dtype, tmp_path: Path
) -> None:
    folder = make_checkpoint("llama", tmp_path, dtype=saved)

    def dtypes(asked: torch.dtype | str) -> set[torch.dtype]:
        return {parameter.dtype for parameter in weights(folder, dtype=asked).values()}

    assert dtypes("auto") == {torch.float32}
    assert dtypes("bfloat16") == {torch.bfloat16}
    assert dtypes(torch.float16) == {torch.float16}
    with pytest.raises(InvalidOption, match="dtype is 'int4': choose one of auto, float32"):
        dtypes("int4")


def test_on_an_accelerator_auto_is_the_dtype_of_the_checkpoint() -> None:
    assert choose_dtype("auto", torch.bfloat16, "cuda") == torch.bfloat16
    assert choose_dtype("float32", torch.bfloat16, "cuda:1") == torch.float32


def test_a_loaded_model_owns_its_memory_and_all_of_it_is_filled(llama: Path) -> None:
    loaded = weights(llama)
    before = {name: parameter.clone() for name, parameter in loaded.items()}
    file = llama / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert_equal(loaded, before)
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in loaded.values())


@pytest.mark.parametrize(
    ("family", "prefix", "extra"),
    [
        ("gpt2", "transformer.", ["h.1.attn.bias", "h.0.attn.masked_bias"]),
        ("llama", "model.", ["layers.1.self_attn.rotary_emb.inv_freq"]),
        ("opt", "model.", []),
    ],
)
def test_names_without_prefix_and_known_leftovers_are_accepted(
    family: str, prefix: str, extra: list[str], tmp_path: Path
) -> None:
    folder = make_checkpoint(family, tmp_path, tie_word_embeddings=True)
    original = weights(folder)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert bare.keys().isdisjoint(tensors.keys())
    save_file(bare | {name: torch.zeros(3) for name in extra}, folder / "model.safetensors")
    assert_equal(weights(folder), original)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.layers.0.self_attn.rotary_emb.sin_cached",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "rotary_emb.inv_freq",
        "model.layers.0.attn.bias",
        "model.layers.0.attn.masked_bias",
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_buffers_that_follow_from_the_config_are_ignored(
    family: str, name: str, tmp_path: Path
) -> None:
    folder = make_checkpoint(family, tmp_path)
    original = weights(folder)
    edit_tensors(folder, {name: torch.zeros(3)})
    assert_equal(weights(folder), original)


def refusal(folder: Path) -> str:
    """Why the folder is not loaded; to check it says the same."""
    with pytest.raises(CheckpointError) as refused:
        load_model(folder, BACKENDS["reference"])
    assert_one_sentence(refused)
    with pytest.raises(CheckpointError) as checked:
        check_checkpoint(folder)
    assert str(checked.value) == str(refused.value)
    return str(refused.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert f"there is no folder {tmp_path / 'gone'}" in refusal(tmp_path / "gone")


def test_a_missing_config_is_named(llama: Path) -> None:
    (llama / "config.json").unlink()
    assert f"{llama} contains no config.json" in refusal(llama)


@pytest.mark.parametrize("text", ["", "{", "\x80\x04", "[1]"])
def test_a_config_that_is_not_json_is_named(text: str, llama: Path) -> None:
    (llama / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json is " in refusal(llama)


def test_missing_weights_are_named(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    assert "contains neither model.safetensors nor model.safetensors.index.json" in refusal(llama)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    assert "as pytorch_model.bin only" in refusal(llama)
    assert "convert it to safetensors" in refusal(llama)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path, max_shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    message = refusal(folder)
    assert f"lacks 1 of the {len(shards)} shards" in message
    assert shards[1].name in message


def test_an_index_without_its_map_is_named(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refusal(llama)


@pytest.mark.parametrize("kept_bytes", [0, 5, 200, 20_000])
def test_a_file_cut_short_is_named_with_its_size(kept_bytes: int, llama: Path) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    assert f"{file} of {kept_bytes} bytes is cut short or not a safetensors file" in refusal(llama)


HEADERS = {
    "no JSON": b"{",
    "no object": b"[]",
    "no description": b'{"a": 3}',
    "no offsets": b'{"a": {"dtype": "F32", "shape": [1]}}',
    "no numbers": b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
    "fewer bytes than numbers": b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    "bytes within the header": b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]}}',
    "bytes after the end": b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    "fewer bytes than the file": b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
    "no tensors": b"{}",
}


@pytest.mark.parametrize("case", HEADERS)
def test_an_invalid_header_is_refused(case: str, llama: Path) -> None:
    header = HEADERS[case]
    file = llama / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "is cut short or not a safetensors file" in refusal(llama)


def test_a_file_that_shrinks_while_it_is_read_is_refused(llama: Path) -> None:
    file = llama / "model.safetensors"
    tensors = weight_files.read_headers([file], "").values()
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match=r"cut short .*it ends within") as refused:
        weight_files.copy_tensors((tensor, torch.empty(tensor.shape)) for tensor in tensors)
    assert_one_sentence(refused)
    file.unlink()
    with pytest.raises(CheckpointError, match="of 0 bytes is cut short"):
        weight_files.copy_tensors((tensor, torch.empty(tensor.shape)) for tensor in tensors)


def edit_tensors(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Put other tensors into the file; None takes one out."""
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


def test_missing_tensors_are_counted_and_the_first_is_named(llama: Path) -> None:
    edit_tensors(llama, {"model.layers.1.mlp.up_proj.weight": None, "model.norm.weight": None})
    message = refusal(llama)
    assert "lacks 2 of the 21 tensors" in message
    assert "first 'layers.1.mlp.up_proj.weight'" in message


def test_a_checkpoint_is_checked_without_reading_its_tensors(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "copy_tensors", None)
    assert check_checkpoint(llama) == read_model_config(llama)
    with pytest.raises(TypeError):
        load_model(llama, BACKENDS["reference"])


def test_an_untied_model_without_its_head_is_refused(llama: Path) -> None:
    edit_tensors(llama, {"lm_head.weight": None})
    assert "first 'lm_head.weight'" in refusal(llama)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",  # a bias that config.json does not mention
        "model.layers.2.mlp.up_proj.weight",  # a layer too many
        "model.layers.0.block_sparse_moe.gate.weight",  # another architecture
        "model.layers.0.self_attn.bias",  # ends like GPT-2's mask, and is none
    ],
)
def test_an_unexpected_tensor_is_named(name: str, llama: Path) -> None:
    edit_tensors(llama, {name: torch.zeros(48)})
    message = refusal(llama)
    assert "contains 1 tensor that" in message
    assert name.removeprefix("model.") in message


def test_a_tensor_of_a_wrong_shape_is_named_with_both_shapes(llama: Path) -> None:
    edit_tensors(llama, {"model.layers.0.self_attn.k_proj.weight": torch.zeros(48, 48)})
    assert "k_proj.weight' has shape [48, 48], but config.json requires [24, 48]" in refusal(llama)


def test_a_transposed_tensor_of_a_wrong_shape_is_described_as_stored(tmp_path: Path) -> None:
    folder = make_checkpoint("gpt2", tmp_path)
    edit_tensors(folder, {"transformer.h.0.attn.c_attn.weight": torch.zeros(144, 48)})
    expected = "c_attn.weight' has shape [144, 48], but config.json requires [48, 144]"
    assert expected in refusal(folder)


def test_a_tensor_stored_as_integers_is_refused(llama: Path) -> None:
    edit_tensors(llama, {"model.norm.weight": torch.zeros(48, dtype=torch.int8)})
    with pytest.raises(UnsupportedModel, match=r"'model.norm.weight' is stored as I8") as refused:
        load_model(llama, BACKENDS["reference"])
    assert_one_sentence(refused)


# ------------------------------------------------------------------------------------ the memory


@pytest.mark.parametrize("piece_bytes", [1, 1000, 2**30])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_size_of_the_pieces_that_are_read_changes_nothing(
    family: str, piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(family, tmp_path, dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    monkeypatch.setattr(weight_files, "PIECE_BYTES", piece_bytes)
    model = load_model(folder, BACKENDS["reference"])
    filled = 0
    for placement in FAMILIES[model.config.architecture].weights.placements(model):
        [stored] = [
            tensor.float()
            for name, tensor in tensors.items()
            if placement.tensor in (name, name.split(".", 1)[1])
        ]
        assert torch.equal(placement.place_in(model), stored)
        filled += stored.numel()
    assert filled == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_loading_takes_little_more_memory_than_the_weights(
    saved: torch.dtype, tmp_path: Path
) -> None:
    # As in GPT-2 small, the embedding is 31 % of the weights, and most matrices are transposed.
    options = {"n_embd": 512, "n_layer": 6, "n_head": 8, "vocab_size": 16600}
    make_checkpoint("gpt2", tmp_path, dtype=saved, **options)
    figures = load_in_new_process(tmp_path, "float32")
    assert figures["weight_bytes"] > 100e6
    assert figures["weight_bytes"] < figures["peak_bytes"] < 1.3 * figures["weight_bytes"]


@pytest.mark.parametrize(
    ("dtype", "memory", "advice"),
    [
        ("float32", 90, 'choose dtype="bfloat16", which takes half of that, or a smaller model.'),
        ("float32", 80, "choose a smaller model."),
        ("bfloat16", 80, "choose a smaller model."),
    ],
)
def test_weights_larger_than_the_memory_are_refused_before_allocating(
    dtype: str, memory: int, advice: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "GIB", 1024)  # a small model, but large in this unit
    monkeypatch.setattr(loader, "physical_memory", lambda: memory * 1024)
    monkeypatch.setattr(loader, "copy_tensors", None)
    takes = {"float32": "164.8", "bfloat16": "82.4"}[dtype]
    with pytest.raises(InvalidOption) as refused:
        load_model(llama, BACKENDS["reference"], dtype)
    assert str(refused.value) == (
        f"the weights take {takes} GiB in {dtype}, but the memory of this machine is {memory}.0 "
        f"GiB: {advice}"
    )


def test_memory_cached_by_torch_counts_as_free_on_a_gpu(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "GIB", 1024)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (60 * 1024, 999 * 1024))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: 50 * 1024)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda gpu: 20 * 1024)
    with pytest.raises(InvalidOption) as refused:
        load_model(llama, BACKENDS["reference"], device="cuda:1")
    assert str(refused.value) == (
        "the weights take 164.8 GiB in float32, but the free memory of cuda:1 is 90.0 GiB: choose "
        'dtype="bfloat16", which takes half of that, or a smaller model.'
    )


def test_a_second_copy_of_the_embedding_is_ignored_and_another_head_is_refused(
    tmp_path: Path,
) -> None:
    for family in ("llama", "gpt2"):
        folder = make_checkpoint(family, tmp_path / family, tie_word_embeddings=True)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        name = "model.embed_tokens.weight" if family == "llama" else "transformer.wte.weight"
        before = weights(folder)
        save_file({**tensors, "lm_head.weight": tensors[name].clone()}, file, {"format": "pt"})
        assert_equal(weights(folder), before)
        another = tensors[name].clone()
        another[-1, -1] += 1.0
        save_file({**tensors, "lm_head.weight": another}, file, {"format": "pt"})
        assert "differs from it: set tie_word_embeddings to false" in refusal(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
        assert torch.equal(weights(folder)["head.weight"], another)


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint("gpt2", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["wte.weight"] = tensors["transformer.wte.weight"] + 1.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "'wte.weight'" in refusal(folder)
