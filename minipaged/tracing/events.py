"""What can be observed: one versioned stream of events, and wrappers that emit it.

An event is one line of JSON:

    {"v": 1, "step": 3, "time": 0.012, "event": "append", "seq": 2, "blocks": [7], "tokens": 33}

    event          fields
    pool           num_blocks, num_swap_blocks, block_size: a memory was built, all of it free
    schedule       running, waiting, swapped (request ids); tokens {sequence id: how many}
    admit          request, seqs {sequence id: its blocks}, tokens {sequence id: how many},
                   found {sequence id: how many of them the prefix cache held}
    append         seq, blocks (new ones, in order), tokens (how many it has now)
    copy_on_write  seq, pairs [[source, destination], ...]
    fork           parent, child, tokens (how many of the parent's the child begins with)
    swap_out       request, seqs, pairs [[pool block, swap block], ...]
    swap_in        request, seqs, pairs [[swap block, pool block], ...]: those that were copied
    cache          seq, blocks: they are written, and can be found from now on
    merge          seq, pairs [[its block, an equal one that was known before and takes its place]]
    evict          block: it was given up for somebody else, and cannot be found any more
    pin            seq, blocks: they stay until it is freed
    preempt        request, mode ("swap" or "recompute")
    end            request: it ended for want of memory, with what it had
    free           seq
    allocate, share, release   pool ("pool" or "swap"), block, owners (afterwards; the prefix cache
                   is one of them)

Whoever reads events passes over those that it does not know: more kinds may come.

Nothing in scheduler, memory or allocator knows about this file: each is observed from outside, so a
part of your own is traced like the library's.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Event:
    """One thing that happened: the step, the time (seconds since the log began), its fields."""

    event: str
    step: int
    time: float
    fields: dict[str, Any]

    def to_json(self) -> str:
        head = {"v": SCHEMA_VERSION, "step": self.step, "time": round(self.time, 6)}
        return json.dumps({**head, "event": self.event, **self.fields})


class EventLog:
    """Stamps events with step and time and hands each to its listeners.

    Listeners are functions of one Event: append it to a list, write `event.to_json()` to a file,
    redraw a picture.
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
        stamped = Event(event, self.step, self._clock() - self._start, fields)
        for listener in self.listeners:
            listener(stamped)


class _Wrapper:
    """Passes on everything that a subclass does not watch."""

    def __init__(self, inner: Any, log: EventLog) -> None:
        self._inner = inner
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class TracedAllocator(_Wrapper):
    """Any allocator, observed."""

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
        self._log.emit(event, pool=self._pool, block=block, owners=self._inner.ref_count(block))


class TracedMemory(_Wrapper):
    """Any memory, observed."""

    def __init__(self, inner: Any, log: EventLog) -> None:
        super().__init__(inner, log)
        self._findable: set[int] = set()

    def admit(self, group: Any) -> Any:
        admission = self._inner.admit(group)
        seqs = self._tables(group)
        self._note_evictions(seqs)
        self._log.emit(
            "admit",
            request=group.request_id,
            seqs=seqs,
            tokens={s.seq_id: s.num_tokens for s in group.sequences},
            found={
                seq.seq_id: cached
                for seq, cached in zip(group.sequences, admission.num_cached_tokens, strict=True)
            },
        )
        for source, target in admission.copies:
            seq_id = next(seq_id for seq_id, blocks in seqs.items() if target in blocks)
            self._log.emit("copy_on_write", seq=seq_id, pairs=[(source, target)])
        return admission

    def append(self, seq: Any) -> list[tuple[int, int]]:
        before = len(self._inner.tables[seq.seq_id].blocks)
        pairs = self._inner.append(seq)
        table = self._inner.tables[seq.seq_id]
        self._note_evictions({seq.seq_id: table.blocks})
        if pairs:
            self._log.emit("copy_on_write", seq=seq.seq_id, pairs=pairs)
        self._log.emit(
            "append", seq=seq.seq_id, blocks=table.blocks[before:], tokens=table.num_tokens
        )
        return pairs

    def fork(self, parent: Any, child: Any) -> None:
        self._inner.fork(parent, child)
        tokens = self._inner.tables[child.seq_id].num_tokens
        self._log.emit("fork", parent=parent.seq_id, child=child.seq_id, tokens=tokens)

    def free(self, seq: Any) -> None:
        self._inner.free(seq)
        self._log.emit("free", seq=seq.seq_id)

    def swap_out(self, group: Any) -> list[tuple[int, int]]:
        pairs = self._inner.swap_out(group)
        self._log.emit("swap_out", request=group.request_id, seqs=self._tables(group), pairs=pairs)
        return pairs

    def swap_in(self, group: Any) -> list[tuple[int, int]]:
        pairs = self._inner.swap_in(group)
        seqs = self._tables(group)
        self._note_evictions(seqs)
        self._log.emit("swap_in", request=group.request_id, seqs=seqs, pairs=pairs)
        return pairs

    def cache_blocks(self, seq: Any) -> list[int]:
        before = list(self._inner.tables[seq.seq_id].blocks)
        blocks = self._inner.cache_blocks(seq)
        after = self._inner.tables[seq.seq_id].blocks
        merged = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
        if merged:
            self._log.emit("merge", seq=seq.seq_id, pairs=merged)
        if blocks:
            self._findable.update(blocks)
            self._log.emit("cache", seq=seq.seq_id, blocks=blocks)
        return blocks

    def pin(self, seq: Any) -> int:
        num_tokens = self._inner.pin(seq)
        blocks = list(self._inner.tables[seq.seq_id].blocks)
        self._log.emit("pin", seq=seq.seq_id, blocks=blocks)
        return num_tokens

    def _tables(self, group: Any) -> dict[int, list[int]]:
        return {s.seq_id: list(self._inner.tables[s.seq_id].blocks) for s in group.sequences}

    def _note_evictions(self, seqs: dict[int, list[int]]) -> None:
        # A block is given up only when somebody takes it, so it stands in one of these tables.
        for block in {block for blocks in seqs.values() for block in blocks}:
            if block in self._findable and block not in self._inner.cached:
                self._findable.remove(block)
                self._log.emit("evict", block=block)


class TracedScheduler(_Wrapper):
    """Any scheduler, observed. Its steps number the events."""

    def schedule(self) -> Any:
        self._log.step += 1
        plan = self._inner.schedule()
        for group in plan.preempted:
            mode = "swap" if group.status.name == "SWAPPED" else "recompute"
            self._log.emit("preempt", request=group.request_id, mode=mode)
        for group in plan.ended:
            self._log.emit("end", request=group.request_id)
        self._log.emit(
            "schedule",
            running=[g.request_id for g in self._inner.running],
            waiting=[g.request_id for g in self._inner.waiting],
            swapped=[g.request_id for g in self._inner.swapped],
            tokens={s.seq.seq_id: s.num_new_tokens for s in plan.sequences},
        )
        return plan
