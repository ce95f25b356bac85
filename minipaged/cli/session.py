"""What the command line draws while a model runs, all of it from the event stream."""

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

FRAME_SECONDS = 0.1  # a step takes a few milliseconds: slowed down, a person can watch it


class Session:
    """One run of a command: its model, with its parts observed where something is to be shown.

    Args:
        show_blocks: draw the block map.
        trace: write every event to this file.
        live: draw after every step, if standard output is a terminal.
    """

    def __init__(self, show_blocks: bool, trace: Path | None, live: bool) -> None:
        self.console = Console()
        self.is_live = live and self.console.is_terminal
        self.seconds_watched = 0.0  # in which nothing was computed, so that a person could look
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

    def load(self, swap: list[str] | None = None, **options: Any) -> "LLM":
        """The model, with whatever options the command has; raises what `LLM` raises."""
        from minipaged.engine.custom_parts import parts_with, read_custom_parts
        from minipaged.llm import LLM

        parts = parts_with(read_custom_parts(swap or ()))
        observed = self._show_blocks or self.is_live or self._trace is not None
        llm = LLM(parts=parts.traced(self.log) if observed else parts, **options)
        if self._show_blocks:
            memory = llm.engine.scheduler.memory
            self.block_map = BlockMap(memory.num_blocks, memory.block_size)
            self.log.listeners.append(self.block_map)
        return llm

    @contextmanager
    def watch(self, board: RenderableType | None) -> Generator[None]:
        """Draw block map and board step by step, or once at the end where nobody watches."""
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
            # Where standard output is for machines or for text, the picture goes beside it.
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
