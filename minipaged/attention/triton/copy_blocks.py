# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
"""Copy: whole blocks, from anywhere to anywhere, all layers in one launch.

What it computes   target[layer, k or v, t] = source[layer, k or v, s] for every pair (s, t).
                   Inside the pool that is copy-on-write (section 4.4); between the pool and pinned
                   host memory, which a GPU can read and write itself, it is swapping (section 4.5).
Grid               (pairs, 2 * layers, chunks): a program a chunk of one layer's keys or values.
                   (In an 8-bit pool the scales are a tensor of their own, and a second launch.)
Bytes              2 * block_bytes a pair, over all layers: each number is read and written once. On
                   the way to the host the slower side is the bus; copies of a block and layer each
                   would have to be started one by one (the paper's Figure 19a shows what it costs).
Operations         None.

Of the paper's kernels (section 5.1) it is "fused block copy".
"""

import triton
import triton.language as tl
from torch import Tensor

import minipaged.attention.triton.launch  # noqa: F401 - settles how kernels run

CHUNK = 4096  # numbers a program copies


def copy_blocks(source: Tensor, target: Tensor, pairs: Tensor) -> None:
    """Copy blocks of `source` over blocks of `target`; both may be the same tensor.

    Args:
        source, target: [layers, 2, num_blocks, ...], contiguous, on the GPU or in pinned memory;
            as many blocks as you like in each, the rest alike.
        pairs: [pairs, 2] block numbers, from and to. No block is both a source and a target, if
            the tensors are the same: programs run in no order.
    """
    assert source.shape[:2] + source.shape[3:] == target.shape[:2] + target.shape[3:]
    assert source.dtype == target.dtype
    assert pairs.is_contiguous()
    assert source.is_contiguous()
    assert target.is_contiguous()
    num_layers, kv, num_source_blocks = source.shape[:3]
    block_numbers = source[0, 0, 0].numel()
    grid = (len(pairs), num_layers * kv, triton.cdiv(block_numbers, CHUNK))
    copy_kernel[grid](
        source,
        target,
        pairs,
        num_source_blocks,
        target.shape[2],
        BLOCK_NUMBERS=block_numbers,
        CHUNK=min(CHUNK, triton.next_power_of_2(block_numbers)),
    )


@triton.jit(do_not_specialize=["num_source_blocks", "num_target_blocks"])
def copy_kernel(
    source,
    target,
    pairs,  # [pairs, 2]
    num_source_blocks,
    num_target_blocks,
    BLOCK_NUMBERS: tl.constexpr,  # numbers in a block of one layer's keys
    CHUNK: tl.constexpr,
):
    """A chunk of one block of one layer's keys or values."""
    pair = tl.program_id(0)
    part = tl.program_id(1).to(tl.int64)  # one layer's keys, or its values
    chunk = tl.program_id(2)
    source_block = part * num_source_blocks + tl.load(pairs + 2 * pair)
    target_block = part * num_target_blocks + tl.load(pairs + 2 * pair + 1)
    numbers = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = numbers < BLOCK_NUMBERS
    copied = tl.load(source + source_block * BLOCK_NUMBERS + numbers, mask=mask)
    tl.store(target + target_block * BLOCK_NUMBERS + numbers, copied, mask=mask)
