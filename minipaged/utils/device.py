"""The device: which one, how much memory it has, and how data gets there without a wait."""

import os
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minipaged.errors import InvalidOption
from minipaged.utils.options import shown

GIB = 1024**3
_ARRAY_CODES = {torch.int32: "i", torch.long: "q"}


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" is a CUDA GPU if there is one. Raises InvalidOption."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InvalidOption(
            f"there is no device {shown(name)} here: choose auto, cpu or cuda.", "device"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidOption(
            'device="cuda" needs a CUDA GPU, and none is found: choose "cpu".', "device"
        )
    number_of = {"cpu": 1, "cuda": torch.cuda.device_count()}[device.type]
    if (device.index or 0) >= number_of:
        raise InvalidOption(
            f"device is {name!r}, and this machine has {number_of} of them, counted from 0: choose "
            f'"{device.type}".',
            "device",
        )
    return device


def physical_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_gpu_memory(gpu: torch.device) -> int:
    """Bytes that nobody uses, and those that torch keeps after they were used."""
    kept = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
    return torch.cuda.mem_get_info(gpu)[0] + kept


def to_device(
    values: Sequence[Any] | Tensor, device: torch.device | str, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor of these values on the device.

    To a GPU it goes by way of pinned memory, which the GPU fetches by itself when its turn comes.
    From ordinary memory the copy would first wait until the GPU has done all it was told before.
    """
    if dtype in _ARRAY_CODES and isinstance(values, list) and values and type(values[0]) is int:
        # By way of an array, a list of integers takes a third of the time.
        tensor = torch.frombuffer(array(_ARRAY_CODES[dtype], values), dtype=dtype)
    else:
        tensor = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)  # not to a GPU, or there already
    return tensor.pin_memory().to(device, non_blocking=True)
