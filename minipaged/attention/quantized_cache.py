"""Keys and values in 8 bits: a pool that is read and written like a tensor of floats.

    numbers  int8 or float8 (e4m3)   [num_blocks, kv_heads, block_size, head_dim]
    scales   float32                 [num_blocks, kv_heads, block_size]

Each key (the elements of one token and one head) has its own scale, which spreads it over the full
range of 8 bits: stored = key / scale. A large key therefore costs other keys no precision, and no
calibration is needed. With a head_dim of 128, a key takes 128 + 4 bytes instead of 256 in half
precision: the pool holds 1.94 times as many tokens.

    int8  255 equal steps                 error: up to 1/254 of the key's largest element
    fp8   steps that grow with the value  error: up to 1/16 of the element, so small ones lose less
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minipaged.utils.shapes import Float

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the largest value that can be stored

# Far below the scale of any real key: a key of zeros is divided by this instead of by zero.
SMALLEST_SCALE = 1e-30


@dataclass(frozen=True, eq=False)
class QuantizedPool:
    """A quantized replacement for a float tensor [num_blocks, kv_heads, block_size, head_dim]."""

    numbers: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.numbers.shape

    @property
    def dtype(self) -> torch.dtype:
        """The type of the keys that reading returns."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self.numbers.device

    def __getitem__(self, index: Any) -> Float[Tensor, "..."]:
        """Keys as float32. The index selects blocks, heads and slots, never parts of a key."""
        # Viewed as int8, because PyTorch cannot index float8; selecting keys only copies bits.
        stored = self.numbers.view(torch.int8)[index].view(self.numbers.dtype)
        return stored.float() * self.scales[index][..., None]

    def __setitem__(self, index: Any, keys: Float[Tensor, "..."]) -> None:
        stored, scales = quantize(keys, self.numbers.dtype)
        self.numbers.view(torch.int8)[index] = stored.view(torch.int8)
        self.scales[index] = scales


KVPool = Float[Tensor, "num_blocks kv_heads block_size head_dim"] | QuantizedPool


def quantize(
    keys: Float[Tensor, "... head_dim"], dtype: torch.dtype
) -> tuple[Float[Tensor, "... head_dim"], Float[Tensor, "..."]]:
    """Return stored elements and scales; elements * scale is the key again, up to rounding."""
    exact = keys.float()
    largest = LARGEST[dtype]
    scales = (exact.abs().amax(dim=-1) / largest).clamp(min=SMALLEST_SCALE)
    scaled = exact / scales[..., None]
    if dtype is torch.int8:
        # Half a step rounds up, as in the kernels. (Rounding cannot exceed 127: the largest
        # element is 127 * scale, up to the last bit of a float32.)
        return (scaled + 0.5).floor().clamp(-127, 127).to(dtype), scales
    return scaled.clamp(-largest, largest).to(dtype), scales
