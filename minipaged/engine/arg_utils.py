"""All arguments of `LLM`: the options of `EngineArgs`, and those without a command-line flag.

The module has vLLM's path and, as `EngineArgs`, vLLM's name: `EngineArgs(...)` accepts, translates
or refuses every argument of vLLM's (see `minipaged/utils/vllm_options.py`).
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from minipaged.config import EngineArgs as EngineOptions
from minipaged.engine.parts import Parts
from minipaged.errors import InvalidOption
from minipaged.models.hub.local_models import find_model
from minipaged.utils.device import GIB
from minipaged.utils.files import read_json_object
from minipaged.utils.options import option, options_of, shown, translated
from minipaged.utils.vllm_options import translate

LoadFormat = Literal["auto", "safetensors", "dummy"]
Parser = TypeVar("Parser", bound=argparse.ArgumentParser)


@dataclass(frozen=True)
class Folders:
    """The local folders of a model's files."""

    model: Path  # config.json and the weights
    tokenizer: Path  # the tokenizer and the chat template
    generation: Path  # generation_config.json, if there is one


@translated(translate)
@dataclass(frozen=True)
class LLMArgs(EngineOptions):
    """The arguments of `LLM`.

    Raises:
        InvalidOption: a value is invalid or not supported.
    """

    parts: Parts | None = option(None, "Custom parts that replace the library's. See `Parts`.")

    # ---- which files ---------------------------------------------------------------------------
    tokenizer: str | Path | None = option(
        None, "Model to take the tokenizer and chat template from, if not from `model`."
    )
    skip_tokenizer_init: bool = option(
        False, "Do not load a tokenizer: prompts and outputs are token ids only."
    )
    revision: str | None = option(None, "Branch, tag or commit of a fetched model.")
    tokenizer_revision: str | None = option(None, "Branch, tag or commit of the tokenizer.")
    download_dir: str | Path | None = option(
        None, "Folder to search for models first, with the layout of Hugging Face's cache."
    )
    load_format: LoadFormat = option(
        "auto",
        "auto and safetensors load the checkpoint's weights. dummy uses random weights and needs "
        "only config.json.",
    )
    hf_overrides: dict[str, Any] | None = option(None, "Values that override config.json.")
    chat_template: str | Path | None = option(
        None, "Chat template that replaces the checkpoint's: a file, or the template itself."
    )
    generation_config: str | Path = option(
        "auto",
        "Source of the default sampling parameters: auto (the checkpoint's "
        "generation_config.json), vllm (none), or a folder with such a file.",
    )
    override_generation_config: dict[str, Any] | None = option(
        None, "Default sampling parameters that override generation_config.json."
    )

    # ---- pools in bytes ------------------------------------------------------------------------
    kv_cache_memory_bytes: int | None = option(
        None, "Size of the pool in bytes, instead of num_blocks.", at_least=1
    )
    swap_space: float | None = option(
        None,
        "Size of the swap pool in GiB, instead of num_swap_blocks.",
        at_least=0,
        at_most=2**20,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_a_second_size("kv_cache_memory_bytes", "num_blocks")
        self._refuse_a_second_size("kv_cache_memory_bytes", "gpu_memory_utilization")
        self._refuse_a_second_size("swap_space", "num_swap_blocks")
        if self.swap_space and self.memory != "paged":
            raise InvalidOption(
                f"swap_space is {self.swap_space}, but memory={self.memory!r} does not swap: leave "
                'out swap_space, or choose memory="paged".',
                "swap_space",
            )
        self.read_chat_template()
        unknown = [*set(self.override_generation_config or ()) - set(_SAMPLING_DEFAULTS)]
        if unknown:
            raise InvalidOption(
                f"override_generation_config sets {shown(min(unknown, key=str))}, but only "
                f"{', '.join(_SAMPLING_DEFAULTS)} are supported here: leave it out.",
                "override_generation_config",
            )

    def _refuse_a_second_size(self, name: str, other: str) -> None:
        if getattr(self, name) is not None and self.is_given(other):
            raise InvalidOption(
                f"{name} is {getattr(self, name)} and {other} is {getattr(self, other)}, but both "
                "set the size of the same pool: leave out one of them.",
                name,
            )

    def find_folders(self) -> Folders:
        """Find the files. Raises CheckpointError if some are not on this machine."""
        model = find_model(self.model, self.revision, self.download_dir)
        tokenizer = model
        if self.tokenizer is not None:
            tokenizer = find_model(self.tokenizer, self.tokenizer_revision, self.download_dir)
        elif self.tokenizer_revision not in (None, self.revision):
            tokenizer = find_model(self.model, self.tokenizer_revision, self.download_dir)
        ours = self.generation_config in ("auto", "vllm")
        return Folders(model, tokenizer, model if ours else find_model(self.generation_config))

    def read_chat_template(self) -> str | None:
        """Return the text of the option chat_template. Raises InvalidOption."""
        given = self.chat_template
        if given is None or (isinstance(given, str) and ("{" in given or "\n" in given)):
            return given
        try:
            return Path(given).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InvalidOption(
                f"chat_template is {shown(str(given))}, which is neither a template nor a readable "
                f"file ({error}): give one of them.",
                "chat_template",
            ) from error

    def in_blocks(self, block_bytes: int) -> "LLMArgs":
        """Convert pool sizes in bytes to blocks of `block_bytes` bytes. Raises InvalidOption."""
        blocks: dict[str, Any] = {}
        if self.kv_cache_memory_bytes is not None:
            if self.kv_cache_memory_bytes < block_bytes:
                raise InvalidOption(
                    f"kv_cache_memory_bytes is {self.kv_cache_memory_bytes}, but a block of keys "
                    f"and values takes {block_bytes} bytes: raise it, or lower block_size.",
                    "kv_cache_memory_bytes",
                )
            blocks |= {
                "num_blocks": self.kv_cache_memory_bytes // block_bytes,
                "kv_cache_memory_bytes": None,
            }
        if self.swap_space is not None:
            num_swap_blocks = int(self.swap_space * GIB) // block_bytes
            blocks |= {"num_swap_blocks": num_swap_blocks, "swap_space": None}
        return replace(self, **blocks)

    def read_sampling_defaults(self, folders: Folders) -> dict[str, Any]:
        """Return the default sampling parameters, by the names of `SamplingParams`.

        Raises CheckpointError if generation_config.json cannot be read.
        """
        path, found = folders.generation / "generation_config.json", dict[str, Any]()
        if self.generation_config != "vllm" and path.is_file():
            found = read_json_object(path)
        found |= self.override_generation_config or {}
        given = {theirs: found.get(theirs) for theirs in _SAMPLING_DEFAULTS}
        return {_SAMPLING_DEFAULTS[n]: value for n, value in given.items() if value is not None}

    # ---- flags of a script: argparse, as in vLLM -----------------------------------------------

    @staticmethod
    def add_cli_args(parser: Parser) -> Parser:
        """Add one flag per option that has a text form to a parser, and return it."""
        group = parser.add_argument_group("EngineArgs")
        for each in OPTIONS_OF_LLM.values():
            kind = each.type if each.type in (int, float) else str
            flag = "--" + each.name.replace("_", "-")
            how: dict[str, Any] = {"type": kind, "choices": each.choices or None}
            if each.type is bool:
                how = {"action": argparse.BooleanOptionalAction}
            elif each.type in (Parts, dict[str, Any]):
                continue
            help = each.description.replace("%", "%%")
            group.add_argument(flag, default=each.default, help=help, **how)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> "LLMArgs":
        """Build from the options in a parser's result."""
        given = vars(args)
        return cls(**{name: given[name] for name in OPTIONS_OF_LLM if name in given})


EngineArgs = LLMArgs
"""vLLM's name of `LLMArgs`."""

OPTIONS_OF_LLM = options_of(LLMArgs)
"""The declarations above and those of `minipaged.config.EngineArgs`, by name."""

_SAMPLING_DEFAULTS = {  # from the names of generation_config.json to those of SamplingParams
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    **{name: name for name in ("presence_penalty", "frequency_penalty")},
    "max_new_tokens": "max_tokens",
}
