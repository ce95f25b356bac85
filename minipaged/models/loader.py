"""Loads a folder with `config.json` and safetensors into a model.

The model is first built on torch's "meta" device, where parameters have a shape but no memory. All
names and shapes are compared with the files' headers before any weight is read. Then the
parameters get memory, and `safetensors_reader` reads every tensor directly into its parameter.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minipaged.attention.backend import BACKENDS, AttentionBackend
from minipaged.config import ModelConfig
from minipaged.errors import CheckpointError, InvalidOption, UnsupportedModel
from minipaged.models.base import (
    HFConfig,
    Model,
    Placement,
    WeightMap,
    read_architecture,
    read_eos_token_ids,
)
from minipaged.models.empty import Unset, allocate
from minipaged.models.gpt2 import GPT2, GPT2_WEIGHTS, GPT2Config
from minipaged.models.llama import LLAMA_WEIGHTS, Llama, LlamaConfig
from minipaged.models.opt import OPT, OPT_WEIGHTS, OPTConfig
from minipaged.models.overrides import Overridden
from minipaged.models.parallel import (
    Part,
    Shares,
    clear_padding,
    cut_model,
    fill_with_random_weights,
    part_of,
)
from minipaged.models.safetensors_reader import (
    DTYPES_IN_FILES,
    StoredTensor,
    copy_tensors,
    find_weight_files,
    read_headers,
    same_numbers,
)
from minipaged.utils.counts import counted
from minipaged.utils.device import GIB, free_gpu_memory, physical_memory
from minipaged.utils.files import read_json_object


@dataclass(frozen=True)
class Family:
    """How the models of one file are configured, built and loaded."""

    read_config: Callable[[HFConfig], Any]
    build: Callable[[Any, AttentionBackend], Model]
    weights: WeightMap


_LLAMA = Family(LlamaConfig.from_hf, Llama, LLAMA_WEIGHTS)

FAMILIES: dict[str, Family] = {  # by the architecture that config.json names
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "GPT2LMHeadModel": Family(GPT2Config.from_hf, GPT2, GPT2_WEIGHTS),
    "OPTForCausalLM": Family(OPTConfig.from_hf, OPT, OPT_WEIGHTS),
}

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "half": torch.float16,
}
# Buffers that old files store like weights: rotary angles, which follow from config.json, and
# GPT-2's causal mask with the value of masked scores.
COMPUTED = re.compile(r"inv_freq|cos_cached|sin_cached|(^|\.)attn\.(masked_)?bias$")
_FROM_ONE_PLACE = "download config.json and the weights from one place"


def read_model_config(
    folder: Path, hf_overrides: HFConfig | None = None, generation: Path | None = None
) -> ModelConfig:
    """Read the model's config, without its weights.

    Args:
        hf_overrides: values that replace those of config.json.
        generation: the folder of another generation_config.json.

    Tokens that end a sequence are also read from `generation_config.json`: chat models often list
    more of them there than in `config.json`.

    Raises:
        CheckpointError: the folder or its config.json is missing or broken.
        UnsupportedModel: the architecture or one of its options is not supported.
        InvalidOption: hf_overrides has a name that this architecture does not read.
    """
    hf = Overridden(_read_hf_config(folder), hf_overrides or {})
    family = _choose_family(hf)
    try:
        config: ModelConfig = family.read_config(hf)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} is not a valid config.json ({error}): copy the one that "
            "the weights were published with."
        ) from error
    hf.refuse_unread()
    sampling = (generation or folder) / "generation_config.json"
    if sampling.is_file():
        more = read_eos_token_ids(read_json_object(sampling))
        # dict.fromkeys: each once, in order
        config = replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + more)))
    return config


def check_checkpoint(folder: Path) -> ModelConfig:
    """Check a checkpoint without reading its weights; return the model's config.

    Checks that config.json, the architecture and its options are valid, that every file is present
    and as long as its header says, and that the names, shapes and dtypes of all tensors match.

    Raises:
        CheckpointError: something is missing, broken, unexpected or has the wrong shape.
        UnsupportedModel: the architecture or one of its options is not supported.
    """
    model = build_empty(read_model_config(folder), BACKENDS["reference"])  # any backend works here
    _plan(model, folder)
    return model.config


def load_model(
    folder: Path,
    attention: AttentionBackend,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    *,
    config: ModelConfig | None = None,
    random_weights: bool = False,
    part: Part | None = None,
) -> Model:
    """Build the model that `folder` describes and load its weights.

    Args:
        folder: contains config.json and model.safetensors, or shards with their index.
        attention: the functions through which the model uses the cache.
        dtype: of the parameters. "auto" is the dtype of the checkpoint, but on a CPU always
            float32: half precision is less exact, and is faster only on processors that multiply
            it natively.
        device: where the parameters are placed.
        config: the model's config; None: the result of `read_model_config(folder)`.
        random_weights: generate weights instead of reading them; "auto" is then bfloat16 on a GPU.
        part: of the model, for one rank of several; None: all of it.

    Raises:
        CheckpointError: something is missing, broken, unexpected or has the wrong shape.
        UnsupportedModel: the architecture or one of its options is not supported.
        InvalidOption: the dtype is unknown, the weights do not fit in memory, or the model cannot
            be divided evenly.
    """
    model = build_empty(config or read_model_config(folder), attention)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    plan = [] if random_weights else _plan(model, folder)
    shares = Shares() if part is None else cut_model(model, part)
    saved = DTYPES_IN_FILES[plan[0][1].dtype] if plan else torch.bfloat16
    chosen = choose_dtype(dtype, saved, device)
    _refuse_more_than_memory(model, chosen, device)
    allocate(model, chosen, device)
    if random_weights:
        fill_with_random_weights(model, shapes, shares)
    copy_tensors(pair for each, stored in plan for pair in part_of(stored, each, model, shares))
    clear_padding(model, shares)
    return model.to(device).eval()  # moves the buffers; parameters are there already


def choose_dtype(
    asked: torch.dtype | str, saved: torch.dtype, device: torch.device | str
) -> torch.dtype:
    """The dtype to run in: the requested one, or what "auto" means. Raises InvalidOption."""
    if asked == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else saved
    dtype = DTYPES.get(asked) if isinstance(asked, str) else asked
    if dtype is None or dtype not in DTYPES.values():
        raise InvalidOption(f"dtype is {asked!r}: choose one of auto, {', '.join(DTYPES)}.")
    return dtype


# ---------------------------------------------------------------------------------- the folder


def _read_hf_config(folder: Path) -> HFConfig:
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no folder {folder}: give one that contains config.json and "
            "model.safetensors."
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} contains no config.json: copy the one that the weights were published with."
        )
    return read_json_object(folder / "config.json")


def _choose_family(hf: HFConfig) -> Family:
    architecture = read_architecture(hf)
    if architecture not in FAMILIES:
        raise UnsupportedModel(
            f"config.json names the architecture {architecture}, but only {', '.join(FAMILIES)} "
            "are supported: choose another checkpoint."
        )
    if hf.get("quantization_config") is not None:
        raise UnsupportedModel(
            "config.json has a quantization_config, but quantised weights are not supported: "
            "choose the model's checkpoint in float16 or bfloat16."
        )
    return FAMILIES[architecture]


# --------------------------------------------------------------------------------- the tensors


Plan = list[tuple[Placement, StoredTensor]]


def build_empty(config: ModelConfig, attention: AttentionBackend) -> Model:
    """Build the model; its parameters have no memory yet."""
    with torch.device("meta"), Unset():
        return FAMILIES[config.architecture].build(config, attention)


def _plan(model: Model, folder: Path) -> Plan:
    """Pair every parameter with its tensor. Raises CheckpointError if one has no counterpart."""
    weights = FAMILIES[model.config.architecture].weights
    found = read_headers(find_weight_files(folder), weights.prefix)
    wanted = weights.placements(model)
    ignored = {name for name in found if COMPUTED.search(name)}
    if model.head is None and "lm_head.weight" in found:
        [embedding] = [each.tensor for each in wanted if each.parameter == "embedding.weight"]
        _refuse_another_head(found["lm_head.weight"], found.get(embedding))
        ignored.add("lm_head.weight")
    architecture = model.config.architecture
    missing = [each.tensor for each in wanted if each.tensor not in found]
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} of the {counted(len(wanted), 'tensor')} that "
            f"config.json requires for a {architecture}, first {missing[0]!r}: {_FROM_ONE_PLACE}."
        )
    unexpected = found.keys() - {each.tensor for each in wanted} - ignored
    if unexpected:
        raise CheckpointError(
            f"the checkpoint contains {counted(len(unexpected), 'tensor')} that a {architecture} "
            f"with this config.json does not have, first {min(unexpected)!r}: {_FROM_ONE_PLACE}."
        )
    for each in wanted:
        _check_form(found[each.tensor], each.place_in(model).shape)
    return [(each, found[each.tensor]) for each in wanted]


def _refuse_another_head(head: StoredTensor, embedding: StoredTensor | None) -> None:
    """Refuse an output matrix that differs from the embedding although they are tied."""
    if embedding is not None and not same_numbers(head, embedding):
        raise CheckpointError(
            "config.json ties the output matrix to the embedding, but the tensor "
            f"{head.name!r} differs from it: set tie_word_embeddings to false to use it."
        )


def _check_form(source: StoredTensor, shape: torch.Size) -> None:
    if source.shape != shape:
        raise CheckpointError(
            f"the tensor {source.name!r} has shape {list(source.shape)}, but config.json requires "
            f"{list(shape)}: {_FROM_ONE_PLACE}."
        )
    if source.dtype not in DTYPES_IN_FILES:
        raise UnsupportedModel(
            f"the tensor {source.name!r} is stored as {source.dtype}, but only "
            f"{', '.join(DTYPES_IN_FILES)} are supported: choose a checkpoint in one of them."
        )


def _refuse_more_than_memory(model: Model, dtype: torch.dtype, device: torch.device | str) -> None:
    """Raise InvalidOption if the weights do not fit in the machine's or the GPU's free memory."""
    where = torch.device(device)
    needs = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    if where.type == "cuda":
        has, owner = free_gpu_memory(where), f"the free memory of {where} is"
    else:
        has, owner = physical_memory(), "the memory of this machine is"
    if needs > has:
        half_fits = dtype == torch.float32 and needs // 2 <= has
        less = 'dtype="bfloat16", which takes half of that, or ' if half_fits else ""
        raise InvalidOption(
            f"the weights take {needs / GIB:.1f} GiB in {str(dtype).removeprefix('torch.')}, but "
            f"{owner} {has / GIB:.1f} GiB: choose {less}a smaller model."
        )
