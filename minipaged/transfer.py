"""How numbers get from Python to the device without making either wait for the other."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(
    values: Sequence[Any] | Tensor, device: torch.device | str, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor of these values on the device.

    To a GPU it goes by way of pinned memory, which the GPU fetches by itself when its turn comes.
    From ordinary memory the copy would first wait until the GPU has done all it was told before.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)  # not to a GPU, or there already
    return tensor.pin_memory().to(device, non_blocking=True)
