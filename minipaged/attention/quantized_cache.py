"""Keys and values in 8 bits: a pool that reads and writes like a tensor of floats.

    numbers  int8 or float8 (e4m3)   [num_blocks, kv_heads, block_size, head_dim]
    scales   float32                 [num_blocks, kv_heads, block_size]

Each key (the numbers of one token and one head) has a scale of its own, which spreads it over the
whole range of the 8 bits: stored = key / scale. So a large key costs its neighbours no precision,
and nothing has to be measured beforehand. With heads of 128 a key takes 128 + 4 bytes instead of
256 in half precision: the pool holds 1.94 times as many tokens.

    int8  255 steps of equal width     error of a number: up to 1/254 of the key's largest
    fp8   steps that grow with the number: up to 1/16 of itself, and small ones are kept better
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minipaged.utils.shapes import Float

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # what a stored number can be

# Far below any key that a model makes: a key of zeros is divided by this rather than by zero.
SMALLEST_SCALE = 1e-30


@dataclass(frozen=True, eq=False)
class QuantizedPool:
    """Replaces a float tensor [num_blocks, kv_heads, block_size, head_dim]."""

    numbers: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.numbers.shape

    @property
    def dtype(self) -> torch.dtype:
        """What reading it gives."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self.numbers.device

    def __getitem__(self, index: Any) -> Float[Tensor, "..."]:
        """Keys as float32. The index picks among blocks, heads and slots, never inside a key."""
        # As int8, for indexing is not built for float8: to pick keys, any 8 bits will do.
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
    """Stored numbers and scales, such that numbers * scale is the key again, up to rounding."""
    exact = keys.float()
    largest = LARGEST[dtype]
    scales = (exact.abs().amax(dim=-1) / largest).clamp(min=SMALLEST_SCALE)
    scaled = exact / scales[..., None]
    if dtype is torch.int8:
        # Half a step rounds up, in the kernels too. (No rounding can lead past 127: the largest
        # number is 127 * scale, up to the last bit of a float32.)
        return (scaled + 0.5).floor().clamp(-127, 127).to(dtype), scales
    return scaled.clamp(-largest, largest).to(dtype), scales
