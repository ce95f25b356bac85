"""The tensors behind the block numbers: one pool of keys and one of values a layer.

    layers[i] -> (k, v), each [num_blocks, kv_heads, block_size, head_dim]

Head-major: the slots of one block and one head lie side by side, so that attention multiplies a
whole block at a time where it lies. A slot is `physical block * block_size + offset`.

The block manager plans copies and swaps as pairs of blocks; they are carried out here.
"""

import torch
from torch import Tensor

from minipaged.config import EngineConfig, ModelConfig
from minipaged.memory import BlockPair
from minipaged.shapes import Float

KVPair = tuple[
    Float[Tensor, "num_blocks kv_heads block_size head_dim"],
    Float[Tensor, "num_blocks kv_heads block_size head_dim"],
]
Pools = list[tuple[Tensor, Tensor]]  # of any number of blocks: pool and swap pool differ in it


class KVCache:
    """Keys and values of every layer in the pool, and in the swap pool in host memory."""

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        *,
        num_swap_blocks: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        def pool(blocks: int, where: torch.device | str) -> list[KVPair]:
            # Zeros, not empty: attention multiplies unwritten slots by a weight of zero, and
            # zero times an accidental NaN would be NaN.
            shape = (blocks, config.num_kv_heads, block_size, config.head_dim)
            return [
                (
                    torch.zeros(shape, dtype=dtype, device=where),
                    torch.zeros(shape, dtype=dtype, device=where),
                )
                for _ in range(config.num_layers)
            ]

        self.block_size = block_size
        self.layers = pool(num_blocks, device)
        self.swap_layers = pool(num_swap_blocks, "cpu")

    @classmethod
    def build(
        cls,
        model: ModelConfig,
        engine: EngineConfig,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "KVCache":
        """The cache that this model needs under these options."""
        return cls(
            model,
            engine.num_blocks,
            engine.block_size,
            num_swap_blocks=engine.num_swap_blocks,
            dtype=dtype,
            device=device,
        )

    def copy(self, pairs: list[BlockPair]) -> None:
        """Copy blocks inside the pool: copy-on-write (section 4.4)."""
        _copy_blocks(self.layers, self.layers, pairs)

    def swap_out(self, pairs: list[BlockPair]) -> None:
        """Copy blocks from the pool to the swap pool (section 4.5)."""
        _copy_blocks(self.layers, self.swap_layers, pairs)

    def swap_in(self, pairs: list[BlockPair]) -> None:
        """Copy blocks from the swap pool back to the pool (section 4.5)."""
        _copy_blocks(self.swap_layers, self.layers, pairs)


def _copy_blocks(source: Pools, target: Pools, pairs: list[BlockPair]) -> None:
    if not pairs:
        return
    from_blocks = torch.tensor([s for s, _ in pairs], device=source[0][0].device)
    to_blocks = torch.tensor([t for _, t in pairs], device=target[0][0].device)
    for source_pools, target_pools in zip(source, target, strict=True):
        for source_pool, target_pool in zip(source_pools, target_pools, strict=True):
            # The gather on the right is complete before the first write on the left.
            target_pool[to_blocks] = source_pool[from_blocks].to(target_pool.device)
