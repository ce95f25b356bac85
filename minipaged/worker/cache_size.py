"""The number of blocks of keys and values that fit in memory."""

import torch

from minipaged.errors import InvalidOption
from minipaged.utils.device import GIB, physical_memory

SWAP_BYTES = 2 * GIB  # of host memory: the largest swap pool that is chosen by default


def blocks_that_fit(
    block_bytes: int,
    device: torch.device,
    gpu_memory_utilization: float,
    num_ranks: int = 1,
    working_bytes: int = 0,
) -> int:
    """The number of blocks of keys and values that fit in memory, after weights are loaded.

    On a GPU: `gpu_memory_utilization` of its memory, minus the memory in use and the
    `working_bytes` of a step (see `warm_up.py`). On a CPU: an eighth of the machine's memory, at
    most 2 GiB, because the swap pool takes as much again and other programs need memory too; the
    ranks on this machine share it. Raises InvalidOption if not even one block fits.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = int(total * gpu_memory_utilization) - (total - free) - working_bytes
    else:
        budget = min(physical_memory() // 8, SWAP_BYTES) // num_ranks
    if budget < block_bytes:
        a_step = f", besides {working_bytes} for a step" if working_bytes else ""
        raise InvalidOption(
            f"a block of keys and values takes {block_bytes} bytes, but only {max(budget, 0)} are "
            f"left{a_step}: raise gpu_memory_utilization, lower "
            f"{'max_num_batched_tokens' if working_bytes else 'block_size'}, or choose a smaller "
            "model.",
            "block_size",
        )
    return budget // block_bytes


def refuse_large_tables(max_num_seqs: int, max_blocks_per_seq: int) -> None:
    """Raise InvalidOption if the block tables of a step alone do not fit in memory."""
    table_bytes, has = 4 * max_num_seqs * max_blocks_per_seq, physical_memory()
    if table_bytes > has:
        raise InvalidOption(
            f"max_num_seqs is {max_num_seqs}: block tables of {max_blocks_per_seq} blocks for that "
            f"many sequences need {table_bytes / GIB:.1f} GiB, but the machine has "
            f"{has / GIB:.1f} GiB. Lower max_num_seqs or max_model_len, or raise block_size.",
            "max_num_seqs",
        )


def refuse_more_than_memory(
    num_blocks: int, num_swap_blocks: int, block_bytes: int, device: torch.device
) -> None:
    """Raise InvalidOption for pools that are larger than the machine's memory.

    Without this check, memory would run out during a run, when the blocks are first used.
    """
    in_host = num_swap_blocks if device.type == "cuda" else num_blocks + num_swap_blocks
    has = physical_memory()
    if in_host * block_bytes > has:
        raise InvalidOption(
            f"num_blocks is {num_blocks} and num_swap_blocks is {num_swap_blocks}: at {block_bytes}"
            f" bytes per block, {in_host} blocks need {in_host * block_bytes / GIB:.1f} GiB, but "
            f"the machine has {has / GIB:.1f} GiB. Give at most {has // block_bytes} in all, "
            "or lower block_size.",
            "num_blocks",
        )
