"""A folder with `config.json` and safetensors -> a model, every parameter of which is filled.

The model is first built on torch's "meta" device, where parameters have a shape and no memory. All
names and shapes are compared with the files' headers before the first number is read. Then each
tensor is copied into place by itself, so that loading needs the memory of the model and of one
tensor. A parameter that no tensor filled would have no memory: it cannot hold leftovers.
"""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from minipaged.attention import AttentionBackend
from minipaged.config import ModelConfig
from minipaged.errors import CheckpointError, InvalidOption, UnsupportedModel
from minipaged.models import HFConfig, Model, WeightMap, read_architecture, read_eos_token_ids
from minipaged.models.gpt2 import GPT2, GPT2_WEIGHTS, GPT2Config
from minipaged.models.llama import LLAMA_WEIGHTS, Llama, LlamaConfig
from minipaged.models.opt import OPT, OPT_WEIGHTS, OPTConfig


@dataclass(frozen=True)
class Family:
    """How models of one file are configured, built and filled."""

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
# As safetensors names the types that weights may be stored in; all others are quantised formats.
_DTYPES_IN_FILES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FROM_ONE_PLACE = "download config.json and the weights from one place"


def read_model_config(folder: Path) -> ModelConfig:
    """The model's numbers, without its weights.

    Tokens that end a sequence are taken from `generation_config.json` too: chat models often name
    more of them there than in `config.json`.

    Raises:
        CheckpointError: the folder or its config.json is missing or broken.
        UnsupportedModel: an architecture, or an option of one, that is not built here.
    """
    hf = _read_hf_config(folder)
    config: ModelConfig = _choose_family(hf).read_config(hf)
    generation = folder / "generation_config.json"
    if generation.is_file():
        more = read_eos_token_ids(_read_json(generation))
        # dict.fromkeys: each once, in order
        config = replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + more)))
    return config


def load_model(
    folder: Path,
    attention: AttentionBackend,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
) -> Model:
    """Build the model that `folder` describes and fill it.

    Args:
        folder: holds config.json and model.safetensors, or shards with their index.
        attention: the functions through which the model will use the cache.
        dtype: of the parameters. "auto" is the one the checkpoint was saved in; but on a CPU it is
            always float32, since half precision saves nothing there but memory, and costs
            exactness and mostly time.
        device: where the parameters shall lie.

    Raises:
        CheckpointError: something is missing, broken, unexpected or misshapen.
        UnsupportedModel: an architecture, or an option of one, that is not built here.
        InvalidOption: there is no such dtype.
    """
    config = read_model_config(folder)
    family = FAMILIES[config.architecture]
    with torch.device("meta"):
        model = family.build(config, attention)
    stored = _read_headers(_find_weight_files(folder), family.weights.prefix)
    plan = _plan(model, family.weights, stored)
    chosen = choose_dtype(dtype, _DTYPES_IN_FILES[plan[0].source.dtype], device)
    _fill(model, plan, chosen, device)
    return model.to(device).eval()  # the parameters are there already: this moves the buffers


def choose_dtype(
    asked: torch.dtype | str, saved: torch.dtype, device: torch.device | str
) -> torch.dtype:
    """The dtype to run in: the one asked for, or what "auto" means. Raises InvalidOption."""
    if asked == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else saved
    dtype = DTYPES.get(asked) if isinstance(asked, str) else asked
    if dtype is None or dtype not in DTYPES.values():
        raise InvalidOption(f"dtype is {asked!r}: choose one of auto, {', '.join(DTYPES)}.")
    return dtype


# ------------------------------------------------------------------------------------ the folder


def _read_hf_config(folder: Path) -> HFConfig:
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no folder {folder}: give one that holds config.json and model.safetensors."
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no config.json: copy the one that the weights were published with."
        )
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor, perhaps, text
        raise CheckpointError(f"{path} is not JSON ({error}): download it again.") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} is JSON but no object: download it again.")
    return parsed


def _choose_family(hf: HFConfig) -> Family:
    architecture = read_architecture(hf)
    if architecture not in FAMILIES:
        raise UnsupportedModel(
            f"config.json names the architecture {architecture}, and only {', '.join(FAMILIES)} "
            "are built here: choose another checkpoint."
        )
    if hf.get("quantization_config") is not None:
        raise UnsupportedModel(
            "config.json has a quantization_config, and quantised weights are not read here: "
            "choose the model's checkpoint in float16 or bfloat16."
        )
    return FAMILIES[architecture]


def _find_weight_files(folder: Path) -> list[Path]:
    """One file, or the shards that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(_nothing_to_load(folder))
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: download it again.")
    shards = [folder / name for name in sorted(set(map(str, weight_map.values())))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(shards)} shards that its index names, "
            f"first {missing[0]}: download them."
        )
    return shards


def _nothing_to_load(folder: Path) -> str:
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        return (
            f"{folder} holds its weights as {pickled[0]} only, which is not read since it can run "
            "code: convert it to safetensors, with transformers by "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)."
        )
    return (
        f"{folder} holds neither model.safetensors nor model.safetensors.index.json: download the "
        "weights into it."
    )


# --------------------------------------------------------------------------------- the tensors


@dataclass(frozen=True)
class Source:
    """A tensor in a file, as the file's header describes it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Placement:
    """Which tensor goes into which parameter."""

    parameter: str
    source: Source
    transposed: bool


@contextmanager
def _opened(path: Path) -> Generator[Any, None, None]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} of {path.stat().st_size} bytes is cut short or no safetensors file ({error}): "
            "download it again."
        ) from error


def _read_headers(paths: list[Path], prefix: str) -> dict[str, Source]:
    """Every tensor in the files, by its name without the prefix."""
    sources: dict[str, Source] = {}
    for path in paths:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                header = file.get_slice(name)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                sources[name.removeprefix(prefix)] = Source(path, name, shape, dtype)
    return sources


def _plan(model: Model, weights: WeightMap, sources: dict[str, Source]) -> list[Placement]:
    """Pair every parameter with its tensor. Raises CheckpointError unless both sides come out."""
    wanted = {name: weights.source_of(name) for name, _ in model.named_parameters()}
    ignored = {t.format(i=i) for t in weights.ignored for i in range(model.config.num_layers)}
    if model.head is None:
        ignored.add("lm_head.weight")  # tied: some files hold the embedding a second time
    architecture = model.config.architecture
    missing = [theirs for theirs, _ in wanted.values() if theirs not in sources]
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} of the {len(wanted)} tensors that config.json "
            f"asks for in a {architecture}, first {missing[0]!r}: {_FROM_ONE_PLACE}."
        )
    unexpected = sources.keys() - {theirs for theirs, _ in wanted.values()} - ignored
    if unexpected:
        raise CheckpointError(
            f"the checkpoint holds {len(unexpected)} tensors that have no place in a "
            f"{architecture} with this config.json, first {min(unexpected)!r}: {_FROM_ONE_PLACE}."
        )
    plan = [Placement(ours, sources[theirs], t) for ours, (theirs, t) in wanted.items()]
    for placement in plan:
        _check_form(placement, model.get_parameter(placement.parameter).shape)
    return plan


def _check_form(placement: Placement, shape: torch.Size) -> None:
    source = placement.source
    expected = tuple(reversed(shape)) if placement.transposed else tuple(shape)
    if source.shape != expected:
        raise CheckpointError(
            f"the tensor {source.name!r} is {list(source.shape)}, and config.json asks for "
            f"{list(expected)}: {_FROM_ONE_PLACE}."
        )
    if source.dtype not in _DTYPES_IN_FILES:
        raise UnsupportedModel(
            f"the tensor {source.name!r} is stored as {source.dtype}, and only "
            f"{', '.join(_DTYPES_IN_FILES)} are read here: choose a checkpoint in one of them."
        )


def _fill(
    model: Model, plan: list[Placement], dtype: torch.dtype, device: torch.device | str
) -> None:
    for path in sorted({placement.source.path for placement in plan}):
        with _opened(path) as file:
            for placement in plan:
                if placement.source.path == path:
                    tensor = file.get_tensor(placement.source.name)
                    tensor = tensor.t() if placement.transposed else tensor
                    # A copy: what safetensors returns may be a window on the file itself.
                    filled = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
                    module, _, leaf = placement.parameter.rpartition(".")
                    parameter = nn.Parameter(filled, requires_grad=False)
                    setattr(model.get_submodule(module), leaf, parameter)
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not empty, f"the plan left parameters empty: {empty}"
