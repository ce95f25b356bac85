"""What the command line draws and writes while a model runs, all of it from the event stream."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from minipaged.events import Event, EventLog

if TYPE_CHECKING:
    from minipaged.llm import LLM

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta")
COLUMNS = 64
MAX_ROWS = 12
FRAME_SECONDS = 0.05  # a step takes a few milliseconds: slowed down, a person can watch it


@dataclass
class _Holder:
    """One sequence that holds blocks."""

    request: str
    blocks: list[int]
    num_tokens: int
    swapped: bool = False


class BlockMap:
    """The pool as a picture: a character a block, a colour a request.

    A full block is drawn as a bar, one that is being filled as half a bar, a free one as a dot, and
    one that several sequences share as the number of its owners.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.step = 0
        self.fullest: Text | None = None
        self._most_used = 0
        self._reach = 0  # one more than the highest block used so far: those behind are not drawn
        self._holders: dict[int, _Holder] = {}  # by sequence id
        self._queues: dict[str, list[str]] = {"running": [], "waiting": [], "swapped": []}

    def __call__(self, event: Event) -> None:
        """Listen to one event."""
        self.step = event.step
        listen = getattr(self, f"_on_{event.event}", None)
        if listen is not None:
            listen(**event.fields)

    # ---- the events that change the picture ------------------------------------------------------

    def _on_admit(self, request: str, seqs: dict[int, list[int]], tokens: dict[int, int]) -> None:
        for seq_id, blocks in seqs.items():
            self._holders[seq_id] = _Holder(request, list(blocks), tokens[seq_id])

    def _on_append(self, seq: int, blocks: list[int], tokens: int) -> None:
        if seq in self._holders:  # an append within an admission is part of its event
            self._holders[seq].blocks += blocks
            self._holders[seq].num_tokens = tokens

    def _on_copy_on_write(self, seq: int, pairs: list[tuple[int, int]]) -> None:
        self._replace(seq, dict(pairs))

    def _on_fork(self, parent: int, child: int) -> None:
        source = self._holders[parent]
        self._holders[child] = _Holder(source.request, list(source.blocks), source.num_tokens)

    def _on_free(self, seq: int) -> None:
        self._holders.pop(seq, None)

    def _on_swap_out(self, request: str, pairs: list[tuple[int, int]]) -> None:
        self._swap(request, dict(pairs), swapped=True)

    def _on_swap_in(self, request: str, pairs: list[tuple[int, int]]) -> None:
        self._swap(request, dict(pairs), swapped=False)

    def _on_schedule(self, tokens: dict[int, int], **queues: list[str]) -> None:
        self._queues = queues
        used = {b for h in self._in_pool() for b in h.blocks}
        self._reach = max([self._reach, *(b + 1 for b in used)])
        if len(used) > self._most_used:
            self._most_used = len(used)
            self.fullest = self.picture()

    def _swap(self, request: str, moved: dict[int, int], swapped: bool) -> None:
        for seq_id, holder in self._holders.items():
            if holder.request == request:
                self._replace(seq_id, moved)
                holder.swapped = swapped

    def _replace(self, seq_id: int, moved: dict[int, int]) -> None:
        holder = self._holders[seq_id]
        holder.blocks = [moved.get(block, block) for block in holder.blocks]

    # ---- drawing ---------------------------------------------------------------------------------

    def _in_pool(self) -> list[_Holder]:
        return [holder for holder in self._holders.values() if not holder.swapped]

    def picture(self) -> Text:
        """The pool now, with a line above that says what is going on."""
        owners: dict[int, list[tuple[_Holder, int]]] = {}
        for holder in self._in_pool():
            for logical, block in enumerate(holder.blocks):
                filled = min(self.block_size, holder.num_tokens - logical * self.block_size)
                owners.setdefault(block, []).append((holder, filled))
        used = sum(max(filled for _, filled in held) for held in owners.values())
        text = Text(self._headline(len(owners), used))
        shown = min(self._reach, COLUMNS * MAX_ROWS)
        for block in range(shown):
            if block % COLUMNS == 0:
                text.append(f"\n{block:>6} ", style="dim")
            text.append_text(self._cell(owners.get(block, [])))
        if shown < self.num_blocks:
            text.append(f"\n       and {self.num_blocks - shown} blocks more", style="dim")
        return text

    def _cell(self, held: list[tuple[_Holder, int]]) -> Text:
        if not held:
            return Text("·", style="dim")
        holder, filled = held[0]
        style = COLOURS[int(holder.request) % len(COLOURS)] if holder.request.isdigit() else "cyan"
        if len(held) > 1:
            return Text(str(min(len(held), 9)), style=f"{style} reverse")
        return Text("█" if filled == self.block_size else "▌", style=style)

    def _headline(self, num_held: int, num_filled: int) -> str:
        slots = num_held * self.block_size
        filled = f", {num_filled / slots:.0%} of their slots filled" if slots else ""
        queues = ", ".join(f"{len(names)} {queue}" for queue, names in self._queues.items())
        return (
            f"step {self.step}: {queues}; {num_held} of {self.num_blocks} blocks of "
            f"{self.block_size} in use{filled}"
        )

    def __rich__(self) -> Group:
        return Group(self.picture())


class Session:
    """One run of a command: its model, with its parts observed where something is to be shown.

    Args:
        show_blocks: draw the block map.
        trace: write every event to this file. It is written beside its place and renamed at the
            end, so that it is whole or absent.
        live: draw after every step, if standard output is a terminal.
    """

    def __init__(self, show_blocks: bool, trace: Path | None, live: bool) -> None:
        self.console = Console()
        self._show_blocks = show_blocks
        self._trace = trace
        self._live = live and self.console.is_terminal
        self._log = EventLog()
        self._map: BlockMap | None = None

    def __enter__(self) -> "Session":
        if self._trace is not None:
            self._part = self._trace.with_name(self._trace.name + ".part")
            self._file = self._part.open("w", encoding="utf-8")
            self._log.listeners.append(lambda event: print(event.to_json(), file=self._file))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._trace is not None:
            self._file.close()
            if kind is None:
                self._part.replace(self._trace)
            else:
                self._part.unlink()

    def load(self, **options: Any) -> "LLM":
        """The model, with whatever options the command has; raises what `LLM` raises."""
        from minipaged.llm import LLM
        from minipaged.parts import Parts

        observed = self._show_blocks or self._live or self._trace is not None
        llm = LLM(parts=Parts().traced(self._log) if observed else Parts(), **options)
        if self._show_blocks:
            memory = llm.engine.scheduler.memory
            self._map = BlockMap(memory.num_blocks, memory.block_size)
            self._log.listeners.append(self._map)
        return llm

    @contextmanager
    def watch(self, board: RenderableType | None) -> Generator[None]:
        """Draw board and block map step by step, or once at the end where nobody watches."""
        drawn = [part for part in (board, self._map) if part is not None]
        if self._live and drawn:
            with Live(Group(*drawn), console=self.console, auto_refresh=False) as live:
                with self._redrawing(live):
                    yield
                live.refresh()
        else:
            yield
            if board is not None:
                self.console.print(board)
        if self._map is not None and self._map.fullest is not None:
            # Where standard output is for machines or for text, the picture goes beside it.
            console = self.console if board is not None else Console(stderr=True)
            console.print("\nThe pool at its fullest:", self._map.fullest)

    @contextmanager
    def _redrawing(self, live: Live) -> Generator[None]:
        def redraw(event: Event) -> None:
            if event.event == "schedule":
                live.refresh()
                time.sleep(FRAME_SECONDS)

        self._log.listeners.append(redraw)
        try:
            yield
        finally:
            self._log.listeners.remove(redraw)
