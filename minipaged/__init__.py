"""minipaged: PagedAttention, the system behind vLLM, from scratch.

    from minipaged import LLM, SamplingParams

    llm = LLM("storyteller")
    [output] = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=20))
    print(output.outputs[0].text)

The names below are imported when they are first used (PEP 562), so that `import minipaged.memory`
and `import minipaged.scheduler` stay free of torch. A script for vLLM needs no other change than
`minipaged` in place of `vllm` (see `minipaged/utils/vllm_modules.py`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minipaged.utils.threads import choose_threads
from minipaged.utils.vllm_modules import install

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from minipaged.config import EngineConfig, ModelConfig
    from minipaged.engine.arg_utils import EngineArgs
    from minipaged.engine.llm_engine import LLMEngine
    from minipaged.engine.outputs import CachedPrefix, CompletionOutput, RequestOutput
    from minipaged.engine.parts import Parts
    from minipaged.errors import MinipagedError
    from minipaged.llm import LLM
    from minipaged.sampling import BeamSearchParams, SamplingParams
    from minipaged.tokenizer.inputs import PromptType, TextPrompt, TokensPrompt
    from minipaged.tracing.events import Event, EventLog

_HOMES = {
    "LLM": "llm",
    "LLMEngine": "engine.llm_engine",
    "SamplingParams": "sampling",
    "BeamSearchParams": "sampling",
    "RequestOutput": "engine.outputs",
    "CompletionOutput": "engine.outputs",
    "CachedPrefix": "engine.outputs",
    "Parts": "engine.parts",
    "EngineArgs": "engine.arg_utils",
    "PromptType": "tokenizer.inputs",
    "TextPrompt": "tokenizer.inputs",
    "TokensPrompt": "tokenizer.inputs",
    "EngineConfig": "config",
    "ModelConfig": "config",
    "Event": "tracing.events",
    "EventLog": "tracing.events",
    "MinipagedError": "errors",
}

__all__ = [
    "LLM",
    "BeamSearchParams",
    "CachedPrefix",
    "CompletionOutput",
    "EngineArgs",
    "EngineConfig",
    "Event",
    "EventLog",
    "LLMEngine",
    "MinipagedError",
    "ModelConfig",
    "Parts",
    "PromptType",
    "RequestOutput",
    "SamplingParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]


choose_threads()
install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minipaged' has no attribute {name!r}")
    return getattr(import_module(f"minipaged.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
