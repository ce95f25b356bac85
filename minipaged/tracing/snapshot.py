"""The state of queues, block tables and blocks as one event, to begin a view during a run."""

from typing import Any

from minipaged.scheduler.interface import Scheduler


def snapshot(scheduler: Scheduler) -> dict[str, Any]:
    """Return the fields of a `snapshot` event. Call it between two steps.

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
    in_swap = {seq_id for seq_id in tables if memory.is_swapped(seq_id)}
    cached = memory.cached
    ref_counts: dict[int, int] = {}
    swap_ref_counts: dict[int, int] = {}
    if not memory.reserves:  # without paging there is no allocator that counts
        held = {block for seq_id in tables.keys() - in_swap for block in tables[seq_id]}
        ref_counts = {b: memory.ref_count(b) + (b in cached) for b in held | cached.keys()}
        swapped = {block for seq_id in in_swap for block in tables[seq_id]}
        swap_ref_counts = {b: memory.swap_ref_count(b) for b in swapped}
    return {
        "num_blocks": memory.num_blocks,
        "num_swap_blocks": memory.num_swap_blocks,
        "block_size": memory.block_size,
        **{name: [group.request_id for group in queue] for name, queue in queues.items()},
        "request_ids": {seq_id: request_of[seq_id] for seq_id in tables if seq_id in request_of},
        "block_tables": {s: blocks for s, blocks in tables.items() if s not in in_swap},
        "swap_block_tables": {s: tables[s] for s in in_swap},
        "num_tokens": {seq_id: table.num_tokens for seq_id, table in memory.tables.items()},
        "cached": list(cached),
        "ref_counts": ref_counts,
        "swap_ref_counts": swap_ref_counts,
    }
