"""One versioned stream of events that describes a run, and the wrappers that emit it.

An event is one line of JSON:

    {"v": 2, "step": 3, "time": 0.012, "event": "fork", "parent": 0, "child": 1, "num_tokens": 9}

    event          when, and its fields

    init           a memory was built, and all of its blocks are free:
                   num_blocks, num_swap_blocks, block_size
    schedule       the scheduler has decided a step:
                   running, waiting, swapped (the queues, as request ids),
                   num_scheduled_tokens {sequence id: tokens that the step computes}
    ranks          several ranks have computed the step: num_all_reduces, spans; by rank, in whole
                   microseconds of its own clock:
                   message (rank 0 sends it; the others wait for it, also between two steps),
                   all_reduce [...], gather (of the logits),
                   compute [before each all-reduce, before the gather, after it];
                   If there are many all-reduces, adjacent ones are added up, and so are the compute
                   times before them. A rank computes from the moment when its message is sent or
                   has arrived. On GPUs, these are times of the host, which does not wait for the
                   device
    admit          a waiting request got its blocks:
                   request_id, block_tables {sequence id: its blocks},
                   num_tokens {sequence id: its tokens},
                   num_cached_tokens {sequence id: tokens that were found in the prefix cache}
    append         a running sequence got slots for its next tokens:
                   seq_id, blocks (the new ones, in order), num_tokens (including the new ones)
    copy_on_write  a sequence is about to write to shared blocks:
                   seq_id, pairs [[shared block, the copy that replaces it], ...]
    fork           a sequence got a child, which shares its blocks:
                   parent, child (sequence ids), num_tokens (that the two have in common)
    cache          the prefix cache can find these blocks from now on: seq_id, blocks
    deduplicate    a sequence computed blocks that were cached already, and uses those instead:
                   seq_id, pairs [[its own block, the cached one], ...]
    evict          a block left the prefix cache, because it is needed for something else: block
    pin            a prefix was pinned, and keeps its blocks until it is freed: seq_id, blocks
    preempt        a request was preempted: request_id, mode ("swap" or "recompute")
    swap_out       its blocks moved to the swap pool:
                   request_id, block_tables, pairs [[pool block, swap block], ...]
    swap_in        its blocks moved back; blocks that are still cached need no copy:
                   request_id, block_tables, pairs [[swap block, pool block], ...]
    out_of_memory  a request ended early, because the pool can never hold its next token: request_id
    free           the blocks of a sequence or a pinned prefix were freed: seq_id
    snapshot       the complete state, from which a reader can continue without earlier events:
                   num_blocks, num_swap_blocks, block_size, running, waiting, swapped,
                   request_ids {sequence id: its request}; a pinned prefix has none,
                   block_tables, swap_block_tables (of sequences that are swapped out), num_tokens,
                   cached (the blocks that the prefix cache can find),
                   ref_counts, swap_ref_counts {block: its owners, unless 0}
    allocate, share, release
                   one block got its first owner, one more owner, one owner fewer:
                   pool ("pool" or "swap"), block, ref_count (the owners it has now; the prefix
                   cache is one of them)

A reader should ignore events that it does not know: later versions may add some. A change to the
fields above raises SCHEMA_VERSION, and traces of another version are refused, as are invalid fields
(`event_check`).

Scheduler, memory, allocators and executor contain no code for events. Wrappers observe them from
outside, so a custom part is traced like the library's own. An engine that is not traced has no
wrappers.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from minipaged.tracing.rank_spans import rank_spans

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Event:
    """One event: its step, its time in seconds since the log began, its fields."""

    event: str
    step: int
    time: float
    fields: dict[str, Any]

    def to_json(self) -> str:
        head = {"v": SCHEMA_VERSION, "step": self.step, "time": round(self.time, 6)}
        return json.dumps({**head, "event": self.event, **self.fields})


class EventLog:
    """Stamps every event with step and time, and calls the listeners with it.

    A listener is a function of one Event. It may append the event to a list, write
    `event.to_json()` to a file, or redraw a picture. Without listeners, events are dropped.
    """

    def __init__(
        self,
        *listeners: Callable[[Event], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.listeners = list(listeners)
        self.step = 0
        self._clock = clock
        self._start = clock()

    def emit(self, event: str, **fields: Any) -> None:
        if not self.listeners:
            return
        stamped = self.stamp(event, fields)
        for listener in self.listeners:
            listener(stamped)

    def stamp(self, event: str, fields: dict[str, Any]) -> Event:
        """Return an event with the present step and time, without calling listeners."""
        return Event(event, self.step, self._clock() - self._start, fields)


class _Wrapper:
    """Forwards everything that a subclass does not override."""

    def __init__(self, inner: Any, log: EventLog) -> None:
        self._inner = inner
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class TracedAllocator(_Wrapper):
    """Emits the events of an allocator."""

    def __init__(self, inner: Any, log: EventLog, pool: str) -> None:
        super().__init__(inner, log)
        self._pool = pool

    def allocate(self) -> int:
        block = self._inner.allocate()
        self._emit("allocate", block)
        return block

    def share(self, block: int) -> None:
        self._inner.share(block)
        self._emit("share", block)

    def free(self, block: int) -> None:
        self._inner.free(block)
        self._emit("release", block)

    def _emit(self, event: str, block: int) -> None:
        if self._log.listeners:
            count = self._inner.ref_count(block)
            self._log.emit(event, pool=self._pool, block=block, ref_count=count)


class TracedMemory(_Wrapper):
    """Emits the events of a memory."""

    def __init__(self, inner: Any, log: EventLog) -> None:
        super().__init__(inner, log)
        self._cached: set[int] = set()  # to notice which blocks are evicted

    def admit(self, group: Any) -> Any:
        admission = self._inner.admit(group)
        seq_ids = [seq.seq_id for seq in group.sequences]
        tables = self._block_tables(group)
        self._emit_evictions(block for blocks in tables.values() for block in blocks)
        self._log.emit(
            "admit",
            request_id=group.request_id,
            block_tables=tables,
            num_tokens={s.seq_id: s.num_tokens for s in group.sequences},
            num_cached_tokens=dict(zip(seq_ids, admission.num_cached_tokens, strict=True)),
        )
        for source, target in admission.copies:
            seq_id = next(seq_id for seq_id, blocks in tables.items() if target in blocks)
            self._log.emit("copy_on_write", seq_id=seq_id, pairs=[(source, target)])
        return admission

    def append(self, seq: Any) -> list[tuple[int, int]]:
        before = len(self._inner.tables[seq.seq_id].blocks)
        pairs = self._inner.append(seq)
        table = self._inner.tables[seq.seq_id]
        self._emit_evictions([*table.blocks[before:], *(copy for _, copy in pairs)])
        if pairs:
            self._log.emit("copy_on_write", seq_id=seq.seq_id, pairs=pairs)
        self._log.emit(
            "append", seq_id=seq.seq_id, blocks=table.blocks[before:], num_tokens=table.num_tokens
        )
        return pairs

    def fork(self, parent: Any, child: Any) -> None:
        self._inner.fork(parent, child)
        num_tokens = self._inner.tables[child.seq_id].num_tokens
        self._log.emit("fork", parent=parent.seq_id, child=child.seq_id, num_tokens=num_tokens)

    def free(self, seq: Any) -> None:
        self._inner.free(seq)
        self._log.emit("free", seq_id=seq.seq_id)

    def swap_out(self, group: Any) -> list[tuple[int, int]]:
        pairs = self._inner.swap_out(group)
        tables = self._block_tables(group)
        self._log.emit("swap_out", request_id=group.request_id, block_tables=tables, pairs=pairs)
        return pairs

    def swap_in(self, group: Any) -> list[tuple[int, int]]:
        pairs = self._inner.swap_in(group)
        tables = self._block_tables(group)
        self._emit_evictions(block for blocks in tables.values() for block in blocks)
        self._log.emit("swap_in", request_id=group.request_id, block_tables=tables, pairs=pairs)
        return pairs

    def cache_blocks(self, seq: Any) -> list[int]:
        table = self._inner.tables[seq.seq_id]
        start = table.num_cached_blocks  # those before it stay as they are
        before = table.blocks[start:]
        blocks = self._inner.cache_blocks(seq)
        after = table.blocks[start:]
        replaced = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
        if replaced:
            self._log.emit("deduplicate", seq_id=seq.seq_id, pairs=replaced)
        if blocks:
            self._cached.update(blocks)
            self._log.emit("cache", seq_id=seq.seq_id, blocks=blocks)
        return blocks

    def pin(self, seq: Any) -> int:
        num_tokens = self._inner.pin(seq)
        blocks = list(self._inner.tables[seq.seq_id].blocks)
        self._log.emit("pin", seq_id=seq.seq_id, blocks=blocks)
        return num_tokens

    def _block_tables(self, group: Any) -> dict[int, list[int]]:
        return {s.seq_id: list(self._inner.tables[s.seq_id].blocks) for s in group.sequences}

    def _emit_evictions(self, allocated: Iterable[int]) -> None:
        # A block is evicted only to be allocated at once, so only these can be missing.
        for block in self._cached.intersection(allocated):
            if block not in self._inner.cached:
                self._cached.remove(block)
                self._log.emit("evict", block=block)


class TracedScheduler(_Wrapper):
    """Emits the events of a scheduler, and counts its steps."""

    def schedule(self) -> Any:
        self._log.step += 1
        decision = self._inner.schedule()
        for group in decision.preempted:
            mode = "swap" if group.status.name == "SWAPPED" else "recompute"
            self._log.emit("preempt", request_id=group.request_id, mode=mode)
        for group in decision.ended:
            self._log.emit("out_of_memory", request_id=group.request_id)
        self._log.emit(
            "schedule",
            running=[g.request_id for g in self._inner.running],
            waiting=[g.request_id for g in self._inner.waiting],
            swapped=[g.request_id for g in self._inner.swapped],
            num_scheduled_tokens={s.seq.seq_id: s.num_new_tokens for s in decision.sequences},
        )
        return decision


class TracedExecutor(_Wrapper):
    """Emits the events of a `MultiExecutor`. Without a listener, ranks send no times."""

    def run(self, step: Any) -> Any:
        self._inner.is_traced = bool(self._log.listeners)
        logits = self._inner.run(step)
        if self._inner.is_traced:
            self._log.emit("ranks", **rank_spans(self._inner.spans))
        return logits
