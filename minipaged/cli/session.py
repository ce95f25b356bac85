"""One run of a command: loads the model, draws the block map and records the trace."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live

from minipaged.tracing.block_map import BlockMap
from minipaged.tracing.events import Event, EventLog
from minipaged.tracing.trace_file import TraceFile

if TYPE_CHECKING:
    from minipaged.llm import LLM

FRAME_SECONDS = 0.1  # a step takes a few milliseconds: too fast to watch


class Session:
    """Loads a command's model and attaches its observers: the block map and the trace file.

    To receive events, append to `log.listeners` before `load`: a model without observers is not
    traced. To receive each step's `SchedulerOutput` and statistics, use the engine's listeners.

    Args:
        show_blocks: draw the block map.
        trace: write every event to this file.
        live: redraw after every step, if standard output is a terminal.
    """

    def __init__(self, show_blocks: bool, trace: Path | None, live: bool) -> None:
        self.console = Console()
        self.is_live = live and self.console.is_terminal
        self.seconds_watched = 0.0  # time spent on drawing: subtract it before computing a speed
        self.log = EventLog()
        self.block_map: BlockMap | None = None
        self._show_blocks = show_blocks
        self._trace = None if trace is None else TraceFile(trace)

    def __enter__(self) -> "Session":
        if self._trace is not None:
            self.log.listeners.append(self._trace.write)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._trace is not None:
            self._trace.close(keep=kind is None)

    def load(
        self, options: dict[str, Any], part: list[str] | None = None, is_traced: bool = False
    ) -> "LLM":
        """Build the model with a command's engine options and parts. Raises what `LLM` raises.

        Args:
            options: the engine options.
            part: the custom parts.
            is_traced: trace it even without observers, for listeners that are added later.
        """
        from minipaged.engine.custom_parts import parts_with, read_custom_parts
        from minipaged.llm import LLM

        parts = parts_with(read_custom_parts(part or ()))
        if is_traced or self._show_blocks or self.is_live or self.log.listeners:
            parts = parts.traced(self.log)
        llm = LLM(parts=parts, **options)
        if self._show_blocks:
            self.block_map = BlockMap(llm.engine.scheduler)
            self.log.listeners.append(self.block_map)
        return llm

    @contextmanager
    def watch(self, board: RenderableType | None) -> Generator[None]:
        """Draw block map and board: after every step on a live terminal, else once at the end."""
        drawn = [part for part in (self.block_map, board) if part is not None]
        if self.is_live and drawn:
            with Live(Group(*drawn), console=self.console, auto_refresh=False) as live:
                with self._redrawing(live):
                    yield
                live.refresh()
        else:
            yield
            if board is not None:
                self.console.print(board)
        if self.block_map is not None:
            # Without a board, standard output is reserved for the command's text or JSON.
            console = self.console if board is not None else Console(stderr=True)
            console.print("\nThe pool at its fullest:", self.block_map.fullest(console.width))
            console.print(self.block_map.totals(), highlight=False)

    @contextmanager
    def _redrawing(self, live: Live) -> Generator[None]:
        def redraw(event: Event) -> None:
            if event.event == "schedule":
                start = time.perf_counter()
                live.refresh()
                time.sleep(FRAME_SECONDS)
                self.seconds_watched += time.perf_counter() - start

        self.log.listeners.append(redraw)
        try:
            yield
        finally:
            self.log.listeners.remove(redraw)
