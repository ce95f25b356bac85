"""vLLM's module paths: `from minipaged.sampling_params import SamplingParams` works as with vLLM.

Scripts import from vLLM's modules, which are cut differently from ours. Each path below is a module
whose names are those of one of ours. Python asks `VLLMModules` for it when it finds no file.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

VLLM_MODULES = {
    "minipaged.inputs": "minipaged.tokenizer.inputs",
    "minipaged.outputs": "minipaged.engine.outputs",
    "minipaged.sampling_params": "minipaged.sampling",
    "minipaged.logprobs": "minipaged.sampling.logprobs",
    "minipaged.entrypoints": "minipaged",
    "minipaged.entrypoints.llm": "minipaged.llm",
}
"""From vLLM's path to the module here that has the names."""


class VLLMModules(MetaPathFinder, Loader):
    """Finds the modules above. What they contain is looked up in ours when it is asked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in VLLM_MODULES:
            return None
        is_package = any(other.startswith(fullname + ".") for other in VLLM_MODULES)
        return ModuleSpec(fullname, self, is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        """Let the module look every name up in ours."""
        ours = VLLM_MODULES[module.__name__]

        def look_up(name: str) -> Any:
            if name.startswith("__"):  # what Python asks about a module itself
                raise AttributeError(name)
            return getattr(import_module(ours), name)

        module.__doc__ = f"The names of `{ours}` under vLLM's module path."
        module.__getattr__ = look_up


def install() -> None:
    """Let Python find the modules; once, when `minipaged` is imported."""
    if not any(isinstance(finder, VLLMModules) for finder in sys.meta_path):
        sys.meta_path.append(VLLMModules())
