"""Choosing the device, measuring its memory, and copying data to it without waiting."""

import os
import platform
import warnings
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minipaged.errors import InvalidOption
from minipaged.utils.options import shown

GIB = 1024**3
_ARRAY_CODES = {torch.int32: "i", torch.long: "q"}


def choose_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is a CUDA GPU if there is one. Raises InvalidOption."""
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
            'device="cuda" needs a CUDA GPU, but none was found: choose "cpu".', "device"
        )
    number_of = {"cpu": 1, "cuda": torch.cuda.device_count()}[device.type]
    if (device.index or 0) >= number_of:
        raise InvalidOption(
            f"device is {name!r}, but this machine has {number_of} of them, numbered from 0: "
            f'choose "{device.type}".',
            "device",
        )
    return device


def warn_if_bfloat16_is_slow(dtype: torch.dtype, device: torch.device) -> None:
    """Warn if this processor has to convert every bfloat16 number, to multiply it in float32."""
    if dtype is torch.bfloat16 and device.type == "cpu" and not multiplies_bfloat16():
        warnings.warn(
            "this processor has no instructions for bfloat16, so the model is slower than in "
            "float32: leave out dtype.",
            stacklevel=2,
        )


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16, as far as PyTorch can tell."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    # Not a public interface of PyTorch, so one of them may be missing.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    found = [getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name)]
    return any(found) or not found


def physical_memory() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_gpu_memory(gpu: torch.device) -> int:
    """Return the GPU's free memory in bytes, including memory that torch caches."""
    kept = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
    return torch.cuda.mem_get_info(gpu)[0] + kept


def to_device(
    values: Sequence[Any] | np.ndarray | Tensor,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return a tensor of these values on the device.

    A copy to a GPU goes through pinned memory, so it is asynchronous. A copy from ordinary memory
    would wait until the GPU has finished all earlier work.
    """
    if dtype in _ARRAY_CODES and isinstance(values, list) and values and type(values[0]) is int:
        # Through an array, converting a list of integers takes a third of the time.
        tensor = torch.frombuffer(array(_ARRAY_CODES[dtype], values), dtype=dtype)
    else:
        tensor = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)  # not to a GPU, or already there
    return tensor.pin_memory().to(device, non_blocking=True)


def to_device_together(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Return a tensor on the device for each array, with one copy for all of them.

    Args:
        arrays: in one dimension, and those of 64-bit integers before those of 32-bit integers.
    """
    return unpack(pack(arrays, arrays, device).to(device, non_blocking=True), arrays)


def pack(arrays: Sequence[np.ndarray], room: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Return the arrays of `to_device_together` in one tensor of 32-bit words on the host.

    Memory for a GPU is pinned. It may be released while a copy from it runs: PyTorch reuses pinned
    memory only after all copies from it have ended.

    Args:
        room: arrays as long as the places for `arrays`, which are filled up with zeros.
    """
    num_words = sum(place.nbytes for place in room) // 4
    packed = torch.zeros(num_words, dtype=torch.int32, pin_memory=device.type == "cuda")
    words, start = packed.numpy(), 0
    for values, place in zip(arrays, room, strict=True):
        part = values.view(np.int32)
        words[start : start + len(part)] = part
        start += place.nbytes // 4
    return packed


def unpack(packed: Tensor, room: Sequence[np.ndarray]) -> list[Tensor]:
    """Return views of the arrays that `pack` has packed, with the same `room`."""
    parts = packed.split([place.nbytes // 4 for place in room])
    return [
        part.view(torch.long) if place.itemsize == 8 else part
        for part, place in zip(parts, room, strict=True)
    ]
