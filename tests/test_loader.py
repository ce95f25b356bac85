"""From a folder to a model: checkpoints that are whole, old, foreign or broken in every way."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, LINEAR_SCALING, LLAMA3_SCALING, VOCAB_SIZE, make_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from minipaged.attention import BACKENDS
from minipaged.errors import CheckpointError, InvalidOption, UnsupportedModel
from minipaged.models.llama import LlamaConfig
from minipaged.models.loader import choose_dtype, load_model, read_model_config


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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_is_read_without_the_weights(family: str, tmp_path: Path) -> None:
    (make_checkpoint(family, tmp_path) / "model.safetensors").unlink()
    config = read_model_config(tmp_path)
    assert (config.num_layers, config.hidden_size, config.num_heads) == (2, 48, 4)
    assert (config.vocab_size, config.max_position_embeddings) == (VOCAB_SIZE, 128)
    assert config.eos_token_ids == (2,)


def test_kv_heads_and_their_size_are_derived_when_old_files_leave_them_out() -> None:
    config = LlamaConfig.from_hf(llama_config(head_dim=None))
    assert (config.num_kv_heads, config.head_dim) == (4, 12)


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
def test_any_token_that_either_file_names_ends_a_sequence(
    in_config: Any, in_generation: Any, expected: tuple[int, ...], tmp_path: Path
) -> None:
    folder = folder_with(tmp_path, llama_config(eos_token_id=in_config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": in_generation}))
    assert read_model_config(folder).eos_token_ids == expected


UNSUPPORTED = {
    "another architecture": (
        llama_config(architectures=["MambaForCausalLM"]),
        "MambaForCausalLM, and only LlamaForCausalLM, Mistral.*OPTForCausalLM are built",
    ),
    "quantised": (llama_config(quantization_config={"quant_method": "gptq"}), "quantised weights"),
    "rope yarn": (
        llama_config(rope_scaling={"type": "yarn", "factor": 2.0}),
        "RoPE as 'yarn', and only default, linear and llama3",
    ),
    "rope dynamic": (
        llama_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        "RoPE as 'dynamic'",
    ),
    "partial rope": (llama_config(partial_rotary_factor=0.5), "rotates 0.5 of each head"),
    "activation": (llama_config(hidden_act="relu6"), "the activation 'relu6', and only relu, silu"),
    "mistral, short window": (
        llama_config(architectures=["MistralForCausalLM"], sliding_window=32),
        "the last 32 of 128 tokens.*lower max_position_embeddings to 32",
    ),
    "qwen2, window in use": (
        llama_config(
            architectures=["Qwen2ForCausalLM"], sliding_window=32, use_sliding_window=True
        ),
        "the last 32 of 128 tokens",
    ),
    "gpt2, unscaled": (gpt2_config(scale_attn_weights=False), "sets scale_attn_weights to False"),
    "gpt2, scaled by layer": (
        gpt2_config(scale_attn_by_inverse_layer_idx=True),
        "sets scale_attn_by_inverse_layer_idx to True, and only False is built",
    ),
    "gpt2, upcast": (gpt2_config(reorder_and_upcast_attn=True), "reorder_and_upcast_attn"),
    "gpt2, cross attention": (gpt2_config(add_cross_attention=True), "add_cross_attention"),
    "opt-350m, norms behind": (opt_config(do_layer_norm_before=False), "do_layer_norm_before"),
    "opt-350m, narrow embedding": (
        opt_config(word_embed_proj_dim=24),
        "sets word_embed_proj_dim to 24, and only 48 is built",
    ),
    "galactica, no biases": (opt_config(enable_bias=False), "enable_bias"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_model_that_is_not_built_here_is_refused_in_one_sentence(
    case: str, tmp_path: Path
) -> None:
    config, sentence = UNSUPPORTED[case]
    with pytest.raises(UnsupportedModel, match=sentence) as refused:
        load_model(folder_with(tmp_path, config), BACKENDS["reference"])
    assert_one_sentence(refused)


@pytest.mark.parametrize(
    "harmless",
    [
        {"architectures": ["MistralForCausalLM"], "sliding_window": 128},
        {"architectures": ["MistralForCausalLM"], "sliding_window": None},
        {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32, "use_sliding_window": False},
    ],
)
def test_a_sliding_window_that_hides_nothing_is_accepted(harmless: dict[str, Any]) -> None:
    assert LlamaConfig.from_hf(llama_config(**harmless)).num_layers == 2


BROKEN_CONFIGS = {
    "no architecture": (llama_config(architectures=None), "names no architecture"),
    "no hidden size": (llama_config(hidden_size=None), "has no hidden_size"),
    "text for a number": (llama_config(vocab_size="many"), "vocab_size as 'many'"),
    "no layers": (llama_config(num_hidden_layers=0), "num_hidden_layers as 0"),
    "uneven heads": (llama_config(num_attention_heads=5), "48 among 5 heads"),
    "uneven groups": (llama_config(num_key_value_heads=3), "3 kv heads among 4 heads"),
    "rope without its factor": (
        llama_config(rope_scaling={"type": "linear"}),
        "RoPE as 'linear' but gives no 'factor'",
    ),
}


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_a_config_that_cannot_be_says_which_number(case: str, tmp_path: Path) -> None:
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
def test_on_a_cpu_auto_is_float32_and_a_dtype_asked_for_is_given(
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
        ("gpt2", "transformer.", ["h.1.attn.bias", "h.0.attn.masked_bias", "lm_head.weight"]),
        ("llama", "model.", ["layers.1.self_attn.rotary_emb.inv_freq", "lm_head.weight"]),
        ("opt", "model.", ["lm_head.weight"]),
    ],
)
def test_names_without_their_prefix_and_known_leftovers_are_understood(
    family: str, prefix: str, extra: list[str], tmp_path: Path
) -> None:
    folder = make_checkpoint(family, tmp_path, tie_word_embeddings=True)
    original = weights(folder)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert bare.keys().isdisjoint(tensors.keys())
    save_file(bare | {name: torch.zeros(3) for name in extra}, folder / "model.safetensors")
    assert_equal(weights(folder), original)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        load_model(folder, BACKENDS["reference"])
    assert_one_sentence(refused)
    return str(refused.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert f"there is no folder {tmp_path / 'gone'}" in refusal(tmp_path / "gone")


def test_a_missing_config_is_named(llama: Path) -> None:
    (llama / "config.json").unlink()
    assert f"{llama} holds no config.json" in refusal(llama)


@pytest.mark.parametrize("text", ["", "{", "\x80\x04", "[1]"])
def test_a_config_that_is_not_json_is_named(text: str, llama: Path) -> None:
    (llama / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json is " in refusal(llama)


def test_missing_weights_are_named(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refusal(llama)


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
    assert f"{file} of {kept_bytes} bytes is cut short or no safetensors file" in refusal(llama)


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


def test_an_untied_model_without_its_head_is_refused(llama: Path) -> None:
    edit_tensors(llama, {"lm_head.weight": None})
    assert "first 'lm_head.weight'" in refusal(llama)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",  # a bias that config.json does not speak of
        "model.layers.2.mlp.up_proj.weight",  # a layer too many
        "model.layers.0.block_sparse_moe.gate.weight",  # another architecture
    ],
)
def test_a_tensor_without_a_place_is_named(name: str, llama: Path) -> None:
    edit_tensors(llama, {name: torch.zeros(48)})
    message = refusal(llama)
    assert "holds 1 tensors that have no place" in message
    assert name.removeprefix("model.") in message


def test_a_misshapen_tensor_is_named_with_both_shapes(llama: Path) -> None:
    edit_tensors(llama, {"model.layers.0.self_attn.k_proj.weight": torch.zeros(48, 48)})
    assert "k_proj.weight' is [48, 48], and config.json asks for [24, 48]" in refusal(llama)


def test_a_misshapen_transposed_tensor_is_described_as_the_file_has_it(tmp_path: Path) -> None:
    folder = make_checkpoint("gpt2", tmp_path)
    edit_tensors(folder, {"transformer.h.0.attn.c_attn.weight": torch.zeros(144, 48)})
    assert "c_attn.weight' is [144, 48], and config.json asks for [48, 144]" in refusal(folder)


def test_a_tensor_stored_as_integers_is_refused(llama: Path) -> None:
    edit_tensors(llama, {"model.norm.weight": torch.zeros(48, dtype=torch.int8)})
    with pytest.raises(UnsupportedModel, match=r"'model.norm.weight' is stored as I8") as refused:
        load_model(llama, BACKENDS["reference"])
    assert_one_sentence(refused)
