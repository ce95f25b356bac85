"""The data of a live view of the engine: a snapshot, then the events of every step.

    engine thread    events of a step --> Step --> ring of the last steps
    event loop       each viewer: snapshot, then read the ring about ten times per second

The engine neither waits for a viewer nor wakes one: each viewer polls. If a viewer is so slow that
the ring has dropped the next step that it needs, it begins again with a snapshot. Without viewers,
no events are collected.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from minipaged.engine.llm_engine import LLMEngine
from minipaged.engine.metrics import StepStats
from minipaged.engine.outputs import Progress
from minipaged.errors import EngineDead, ServerClosing
from minipaged.scheduler.output import SchedulerOutput
from minipaged.serving.async_engine import AsyncEngine
from minipaged.tracing.events import Event, EventLog
from minipaged.tracing.ring import Ring
from minipaged.tracing.snapshot import snapshot

MOST_EVENTS = 20_000  # in the ring: about 10 MB
SECONDS_TO_LOOK = 0.1  # the page draws no faster
LOOKS_TO_PING = 100  # without news, write a comment: writing to a dead connection fails


@dataclass
class Step:
    """The events of one step, or of an abort between two steps."""

    events: list[Event]
    numbers: dict[str, int]  # the statistics of the step; empty for an abort
    done: list[dict[str, Any]]  # the requests that ended

    @cached_property
    def message(self) -> bytes:
        """The server-sent event, encoded once for all viewers."""
        events = ",".join(event.to_json() for event in self.events)
        rest = json.dumps({**self.numbers, "done": self.done})[1:]
        return f'event: step\ndata: {{"events": [{events}], {rest}\n\n'.encode()


class LiveView:
    """Collects the events of an engine's log and listeners, for any number of viewers.

    Args:
        engine: its parts are `traced` with the log.
        log: has this view as a listener while there are viewers.
    """

    def __init__(self, engine: LLMEngine, log: EventLog) -> None:
        self.num_viewers = 0
        self._engine = engine
        self._log = log
        self._events: list[Event] = []  # of this step; this and the next: engine thread only
        self._numbers: dict[str, int] = {}
        self.ring = Ring[Step](MOST_EVENTS)
        engine.listeners.append(self.note_step)

    # ---- in the engine thread --------------------------------------------------------------------

    def begin(self) -> tuple[Event, int]:
        """A snapshot for a new viewer, and the number of the first step after it.

        Call it between two steps. From now on, events are collected.
        """
        if self._take not in self._log.listeners:
            self._log.listeners.append(self._take)
        now = self._log.stamp("snapshot", snapshot(self._engine.scheduler))
        return now, self.ring.next

    def note_step(self, decision: SchedulerOutput, stats: StepStats) -> None:
        """A listener of the engine."""
        self._numbers = {
            "sequences": stats.num_sequences,
            "sampled": sum(scheduled.samples for scheduled in decision.sequences),
            "blocks": stats.num_blocks_in_use,
        }

    def note_progress(self, progresses: Sequence[Progress]) -> None:
        """Note the end of a step or of an abort, with the requests that advanced or ended."""
        if self.num_viewers > 0:
            done = [_ending(progress) for progress in progresses if progress.finished]
            self.ring.add(Step(self._events, self._numbers, done), len(self._events) + 1)
        elif self._take in self._log.listeners:
            self._log.listeners.remove(self._take)
            self.ring.clear()
        self._events, self._numbers = [], {}

    def _take(self, event: Event) -> None:
        self._events.append(event)

    # ---- in the event loop -----------------------------------------------------------------------

    async def messages(self, engine: AsyncEngine) -> AsyncGenerator[bytes]:
        """Server-sent events for one viewer, until the engine ends."""
        self.num_viewers += 1
        try:
            while not engine.has_ended:
                now, place = await engine.between_steps(self.begin)
                yield f"retry: 1000\nevent: snapshot\ndata: {now.to_json()}\n\n".encode()
                num_looks = 0
                while not engine.has_ended and (steps := self.ring.since(place)) is not None:
                    num_looks = 0 if steps else num_looks + 1
                    place += len(steps)
                    if steps:
                        yield b"".join(step.message for step in steps)
                    elif num_looks % LOOKS_TO_PING == 0:
                        yield b": still here\n\n"
                    await asyncio.sleep(SECONDS_TO_LOOK)
        except (EngineDead, ServerClosing):
            pass  # the engine has logged the first, the second is wanted; the page connects again
        finally:
            self.num_viewers -= 1


def _ending(progress: Progress) -> dict[str, Any]:
    """Describe for the page how a request ended."""
    output = progress.build_output()
    times = output.metrics
    end = times.finished_time
    return {
        "request_id": progress.request_id,
        "reason": next((each.finish_reason for each in output.outputs), None) or "error",
        "prompt_tokens": len(output.prompt_token_ids),
        "output_tokens": sum(len(each.token_ids) for each in output.outputs),
        "ttft": times.first_token_latency,
        "seconds": None if end is None else end - times.arrival_time,
    }
