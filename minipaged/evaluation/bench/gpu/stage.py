"""The form of a stage: a list of parts, each of which yields rows and may fail on its own."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from minipaged.attention.triton.machine import why_no_triton


@dataclass(frozen=True)
class Setup:
    """Where a run measures, and whether it is a dry run."""

    device: torch.device
    dtype: torch.dtype
    is_dry: bool  # tiny inputs on a CPU: all the code of a run, but no figure that means anything

    @classmethod
    def here(cls, is_dry: bool) -> "Setup":
        """The first GPU, or for a dry run the CPU."""
        device = torch.device("cpu") if is_dry else torch.device("cuda", 0)
        return cls(device, torch.bfloat16, is_dry)

    @property
    def rounds(self) -> int:
        """Rounds in which candidates take turns."""
        return 1 if self.is_dry else 11

    def kernel(self, head_dim: int, kv_dtype: str = "auto") -> str:
        """The backend to measure: Triton's, unless a dry run's interpreter does not support it."""
        if self.is_dry and why_no_triton(self.device, head_dim, kv_dtype):
            return "torch"
        return "triton"


class Part(NamedTuple):
    """A measurement."""

    name: str
    measure: Callable[[], Iterable[Any]]  # its rows: instances of a dataclass, or mappings


class Stage(NamedTuple):
    """Measurements of one subject."""

    name: str
    seconds: float  # of the default budget
    about: str  # one line above its table
    parts: Callable[[Setup], list[Part]]
