"""What can be observed: one versioned stream of events, and wrappers that emit it.

An event is one line of JSON:

    {"v": 1, "step": 3, "time": 0.012, "event": "append", "seq": 2, "blocks": [7], "tokens": 33}

    event          fields
    schedule       running, waiting, swapped (request ids); tokens {sequence id: how many}
    admit          request, seqs {sequence id: its blocks}, tokens {sequence id: how many}
    append         seq, blocks (new ones, in order), tokens (how many it has now)
    copy_on_write  seq, pairs [[source, destination], ...]
    fork           parent, child
    swap_out       request, pairs [[pool block, swap block], ...]
    swap_in        request, pairs [[swap block, pool block], ...]
    preempt        request, mode ("swap" or "recompute")
    end            request: it ended for want of memory, with what it had
    free           seq
    allocate, share, release   pool ("pool" or "swap"), block, owners (afterwards)

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

    def admit(self, group: Any) -> None:
        self._inner.admit(group)
        tables = {s.seq_id: self._inner.block_table(s.seq_id) for s in group.unfinished}
        self._log.emit(
            "admit",
            request=group.request_id,
            seqs={seq_id: list(table.blocks) for seq_id, table in tables.items()},
            tokens={seq_id: table.num_tokens for seq_id, table in tables.items()},
        )

    def append(self, seq: Any) -> list[tuple[int, int]]:
        before = len(self._inner.block_table(seq.seq_id).blocks)
        pairs = self._inner.append(seq)
        if pairs:
            self._log.emit("copy_on_write", seq=seq.seq_id, pairs=pairs)
        table = self._inner.block_table(seq.seq_id)
        self._log.emit(
            "append", seq=seq.seq_id, blocks=table.blocks[before:], tokens=table.num_tokens
        )
        return pairs

    def fork(self, parent: Any, child: Any) -> None:
        self._inner.fork(parent, child)
        self._log.emit("fork", parent=parent.seq_id, child=child.seq_id)

    def free(self, seq: Any) -> None:
        self._inner.free(seq)
        self._log.emit("free", seq=seq.seq_id)

    def swap_out(self, group: Any) -> list[tuple[int, int]]:
        pairs = self._inner.swap_out(group)
        self._log.emit("swap_out", request=group.request_id, pairs=pairs)
        return pairs

    def swap_in(self, group: Any) -> list[tuple[int, int]]:
        pairs = self._inner.swap_in(group)
        self._log.emit("swap_in", request=group.request_id, pairs=pairs)
        return pairs


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
