"""What the command line draws and writes while a model runs, all of it from the event stream."""

import stat
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.text import Text

from minipaged.errors import InvalidOption
from minipaged.events import Event, EventLog

if TYPE_CHECKING:
    from minipaged.llm import LLM

COLOURS = ("cyan", "magenta", "green", "blue", "red", "bright_blue", "bright_magenta", "bright_red")
LEGEND = "A: full block of request A   a: its last, filling   2: shared by two   ·: free"
MAX_COLUMNS = 64
MAX_ROWS = 12
FRAME_SECONDS = 0.1  # a step takes a few milliseconds: slowed down, a person can watch it


def letter(number: int) -> Text:
    """The letter and colour of a request, by the order of admission."""
    return Text(chr(ord("A") + number % 26), style=COLOURS[number % len(COLOURS)])


@dataclass
class _Holder:
    """One sequence that holds blocks."""

    request: str
    blocks: list[int]
    num_tokens: int
    swapped: bool = False


@dataclass(frozen=True)
class _Owned:
    """One block of the pool: whose it is, how many own it, how full it is."""

    request: str
    num_owners: int
    num_filled: int


class BlockMap:
    """The pool as a picture, a letter a block; see LEGEND."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.step = 0
        self._reach = 0  # one more than the highest block used so far
        self._numbers: dict[str, int] = {}  # of requests, in order of admission
        self._holders: dict[int, _Holder] = {}  # by sequence id
        self._queues: dict[str, list[str]] = {"running": [], "waiting": [], "swapped": []}
        self._fullest: tuple[str, dict[int, _Owned]] = ("", {})

    def __call__(self, event: Event) -> None:
        """Listen to one event."""
        self.step = event.step
        listen = getattr(self, f"_on_{event.event}", None)
        if listen is not None:
            listen(**event.fields)

    # ---- the events that change the picture ------------------------------------------------------

    def _on_admit(self, request: str, seqs: dict[int, list[int]], tokens: dict[int, int]) -> None:
        self._numbers.setdefault(request, len(self._numbers))
        for seq_id, blocks in seqs.items():
            self._holders[seq_id] = _Holder(request, list(blocks), tokens[seq_id])

    def _on_append(self, seq: int, blocks: list[int], tokens: int) -> None:
        self._holders[seq].blocks += blocks
        self._holders[seq].num_tokens = tokens

    def _on_copy_on_write(self, seq: int, pairs: list[tuple[int, int]]) -> None:
        self._replace(seq, dict(pairs))

    def _on_fork(self, parent: int, child: int) -> None:
        source = self._holders[parent]
        self._holders[child] = _Holder(source.request, list(source.blocks), source.num_tokens)

    def _on_free(self, seq: int) -> None:
        holder = self._holders.pop(seq)
        if not any(other.request == holder.request for other in self._holders.values()):
            for queue, requests in self._queues.items():
                self._queues[queue] = [r for r in requests if r != holder.request]

    def _on_swap_out(self, request: str, pairs: list[tuple[int, int]]) -> None:
        self._swap(request, dict(pairs), swapped=True)

    def _on_swap_in(self, request: str, pairs: list[tuple[int, int]]) -> None:
        self._swap(request, dict(pairs), swapped=False)

    def _on_schedule(self, tokens: dict[int, int], **queues: list[str]) -> None:
        self._queues = queues
        owned = self._owned()
        self._reach = max([self._reach, *(block + 1 for block in owned)])
        if len(owned) > len(self._fullest[1]):
            self._fullest = (self._headline(owned), owned)

    def _swap(self, request: str, moved: dict[int, int], swapped: bool) -> None:
        for seq_id, holder in self._holders.items():
            if holder.request == request:
                self._replace(seq_id, moved)
                holder.swapped = swapped

    def _replace(self, seq_id: int, moved: dict[int, int]) -> None:
        holder = self._holders[seq_id]
        holder.blocks = [moved.get(block, block) for block in holder.blocks]

    # ---- drawing ---------------------------------------------------------------------------------

    def _owned(self) -> dict[int, _Owned]:
        owned: dict[int, _Owned] = {}
        for holder in self._holders.values():
            for logical, block in enumerate([] if holder.swapped else holder.blocks):
                filled = min(self.block_size, holder.num_tokens - logical * self.block_size)
                others = owned[block].num_owners if block in owned else 0
                owned[block] = _Owned(holder.request, others + 1, filled)
        return owned

    def picture(self, width: int = MAX_COLUMNS + 8) -> Text:
        """The pool now, below a line that says what is going on."""
        owned = self._owned()
        return self._draw(self._headline(owned), owned, width)

    def fullest(self, width: int = MAX_COLUMNS + 8) -> Text:
        """The pool when most of its blocks were in use."""
        headline, owned = self._fullest
        return self._draw(headline, owned, width)

    def _draw(self, headline: str, owned: dict[int, _Owned], width: int) -> Text:
        text = Text(f"{headline}\n{LEGEND}")
        text.stylize("dim", len(headline))
        columns = max(8, min(MAX_COLUMNS, width - 8))
        room = columns * MAX_ROWS
        shown = self.num_blocks if self.num_blocks <= room else min(self._reach, room)
        for block in range(shown):
            if block % columns == 0:
                text.append(f"\n{block:>6} ", style="dim")
            text.append_text(self._cell(owned.get(block)))
        hidden = self.num_blocks - shown
        if hidden:
            text.append(f"\n       and {hidden} more", style="dim")
        return text

    def _cell(self, owned: _Owned | None) -> Text:
        if owned is None:
            return Text("·", style="dim")
        sign = letter(self._numbers[owned.request])
        if owned.num_owners > 1:
            return Text(str(min(owned.num_owners, 9)), style=sign.style)
        return sign if owned.num_filled == self.block_size else Text(sign.plain.lower(), sign.style)

    def _headline(self, owned: dict[int, _Owned]) -> str:
        slots = len(owned) * self.block_size
        filled = sum(block.num_filled for block in owned.values())
        queues = ", ".join(f"{len(names)} {queue}" for queue, names in self._queues.items())
        full = f", {filled / slots:.0%} of their slots filled" if slots else ""
        return (
            f"step {self.step}: {queues}; {len(owned)} of {self.num_blocks} blocks of "
            f"{self.block_size} in use{full}"
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Generator[Text]:
        yield self.picture(options.max_width)


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

    def load(self, **options: Any) -> "LLM":
        """The model, with whatever options the command has; raises what `LLM` raises."""
        from minipaged.llm import LLM
        from minipaged.parts import Parts

        observed = self._show_blocks or self.is_live or self._trace is not None
        llm = LLM(parts=Parts().traced(self.log) if observed else Parts(), **options)
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


class TraceFile:
    """Events as JSON lines in a file that is whole or absent.

    A regular file is written beside its place and renamed at the end. A pipe or a terminal cannot
    be renamed over: it is written to as it is. Raises InvalidOption if the place cannot be used.
    """

    def __init__(self, path: Path) -> None:
        if path.is_dir() or not path.name:
            raise InvalidOption(f"trace is {str(path)!r}, a folder: give the name of a file.")
        special = path.exists() and not stat.S_ISREG(path.stat().st_mode)
        self._path = path
        self._part = path if special else path.with_name(path.name + ".part")
        try:
            self._file = self._part.open("w", encoding="utf-8")
        except OSError as error:
            raise InvalidOption(
                f"trace is {str(path)!r}, where nothing can be written ({error.strerror}): give "
                "another place."
            ) from error

    def write(self, event: Event) -> None:
        """Add one line."""
        print(event.to_json(), file=self._file)

    def close(self, keep: bool) -> None:
        """Put the file into its place, or take it away again."""
        self._file.close()
        if self._part == self._path:
            return
        if keep:
            self._part.replace(self._path)
        else:
            self._part.unlink()
