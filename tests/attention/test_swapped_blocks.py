"""Blocks that go to the swap pool and return: the same bits, with scales, in every format."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from minipaged.attention import kv_cache
from minipaged.attention.kv_cache import KV_DTYPES, KVCache, KVPair
from minipaged.attention.quantized_cache import QuantizedPool
from minipaged.config import ModelConfig

CONFIG = ModelConfig(
    architecture="", num_layers=3, num_heads=4, num_kv_heads=2, head_dim=5, hidden_size=20,
    vocab_size=9, max_position_embeddings=64, eos_token_ids=(),
)  # fmt: skip
NUM_BLOCKS, BLOCK_SIZE = 7, 4

every_dtype = pytest.mark.parametrize("dtype", KV_DTYPES.values(), ids=KV_DTYPES.keys())


def copies_of(name: str) -> Callable[[Tensor, Tensor, Tensor], None]:
    if name == "triton":
        from minipaged.attention.triton.copy_blocks import copy_blocks

        return copy_blocks
    return kv_cache.copy_blocks


def parts_of(pair: KVPair) -> Iterator[Tensor]:
    """The stored tensors of one layer, as bytes: elements and scales of keys and of values."""
    for pool in pair:
        tensors = (pool.numbers, pool.scales) if isinstance(pool, QuantizedPool) else (pool,)
        for tensor in tensors:
            yield tensor.view(torch.uint8)


def full_cache(dtype: torch.dtype, copy: Callable[..., None] = kv_cache.copy_blocks) -> KVCache:
    """A cache whose every byte is random."""
    cache = KVCache(
        CONFIG, NUM_BLOCKS, BLOCK_SIZE, num_swap_blocks=5, dtype=dtype, copy_blocks=copy
    )
    random = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        for part in parts_of(layer):
            part.random_(0, 256, generator=random)
    return cache


def block(cache: KVCache, number: int) -> list[Tensor]:
    return [part[number].clone() for layer in cache.layers for part in parts_of(layer)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    assert len(one) == len(other) > 0
    return all(map(torch.equal, one, other))


def check_return(cache: KVCache) -> None:
    """Blocks go out, their places are reused, and they return to other places."""
    before = [block(cache, number) for number in range(NUM_BLOCKS)]
    cache.swap_out([(1, 4), (6, 0), (2, 3)])
    cache.clear([1, 6])
    cache.copy([(0, 2)])
    cache.swap_in([(0, 1), (3, 6), (4, 5)])
    places = {1: 6, 6: 2, 5: 1, 2: 0, 0: 0, 3: 3, 4: 4}  # place -> the block that is there now
    for place, number in places.items():
        assert same(block(cache, place), before[number]), f"block {place}"


@every_dtype
@pytest.mark.parametrize("copies", ["torch", "triton"])
def test_blocks_return_from_the_swap_pool_bit_by_bit(copies: str, dtype: torch.dtype) -> None:
    if copies == "triton" and find_spec("triton") is None:
        pytest.skip("Triton exists for Linux only")
    check_return(full_cache(dtype, copies_of(copies)))


class Queue:
    """A CUDA stream that does nothing until another one waits for it."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def wait_stream(self, other: "Queue") -> None:
        for work in other.waiting:
            work()
        other.waiting.clear()


def on_streams(cache: KVCache, monkeypatch: pytest.MonkeyPatch) -> tuple[KVCache, list[int]]:
    """As on a GPU: what is issued on the swap stream happens late. Returns the portions' sizes."""
    main, aside = Queue(), Queue()
    current, portions, copy = [main], list[int](), cache._copy_blocks

    @contextmanager
    def inside(stream: Queue) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    def issue(source: Tensor, target: Tensor, pairs: Tensor) -> None:
        if current[-1] is main:
            copy(source, target, pairs)
            return
        portions.append(len(pairs))
        aside.waiting.append(lambda: copy(source, target, pairs))

    cache._swap_stream, cache._copy_blocks = aside, issue
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    return cache, portions


@every_dtype
def test_blocks_swapped_while_the_step_computes_return_too(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, portions = on_streams(full_cache(dtype), monkeypatch)
    monkeypatch.setattr(kv_cache, "_BYTES_SET_ASIDE", 2 * sum(t.nbytes for t in block(cache, 0)))
    check_return(cache)
    tensors = 1 if isinstance(cache.layers[0][0], Tensor) else 2  # elements, and scales
    assert portions == [2] * tensors + [1] * tensors


def test_a_swap_without_a_staging_buffer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, _ = on_streams(full_cache(torch.int8), monkeypatch)

    def swap_out(pairs: list[tuple[int, int]]) -> None:
        with torch.cuda.stream(cache._swap_stream):
            cache._copy(cache._pool, cache._swap_pool, pairs)

    monkeypatch.setattr(cache, "swap_out", swap_out)
    with pytest.raises(AssertionError, match="block"):
        check_return(cache)


def test_a_swap_that_forgets_the_scales_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = full_cache(torch.int8)
    copy = cache._copy

    def without_scales(source: list[Tensor], target: list[Tensor], pairs: list) -> None:
        copy(source[:1], target[:1], pairs)

    monkeypatch.setattr(cache, "_copy", without_scales)
    with pytest.raises(AssertionError, match="block"):
        check_return(cache)
