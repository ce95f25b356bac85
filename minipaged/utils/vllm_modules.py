"""vLLM's module paths: `from minipaged.sampling_params import SamplingParams` works as with vLLM.

Scripts import from vLLM's modules, which are organised differently from ours. Each path below is a
module with the names of one of ours. Python calls `VLLMModules` if there is no file for it.
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
"""The module with the names of each module of vLLM."""


class VLLMModules(MetaPathFinder, Loader):
    """Finds the modules above. Their names are looked up in ours on access."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in VLLM_MODULES:
            return None
        is_package = any(other.startswith(fullname + ".") for other in VLLM_MODULES)
        return ModuleSpec(fullname, self, is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        """Make the module look up every name in ours."""
        ours = VLLM_MODULES[module.__name__]

        def look_up(name: str) -> Any:
            if name.startswith("__"):  # a module attribute that Python looks up
                raise AttributeError(name)
            return getattr(import_module(ours), name)

        module.__doc__ = f"The names of `{ours}` under vLLM's module path."
        module.__getattr__ = look_up


def install() -> None:
    """Register the finder. Called once, when `minipaged` is imported."""
    if not any(isinstance(finder, VLLMModules) for finder in sys.meta_path):
        sys.meta_path.append(VLLMModules())
