"""The tensors that block numbers refer to: one pool of keys and values for all layers.

    pool       [layers, 2, num_blocks, kv_heads, block_size, head_dim]    2: keys, values
    layers[i]  (k, v), the part of layer i: each [num_blocks, kv_heads, block_size, head_dim]

Head-major: the slots of one block and one head are adjacent, so that attention multiplies a whole
block at a time in place. A slot is `physical block * block_size + offset`.

The block manager decides copies and swaps as pairs of blocks; this module carries them out. Since
the pool is one tensor, a pair is copied for all layers at once.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from itertools import islice
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from minipaged.attention.pool import KVPair, by_layer, new_pool
from minipaged.attention.quantized_cache import LARGEST
from minipaged.config import EngineConfig, ModelConfig
from minipaged.errors import InvalidOption
from minipaged.memory import BlockPair
from minipaged.utils.device import to_device

CopyBlocks = Callable[[Tensor, Tensor, Tensor], None]

KV_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
_BYTES_SET_ASIDE = 256 * 1024**2  # bytes of GPU memory for staging swap-outs


def copy_blocks(source: Tensor, target: Tensor, pairs: Tensor) -> None:
    """Copy blocks of `source` over blocks of `target`, which may be the same tensor.

    Args:
        source: [layers, 2, num_blocks, ...], on any device.
        target: the same.
        pairs: [pairs, 2] block numbers, from and to, on the device of the pool.
    """
    # The right side is gathered completely before the left side is written.
    copied = source[:, :, pairs[:, 0].to(source.device)]
    target[:, :, pairs[:, 1].to(target.device)] = copied.to(target.device)


@runtime_checkable  # tests check shapes and types at run time
class Cache(Protocol):
    """The interface that a model and its runner use, however keys and values are stored."""

    @property
    def block_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def layers(self) -> list[KVPair]: ...
    def clear(self, blocks: Many[int]) -> None: ...
    def copy(self, pairs: Many[BlockPair]) -> None: ...
    def swap_out(self, pairs: Many[BlockPair]) -> None: ...
    def swap_in(self, pairs: Many[BlockPair]) -> None: ...


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
        copy_blocks: CopyBlocks = copy_blocks,
    ) -> None:
        self.block_size = block_size
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self._pool = new_pool(config, num_blocks, block_size, dtype, self.device)
        # Pinned, so that the GPU can read and write it directly.
        host = torch.device("cpu")
        self._swap_pool = new_pool(config, num_swap_blocks, block_size, dtype, host, pin=on_gpu)
        self.layers = by_layer(self._pool, dtype)
        self._copy_blocks = copy_blocks
        self._swap_stream = torch.cuda.Stream(self.device) if on_gpu else None

    @classmethod
    def build(
        cls,
        model: ModelConfig,
        engine: EngineConfig,
        dtype: torch.dtype,
        device: torch.device | str,
        copy_blocks: CopyBlocks = copy_blocks,
    ) -> "KVCache":
        """Allocate the cache for this model with these options."""
        return cls(
            model,
            engine.num_blocks,
            engine.block_size,
            num_swap_blocks=engine.num_swap_blocks,
            dtype=dtype,
            device=device,
            copy_blocks=copy_blocks,
        )

    def clear(self, blocks: Many[int]) -> None:
        """Zero the blocks whose first slot a sequence is about to write.

        A block from the pool still contains its last owner's keys and values. Attention may give
        the slots after a sequence's end a weight of zero, but zero times NaN or infinity is NaN.
        """
        for tensor in self._pool:
            for block in blocks:
                tensor[:, :, block].zero_()

    def copy(self, pairs: Many[BlockPair]) -> None:
        """Copy blocks inside the pool: copy-on-write (section 4.4)."""
        # A GPU copies all pairs concurrently, in no defined order.
        assert not {s for s, _ in pairs} & {t for _, t in pairs}, f"a copy of a copy in {pairs}"
        self._copy(self._pool, self._pool, pairs)

    def swap_out(self, pairs: Many[BlockPair]) -> None:
        """Copy blocks from the pool to the swap pool (section 4.5).

        The blocks may be reused in the same step, and the bus to the host is slow. Therefore a GPU
        first copies them to a staging buffer, and from there to the host on a separate stream,
        while the step computes.
        """
        if self._swap_stream is None:
            self._copy(self._pool, self._swap_pool, pairs)
            return
        main = torch.cuda.current_stream(self.device)
        for number, some in enumerate(_portions(pairs, self._blocks_aside)):
            if number > 0:
                main.wait_stream(self._swap_stream)  # so that one portion is staged at a time
            blocks = to_device([source for source, _ in some], self.device)
            aside = [tensor[:, :, blocks] for tensor in self._pool]
            self._swap_stream.wait_stream(main)
            with torch.cuda.stream(self._swap_stream):
                self._copy(aside, self._swap_pool, [(i, t) for i, (_, t) in enumerate(some)])
            for tensor in aside:
                tensor.record_stream(self._swap_stream)  # do not reuse it before it is read

    def swap_in(self, pairs: Many[BlockPair]) -> None:
        """Copy blocks from the swap pool back to the pool (section 4.5), before the step reads."""
        if pairs and self._swap_stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._swap_stream)
        self._copy(self._swap_pool, self._pool, pairs)

    def _copy(self, source: list[Tensor], target: list[Tensor], pairs: Many[BlockPair]) -> None:
        if pairs:
            on_device = to_device(pairs, self.device)  # [pairs, 2]
            for from_tensor, to_tensor in zip(source, target, strict=True):
                self._copy_blocks(from_tensor, to_tensor, on_device)

    @property
    def _blocks_aside(self) -> int:
        block_bytes = sum(t[:, :, 0].numel() * t.itemsize for t in self._pool)
        return max(1, _BYTES_SET_ASIDE // block_bytes)


def choose_kv_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """The storage type of keys and values; "auto" is the model's own type. Raises InvalidOption."""
    if name == "auto":
        return model_dtype
    if name not in KV_DTYPES:
        names = ", ".join(["auto", *KV_DTYPES])
        raise InvalidOption(f"kv_cache_dtype is {name!r}: choose one of {names}.")
    return KV_DTYPES[name]


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, scales included."""
    num_keys = 2 * config.num_layers * config.num_kv_heads * block_size  # and values
    scales = num_keys * torch.float32.itemsize if dtype in LARGEST else 0
    return block_size * config.kv_bytes_per_token(dtype.itemsize) + scales


def _portions(pairs: Many[BlockPair], size: int) -> Iterator[Many[BlockPair]]:
    rest = iter(pairs)
    while some := list(islice(rest, size)):
        yield some
