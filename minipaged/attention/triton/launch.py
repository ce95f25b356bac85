"""Shared by all launchers: pointers into a pool, the pool's constants, and the current GPU."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from minipaged.attention.quantized_cache import LARGEST, KVPool, QuantizedPool
from minipaged.attention.triton.machine import is_interpreted, prepare_triton

prepare_triton()  # every file with kernels imports this one, before it defines them

LOG2_E = 1.4426950408889634  # 2^(x * log2(e)) is e^x

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

_P = ParamSpec("_P")
_T = TypeVar("_T")


def on_its_gpu(launch: Callable[_P, _T]) -> Callable[_P, _T]:
    """Make the GPU of the arguments current while a launcher runs.

    Triton compiles and launches for the current GPU, wherever the arguments are.
    """

    @wraps(launch)
    def launched(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        *_, last = (each for each in args if isinstance(each, Tensor))
        with torch.cuda.device_of(last):  # no effect on a CPU
            return launch(*args, **kwargs)

    return launched


def pointers(k_cache: KVPool, v_cache: KVPool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pointers to keys, values and their scales; a pool of floats passes unused scales."""
    if isinstance(k_cache, QuantizedPool):
        assert isinstance(v_cache, QuantizedPool), "keys are quantized, and values are not"
        tensors = (k_cache.numbers, v_cache.numbers, k_cache.scales, v_cache.scales)
    else:
        assert isinstance(v_cache, Tensor), "values are quantized, and keys are not"
        tensors = (k_cache, v_cache, k_cache, v_cache)
    # A kernel gets only pointers: past the end of a small tensor it would access other memory.
    assert k_cache.shape == v_cache.shape, f"{k_cache.shape} of keys, {v_cache.shape} of values"
    for tensor in tensors:
        assert tensor.is_contiguous(), "the kernels number the cells of a pool without gaps"
    return tensors


def check_rows(**tensors: Tensor) -> None:
    """The elements of a head must be contiguous; tokens and heads may have any stride."""
    for name, tensor in tensors.items():
        assert tensor.stride(-1) == 1, f"the elements of one head of {name} are not contiguous"


def pool_constants(k_cache: KVPool) -> dict[str, Any]:
    """The compile-time constants of a kernel that depend on the pool."""
    _, kv_heads, block_size, head_dim = k_cache.shape
    quantized = isinstance(k_cache, QuantizedPool)
    return {
        "KV_HEADS": kv_heads,
        "BLOCK_SIZE": block_size,
        "HEAD_DIM": head_dim,
        # tl.dot needs at least 16, and elements of 8 bits are multiplied in two parts.
        "WIDTH": max(32 if quantized else 16, triton.next_power_of_2(head_dim)),
        "QUANTIZED": quantized,
        "LARGEST": largest(k_cache),
    }


def largest(k_cache: KVPool) -> float:
    """The largest value that an 8-bit pool can store; 1.0 (no effect) for a pool of floats."""
    return LARGEST[k_cache.numbers.dtype] if isinstance(k_cache, QuantizedPool) else 1.0


def math_type(dtype: torch.dtype) -> Any:
    """The type in which a kernel multiplies tiles: the type of the queries.

    In the interpreter it is float32, because Triton's interpreter multiplies the bit patterns of
    bfloat16 as if they were integers (seen with Triton 3.6 to 3.9).
    """
    return tl.float32 if is_interpreted() else _TYPES[dtype]
