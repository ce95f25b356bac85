"""A model whose parameters have no memory yet: on torch's "meta" device, before it is filled."""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from minipaged.models.base import Model


class Unset(TorchFunctionMode):
    """Skips the random initialisation of new parameters by torch.nn.

    On "meta" it has no effect, but it would import torch's compiler: a second and 150 MB.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def allocate(model: Model, dtype: torch.dtype, device: torch.device | str) -> None:
    """Allocate uninitialised memory for the parameters."""
    for name, unfilled in list(model.named_parameters()):
        memory = torch.empty(unfilled.shape, dtype=dtype, device=device)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(memory, requires_grad=False))
