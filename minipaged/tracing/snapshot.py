"""Queues, block tables and blocks at one moment, as one event: a view may begin in mid-run."""

from typing import Any

from minipaged.scheduler.interface import Scheduler


def snapshot(scheduler: Scheduler) -> dict[str, Any]:
    """The fields of a `snapshot` event, for use between two steps.

    A trace of the rest of a run begins with one:

        log.listeners.append(file.write)
        log.emit("snapshot", **snapshot(engine.scheduler))
    """
    memory = scheduler.memory
    queues = {
        "running": scheduler.running,
        "waiting": scheduler.waiting,
        "swapped": scheduler.swapped,
    }
    groups = [group for queue in queues.values() for group in queue]
    request_of = {seq.seq_id: group.request_id for group in groups for seq in group.sequences}
    tables = {seq_id: list(table.blocks) for seq_id, table in memory.tables.items()}
    pool: dict[int, int] = {}
    swap_pool: dict[int, int] = {}
    if not memory.reserves:  # without paging there is no allocator that counts
        cached = memory.cached
        pool = {b: memory.ref_count(b) + (b in cached) for b in range(memory.num_blocks)}
        swap_pool = {b: memory.swap_ref_count(b) for b in range(memory.num_swap_blocks)}
    return {
        "num_blocks": memory.num_blocks,
        "num_swap_blocks": memory.num_swap_blocks,
        "block_size": memory.block_size,
        **{name: [group.request_id for group in queue] for name, queue in queues.items()},
        "request_ids": {seq_id: request_of[seq_id] for seq_id in tables if seq_id in request_of},
        "block_tables": {s: blocks for s, blocks in tables.items() if not memory.is_swapped(s)},
        "swap_block_tables": {s: blocks for s, blocks in tables.items() if memory.is_swapped(s)},
        "num_tokens": {seq_id: table.num_tokens for seq_id, table in memory.tables.items()},
        "cached": list(memory.cached),
        "ref_counts": {block: count for block, count in pool.items() if count},
        "swap_ref_counts": {block: count for block, count in swap_pool.items() if count},
    }
