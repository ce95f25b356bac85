# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
"""Copy: whole blocks within or between pools, all layers in one launch.

What it computes   target[layer, k or v, t] = source[layer, k or v, s] for every pair (s, t).
                   Inside the pool that is copy-on-write (section 4.4); between the pool and pinned
                   host memory, which a GPU can access directly, it is swapping (section 4.5).
Grid               (programs,): a work item is a chunk of a pair's elements, those of all layers in
                   a row, and each program takes every programs-th item. Inside the GPU there are
                   as many programs as items. To and from the host there are few: the bus is slow,
                   and more programs would only take multiprocessors from the step that runs
                   meanwhile. (An 8-bit pool has its scales in a separate tensor, copied by a second
                   launch. A chunk has those of several layers, so it is as large as any other.)
Bytes              2 * block_bytes per pair, over all layers: each element is read and written once.
                   To and from the host, the bus is the bottleneck; separate copies per block and
                   layer would each need a launch (the paper's Figure 19a shows the cost).
Operations         None.

Of the paper's kernels (section 5.1) it is "fused block copy".
"""

import triton
import triton.language as tl
from torch import Tensor

from minipaged.attention.triton.launch import on_its_gpu

CHUNK_BYTES = 8192  # per work item
PROGRAMS_ON_THE_BUS = 16  # 128 KiB in flight, which a bus transfers in microseconds


@on_its_gpu
def copy_blocks(
    source: Tensor, target: Tensor, pairs: Tensor, num_programs: int | None = None
) -> None:
    """Copy blocks of `source` over blocks of `target`; both may be the same tensor.

    Args:
        source: [layers, 2, num_blocks, ...], contiguous, on the GPU or in pinned memory.
        target: the same; only num_blocks may differ.
        pairs: [pairs, 2] block numbers, from and to. If the tensors are the same, no block may be
            both a source and a target, because programs run in no defined order.
        num_programs: programs that share the work; None: few over the bus, otherwise many.
    """
    assert source.shape[:2] + source.shape[3:] == target.shape[:2] + target.shape[3:]
    assert source.dtype == target.dtype
    assert pairs.is_contiguous()
    assert source.is_contiguous()
    assert target.is_contiguous()
    num_layers, kv, num_source_blocks = source.shape[:3]
    block_numbers, parts = source[0, 0, 0].numel(), num_layers * kv
    whole_chunk = CHUNK_BYTES // source.itemsize
    chunk = min(whole_chunk, triton.next_power_of_2(parts * block_numbers))
    num_pieces = len(pairs) * triton.cdiv(parts * block_numbers, chunk)
    if num_programs is None:
        over_the_bus = source.device.type != target.device.type
        num_programs = PROGRAMS_ON_THE_BUS if over_the_bus else num_pieces
    copy_kernel[(min(num_programs, num_pieces),)](
        source,
        target,
        pairs,
        num_pieces,
        num_source_blocks,
        target.shape[2],
        BLOCK_NUMBERS=block_numbers,
        PARTS=parts,
        CHUNK=chunk,
    )


@triton.jit(do_not_specialize=["num_pieces", "num_source_blocks", "num_target_blocks"])
def copy_kernel(
    source,
    target,
    pairs,  # [pairs, 2]
    num_pieces,
    num_source_blocks,
    num_target_blocks,
    BLOCK_NUMBERS: tl.constexpr,  # elements in a block of one layer's keys
    PARTS: tl.constexpr,  # of a block: the keys of each layer, and the values
    CHUNK: tl.constexpr,  # elements, of one part or of several
):
    """Copy every programs-th work item: a chunk of one block."""
    CHUNKS: tl.constexpr = (PARTS * BLOCK_NUMBERS + CHUNK - 1) // CHUNK  # noqa: N806
    for piece in range(tl.program_id(0), num_pieces, tl.num_programs(0)):
        pair = piece // CHUNKS
        numbers = piece % CHUNKS * CHUNK + tl.arange(0, CHUNK)
        mask = numbers < PARTS * BLOCK_NUMBERS
        part = (numbers // BLOCK_NUMBERS).to(tl.int64)
        offset = numbers % BLOCK_NUMBERS
        source_block = part * num_source_blocks + tl.load(pairs + 2 * pair)
        target_block = part * num_target_blocks + tl.load(pairs + 2 * pair + 1)
        copied = tl.load(source + source_block * BLOCK_NUMBERS + offset, mask=mask)
        tl.store(target + target_block * BLOCK_NUMBERS + offset, copied, mask=mask)
