"""The pool as a picture in the terminal, one sign per block."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console, ConsoleOptions
from rich.text import Text

from minipaged.memory import MemoryView
from minipaged.scheduler.interface import Scheduler
from minipaged.tracing.events import Event

COLOURS = ("cyan", "magenta", "green", "blue", "red", "bright_blue", "bright_magenta", "bright_red")
LEGEND = "A: full  a: filling  _: reserved  2-9: owners  *: pinned  +: cached  ·: free"
MAX_COLUMNS = 64
MAX_ROWS = 12


def letter(number: int) -> Text:
    """Return the letter and colour of a request, by order of arrival."""
    return Text(chr(ord("A") + number % 26), style=COLOURS[number % len(COLOURS)])


class _Block(NamedTuple):
    """A block in use."""

    request: int | None  # an owner, by order of arrival; None: only pinned prefixes own it
    num_owners: int
    num_filled: int


@dataclass(frozen=True)
class _Snapshot:
    """The pool at one moment."""

    headline: str
    in_use: dict[int, _Block]
    cached: frozenset[int]


class BlockMap:
    """Draws the pool with one sign per block; see LEGEND.

    It reads the scheduler and its memory. As a listener, it counts preemptions, copies and
    evictions, and keeps the picture of the pool at its fullest.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._memory: MemoryView = scheduler.memory
        self._step = 0
        self._reach = 0  # one more than the highest block drawn so far
        self._fewest_free = self._memory.num_blocks
        self._fullest = self._snapshot()
        self._num_copied = 0  # blocks, on write
        self._num_evicted = 0
        self._num_preempted = 0

    def __call__(self, event: Event) -> None:
        """Receive one event."""
        if event.event == "schedule":
            self._step = event.step
            if self._memory.num_free < self._fewest_free:
                self._fewest_free = self._memory.num_free
                self._fullest = self._snapshot()
        elif event.event == "copy_on_write":
            self._num_copied += len(event.fields["pairs"])
        elif event.event == "evict":
            self._num_evicted += 1
        elif event.event == "preempt":
            self._num_preempted += 1

    # ---- reading the memory ----------------------------------------------------------------------

    def _snapshot(self) -> _Snapshot:
        in_use, cached = self._blocks_in_use(), frozenset(self._memory.cached)
        self._reach = max([self._reach, *(block + 1 for block in (*in_use, *cached))])
        return _Snapshot(self._headline(in_use), in_use, cached)

    def _blocks_in_use(self) -> dict[int, _Block]:
        """Return the blocks of the pool that sequences and pinned prefixes own."""
        running = self._scheduler.running
        request_of = {seq.seq_id: group.arrival for group in running for seq in group.sequences}
        in_use: dict[int, _Block] = {}
        for seq_id, table in self._memory.tables.items():
            if self._memory.is_swapped(seq_id):
                continue
            for logical, block in enumerate(table.blocks):
                others = in_use.get(block, _Block(None, 0, 0))
                request = request_of.get(seq_id, others.request)
                num_filled = max(others.num_filled, table.filled(logical))  # negative: reserved
                in_use[block] = _Block(request, others.num_owners + 1, num_filled)
        return in_use

    def _headline(self, in_use: dict[int, _Block]) -> str:
        """Write two lines: the queues, and the pool in numbers."""
        scheduler, memory = self._scheduler, self._memory
        num_swapped = memory.num_swap_blocks - memory.num_free_swap_blocks
        filled = sum(block.num_filled for block in in_use.values())
        num_shared = sum(block.num_owners > 1 for block in in_use.values())
        size = memory.block_size
        return "".join(
            [
                f"step {self._step}: {len(scheduler.running)} running, ",
                f"{len(scheduler.waiting)} waiting, {len(scheduler.swapped)} swapped",
                f" ({_count(num_swapped, 'block')})" if num_swapped else "",
                f"\n{len(in_use)} of {memory.num_blocks} blocks of {size} in use",
                f", {filled / (len(in_use) * size):.0%} of their slots filled" if in_use else "",
                f", {num_shared} shared" if num_shared else "",
            ]
        )

    # ---- drawing ---------------------------------------------------------------------------------

    def picture(self, width: int = MAX_COLUMNS + 8) -> Text:
        """Draw the pool now, below a line about the queues and one about the pool."""
        return self._draw(self._snapshot(), width)

    def fullest(self, width: int = MAX_COLUMNS + 8) -> Text:
        """Draw the pool when most of its blocks were in use."""
        return self._draw(self._fullest, width)

    def totals(self) -> str:
        """Write the totals of preemptions, copies and evictions."""
        return (
            f"In total: {_count(self._num_preempted, 'preemption')}, "
            f"{_count(self._num_copied, 'block')} copied on write, {self._num_evicted} evicted."
        )

    def _draw(self, snapshot: _Snapshot, width: int) -> Text:
        text = Text(f"{snapshot.headline}\n")
        text.append(LEGEND, style="dim")
        columns = max(8, min(MAX_COLUMNS, width - 8))
        room, num_blocks = columns * MAX_ROWS, self._memory.num_blocks
        shown = num_blocks if num_blocks <= room else min(self._reach, room)
        for block in range(shown):
            if block % columns == 0:
                text.append(f"\n{block:>6} ", style="dim")
            text.append_text(self._sign(snapshot.in_use.get(block), block in snapshot.cached))
        if shown < num_blocks:
            text.append(f"\n       and {num_blocks - shown} more", style="dim")
        return text

    def _sign(self, block: _Block | None, cached: bool) -> Text:
        if block is None:
            return Text("+" if cached else "·", style="dim")
        sign = Text("*") if block.request is None else letter(block.request)
        if block.num_owners > 1:
            sign.plain = str(min(block.num_owners, 9))
        elif block.num_filled == 0:  # reserved in advance, as the baselines do
            sign.plain = "_"
        elif block.num_filled < self._memory.block_size:
            sign.plain = sign.plain.lower()
        return sign

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Generator[Text]:
        yield self.picture(options.max_width)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
