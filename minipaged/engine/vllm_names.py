"""Further names of vLLM's LLMEngine and LLM, for features that exist here already.

EngineNames  the base of `LLMEngine`
LLMNames     the base of `LLM`
prompts_of   the prompts of a call of `generate`, from all of its arguments
"""

from collections.abc import Mapping
from dataclasses import fields
from threading import Lock
from typing import TYPE_CHECKING, Any

from minipaged.engine.arg_utils import Folders, LLMArgs
from minipaged.engine.open_request import OpenRequest
from minipaged.errors import CheckpointError, InvalidOption, InvalidRequest
from minipaged.sampling import SamplingParams
from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.prompts import Prompt, list_prompts
from minipaged.utils.counts import counted
from minipaged.utils.options import require_type
from minipaged.utils.vllm_options import CALL_NAMES, refuse_call_options

if TYPE_CHECKING:
    from minipaged.engine.llm_engine import LLMEngine


class EngineNames:
    """The base of `LLMEngine`, with the names that vLLM's scripts use."""

    tokenizer: Tokenizer | None
    _open: dict[str, OpenRequest]

    @staticmethod
    def from_engine_args(engine_args: LLMArgs) -> "LLMEngine":
        """Build the engine that `LLM` would build. Raises InvalidOption, CheckpointError."""
        from minipaged.engine.build import build_engine  # which imports the engine

        require_type("engine_args", engine_args, LLMArgs)
        return build_engine(engine_args, engine_args.find_folders())

    def get_tokenizer(self) -> Tokenizer | None:
        """Return the model's tokenizer, or None if its folder has none."""
        return self.tokenizer

    @property
    def unfinished_request_ids(self) -> set[str]:
        """The ids of the open requests."""
        return set(self._open)

    def has_unfinished_requests(self) -> bool:
        """Return whether any request is open."""
        return bool(self._open)

    def get_num_unfinished_requests(self) -> int:
        """Return how many requests are open."""
        return len(self._open)


class LLMNames:
    """The base of `LLM`, with further names that vLLM's scripts use."""

    args: LLMArgs
    folders: Folders
    engine: "LLMEngine"
    _lock: Lock

    @classmethod
    def from_engine_args(cls, engine_args: LLMArgs) -> Any:
        """Build an LLM with these options."""
        require_type("engine_args", engine_args, LLMArgs)
        return cls(**{each.name: getattr(engine_args, each.name) for each in fields(engine_args)})

    @property
    def llm_engine(self) -> "LLMEngine":
        """The engine, by vLLM's name."""
        return self.engine

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the parameters of prompts without sampling parameters, as a new object.

        They come from the checkpoint's generation_config.json, or from the options
        generation_config and override_generation_config.

        Raises CheckpointError if that file contains invalid values.
        """
        given = self.args.read_sampling_defaults(self.folders)
        try:
            return SamplingParams(**given)
        except InvalidOption as error:
            raise CheckpointError(
                f"the default sampling parameters of {self.folders.generation} cannot work "
                f'({str(error).rstrip(".")}): give sampling_params, or generation_config="vllm".'
            ) from error

    def _chat_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of `chat` for `render_chat`, and check the others."""
        others = {name: value for name, value in options.items() if name in CALL_NAMES}
        refuse_call_options(others)
        ours = {name: value for name, value in options.items() if name not in CALL_NAMES}
        if ours.get("chat_template") is None:
            ours["chat_template"] = self.args.read_chat_template()
        return ours

    def reset_prefix_cache(self) -> bool:
        """Clear the prefix cache. False, without effect, if a request is open or a prefix pinned.

        A prefix of `cache_prefix` must be released first.
        """
        with self._lock:
            if self.engine.unfinished_request_ids or self.engine.prefixes.pinned:
                return False
            self.engine.restart()
            return True


def prompts_of(prompts: Any, prompt_token_ids: Any, others: Mapping[str, Any]) -> list[Prompt]:
    """Return the prompts of a call of `generate`, given as text, as token ids, or as both.

    Raises:
        InvalidOption: an argument is not supported.
        InvalidRequest: there are no prompts, or the numbers of texts and token lists differ.
    """
    refuse_call_options(others)
    if prompt_token_ids is None:
        return list_prompts(prompts)
    ids = list_prompts(prompt_token_ids)
    if prompts is None:
        return ids
    texts = list_prompts(prompts)
    if len(texts) != len(ids):
        raise InvalidRequest(
            f"{counted(len(texts), 'prompt')} came with {counted(len(ids), 'list')} of token ids: "
            "give equally many, or only one of the two."
        )
    return [{"prompt": t, "prompt_token_ids": i} for t, i in zip(texts, ids, strict=True)]
