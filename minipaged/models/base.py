"""Three model families, each in one self-contained file.

    llama   RMSNorm, rotary positions, grouped-query attention: LLaMA 1 to 3, Mistral, Qwen2, Qwen3
    gpt2    LayerNorm, learned positions, one output matrix with the embedding
    opt     GPT-2's architecture with ReLU and separate query, key and value projections
    rope    the rotary positions of llama
    linear  linear layers, merged, and packed for a CPU
    layers  the code shared by gpt2 and opt
    loader  a folder with config.json and safetensors -> a model with every parameter loaded
    safetensors_reader  reads safetensors files into a model's memory

This module contains what they have in common: the contract `Model`, the weight map, and functions
that read values from a Hugging Face config.json.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, cast

import torch
from torch import Tensor, nn

from minipaged.attention.batch import Batch
from minipaged.attention.kv_cache import Cache
from minipaged.config import ModelConfig
from minipaged.errors import CheckpointError, UnsupportedModel
from minipaged.utils.shapes import Float, Int

HFConfig = Mapping[str, Any]  # a parsed config.json


class Model(nn.Module, ABC):
    """A stack of transformer layers over a paged cache.

    All input of a step comes through the arguments: the module keeps no state of a step. The
    `AttentionBackend` passed to the constructor implements attention.
    """

    config: ModelConfig
    embedding: nn.Embedding
    head: nn.Linear | None  # None: tied, the embedding is also the output matrix

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it computes."""
        return self.embedding.weight.dtype

    @abstractmethod
    def forward(
        self,
        token_ids: Int[Tensor, " tokens"],
        positions: Int[Tensor, " tokens"],
        kv_cache: Cache,
        batch: Batch,
    ) -> Float[Tensor, "tokens hidden"]:
        """Run one step: write the tokens' keys and values, return the input of `logits`.

        The result is the hidden states after the last layer and the last norm, if there is one.
        Positions are below `config.max_position_embeddings`, which the engine checks.
        """

    @abstractmethod
    def logits(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocab"]:
        """Scores of all tokens, only for the rows that are sampled or reported."""


@dataclass(frozen=True)
class Placement:
    """A tensor of a checkpoint and its place: rows [start, stop) of a parameter."""

    tensor: str  # its name without the prefix
    parameter: str
    start: int
    stop: int
    transposed: bool

    def place_in(self, model: Model) -> Tensor:
        """This part of the parameter, in the tensor's own shape."""
        rows = model.get_parameter(self.parameter)[self.start : self.stop]
        return rows.t() if self.transposed else rows


@dataclass(frozen=True, kw_only=True)
class WeightMap:
    """Maps each module to its name in a Hugging Face checkpoint.

    Names are of modules; `.weight` and `.bias` follow them on both sides. `{i}` is a layer's
    number. A list of names belongs to one `MergedLinear` here, in its order. The map may contain
    more than a given model has (such as per-head norms or a separate head): the model's options
    decide which parameters exist, and a checkpoint must contain exactly those.
    """

    prefix: str  # before the checkpoint's names; checkpoints without a head omit it
    modules: Mapping[str, str | tuple[str, ...]]  # our name -> the checkpoint's, without the prefix
    transposed: frozenset[str] = frozenset()  # our names of matrices stored as [in, out]

    def placements(self, model: Model) -> list[Placement]:
        """Return the tensors that fill this model, parameter by parameter."""
        names = [name for name, _ in model.named_parameters()]
        return [placement for name in names for placement in self._placements_in(model, name)]

    def _placements_in(self, model: Model, parameter: str) -> Iterator[Placement]:
        module, _, leaf = parameter.rpartition(".")
        layer = re.search(r"\.(\d+)\.", module)
        template = module if layer is None else module.replace(layer[0], ".{i}.", 1)
        transposed = template in self.transposed and leaf == "weight"
        theirs = self.modules[template]
        if isinstance(theirs, str):
            theirs, sizes = (theirs,), model.get_parameter(parameter).shape[:1]
        else:
            sizes = cast(tuple[int, ...], model.get_submodule(module).sizes)
        start = 0
        for name, size in zip(theirs, sizes, strict=True):
            tensor = f"{name.format(i=layer and layer[1])}.{leaf}"
            yield Placement(tensor, parameter, start, start + size, transposed)
            start += size


def read_architecture(hf: HFConfig) -> str:
    """The class that Hugging Face would load, as "LlamaForCausalLM". Raises CheckpointError."""
    names = hf.get("architectures")
    if not isinstance(names, list) or not names:
        raise CheckpointError(
            'config.json names no architecture: add one, as in "architectures": '
            '["LlamaForCausalLM"].'
        )
    return str(names[0])


def read_int(hf: HFConfig, name: str, default: int | None = None) -> int:
    """Read a whole number above 0; null counts as absent. Raises CheckpointError."""
    value = hf.get(name)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(
            f"config.json has no {name}: add it, or copy the config.json that the weights were "
            "published with."
        )
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise CheckpointError(
            f"config.json gives {name} as {value!r}: correct it to a whole number from 1 to "
            "2^31 - 1."
        )
    return value


def read_float(hf: HFConfig, name: str, default: float) -> float:
    """Read a number above 0 from config.json; null counts as absent. Raises CheckpointError."""
    value = hf.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < inf:
        raise CheckpointError(
            f"config.json gives {name} as {value!r}: correct it to a number above 0."
        )
    return float(value)


def read_eos_token_ids(hf: HFConfig) -> tuple[int, ...]:
    """Read `eos_token_id`: absent, null, one number or a list. Raises CheckpointError."""
    value = hf.get("eos_token_id")
    if value is None:
        return ()
    token_ids: list[Any] = value if isinstance(value, list) else [value]
    if not all(type(token_id) is int for token_id in token_ids):
        raise CheckpointError(
            f"config.json gives eos_token_id as {value!r}: correct it to a token id, or a list of "
            "them."
        )
    return tuple(token_ids)


def divide_heads(hidden_size: int, num_heads: int) -> int:
    """Elements per head if the heads divide the hidden size evenly. Raises CheckpointError."""
    if hidden_size % num_heads:
        raise CheckpointError(
            f"config.json has a hidden size of {hidden_size} and {num_heads} heads, which do not "
            "divide evenly: correct one of them."
        )
    return hidden_size // num_heads


def require_option(hf: HFConfig, name: str, built: object) -> None:
    """Refuse a checkpoint that sets an option to an unsupported value.

    Raises:
        UnsupportedModel: config.json sets the option to a value other than `built` and null.
    """
    value = hf.get(name)
    if value is not None and value != built:
        raise UnsupportedModel(
            f"config.json sets {name} to {value!r}, but only {built!r} is supported: choose "
            "another checkpoint."
        )
