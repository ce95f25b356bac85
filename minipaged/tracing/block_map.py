"""The pool as a picture in the terminal, a letter per block, drawn from the event stream."""

from collections.abc import Generator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions
from rich.text import Text

from minipaged.tracing.events import Event

COLOURS = ("cyan", "magenta", "green", "blue", "red", "bright_blue", "bright_magenta", "bright_red")
LEGEND = (
    "A: full block of A   a: its last, filling   _: reserved   2-9: owners   +: cached   ·: free"
)
MAX_COLUMNS = 64
MAX_ROWS = 12


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


@dataclass(frozen=True)
class _Picture:
    """What is drawn: the pool at one moment."""

    headline: str
    owned: dict[int, _Owned]
    cached: set[int]


class BlockMap:
    """The pool as a picture, a letter a block; see LEGEND."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.step = 0
        self._reach = 0  # one more than the highest block used so far
        self._numbers: dict[str, int] = {}  # of requests, in order of admission
        self._holders: dict[int, _Holder] = {}  # by sequence id
        self._cached: set[int] = set()  # blocks that can be found by their content
        self._num_copied = 0  # on write, since the beginning
        self._num_evicted = 0
        self._num_preempted = 0
        self._queues: dict[str, list[str]] = {"running": [], "waiting": [], "swapped": []}
        self._fullest = _Picture("", {}, set())

    def __call__(self, event: Event) -> None:
        """Listen to one event."""
        self.step = event.step
        listen = getattr(self, f"_on_{event.event}", None)
        if listen is not None:
            listen(**event.fields)

    # ---- the events that change the picture ------------------------------------------------------

    def _on_admit(
        self, request: str, seqs: dict[int, list[int]], tokens: dict[int, int], **_: object
    ) -> None:
        self._hold(request, seqs, tokens)

    def _on_pin(self, seq: int, blocks: list[int]) -> None:
        self._hold(f"prefix {seq}", {seq: blocks}, {seq: len(blocks) * self.block_size})

    def _hold(self, request: str, seqs: dict[int, list[int]], tokens: dict[int, int]) -> None:
        self._numbers.setdefault(request, len(self._numbers))
        for seq_id, blocks in seqs.items():
            self._holders[seq_id] = _Holder(request, list(blocks), tokens[seq_id])

    def _on_append(self, seq: int, blocks: list[int], tokens: int) -> None:
        self._holders[seq].blocks += blocks
        self._holders[seq].num_tokens = tokens

    def _on_copy_on_write(self, seq: int, pairs: list[tuple[int, int]]) -> None:
        self._on_merge(seq, pairs)
        self._num_copied += len(pairs)

    def _on_merge(self, seq: int, pairs: list[tuple[int, int]]) -> None:
        moved = dict(pairs)
        holder = self._holders[seq]
        holder.blocks = [moved.get(block, block) for block in holder.blocks]

    def _on_cache(self, seq: int, blocks: list[int]) -> None:
        self._cached.update(blocks)

    def _on_evict(self, block: int) -> None:
        self._cached.remove(block)
        self._num_evicted += 1

    def _on_preempt(self, **_: object) -> None:
        self._num_preempted += 1

    def _on_fork(self, parent: int, child: int, tokens: int) -> None:
        source = self._holders[parent]
        blocks = source.blocks[: -(-tokens // self.block_size)]
        self._holders[child] = _Holder(source.request, blocks, tokens)

    def _on_free(self, seq: int) -> None:
        holder = self._holders.pop(seq)
        if not any(other.request == holder.request for other in self._holders.values()):
            for queue, requests in self._queues.items():
                self._queues[queue] = [r for r in requests if r != holder.request]

    def _on_swap_out(self, seqs: dict[int, list[int]], **_: object) -> None:
        self._swap(seqs, swapped=True)

    def _on_swap_in(self, seqs: dict[int, list[int]], **_: object) -> None:
        self._swap(seqs, swapped=False)

    def _on_schedule(self, tokens: dict[int, int], **queues: list[str]) -> None:
        self._queues = queues
        owned = self._owned()
        self._reach = max([self._reach, *(block + 1 for block in owned)])
        if len(owned) > len(self._fullest.owned):
            self._fullest = _Picture(self._headline(owned), owned, self._cached.copy())

    def _swap(self, seqs: dict[int, list[int]], swapped: bool) -> None:
        for seq_id, blocks in seqs.items():
            self._holders[seq_id].blocks = list(blocks)
            self._holders[seq_id].swapped = swapped

    # ---- drawing ---------------------------------------------------------------------------------

    def _owned(self) -> dict[int, _Owned]:
        owned: dict[int, _Owned] = {}
        for holder in self._holders.values():
            for logical, block in enumerate([] if holder.swapped else holder.blocks):
                left = holder.num_tokens - logical * self.block_size
                filled = max(0, min(self.block_size, left))
                others = owned[block].num_owners if block in owned else 0
                owned[block] = _Owned(holder.request, others + 1, filled)
        return owned

    def picture(self, width: int = MAX_COLUMNS + 8) -> Text:
        """The pool now, below a line that says what is going on."""
        owned = self._owned()
        return self._draw(_Picture(self._headline(owned), owned, self._cached), width)

    def fullest(self, width: int = MAX_COLUMNS + 8) -> Text:
        """The pool when most of its blocks were in use."""
        return self._draw(self._fullest, width)

    def totals(self) -> str:
        """What has happened to blocks and requests since the beginning."""
        return (
            f"In all: {self._num_preempted} preemptions, {self._num_copied} blocks copied on "
            f"write, {self._num_evicted} evicted from the prefix cache."
        )

    def _draw(self, picture: _Picture, width: int) -> Text:
        text = Text(f"{picture.headline}\n{LEGEND}")
        text.stylize("dim", len(picture.headline))
        columns = max(8, min(MAX_COLUMNS, width - 8))
        room = columns * MAX_ROWS
        shown = self.num_blocks if self.num_blocks <= room else min(self._reach, room)
        for block in range(shown):
            if block % columns == 0:
                text.append(f"\n{block:>6} ", style="dim")
            text.append_text(self._cell(picture.owned.get(block), block in picture.cached))
        hidden = self.num_blocks - shown
        if hidden:
            text.append(f"\n       and {hidden} more", style="dim")
        return text

    def _cell(self, owned: _Owned | None, cached: bool) -> Text:
        if owned is None:
            return Text("+" if cached else "·", style="dim")
        sign = letter(self._numbers[owned.request])
        if owned.num_owners > 1:
            return Text(str(min(owned.num_owners, 9)), style=sign.style)
        if owned.num_filled == 0:  # reserved in advance, as rivals of paging do
            return Text("_", style=sign.style)
        return sign if owned.num_filled == self.block_size else Text(sign.plain.lower(), sign.style)

    def _headline(self, owned: dict[int, _Owned]) -> str:
        slots = len(owned) * self.block_size
        filled = sum(block.num_filled for block in owned.values())
        queues = ", ".join(f"{len(names)} {queue}" for queue, names in self._queues.items())
        full = f", {filled / slots:.0%} of their slots filled" if slots else ""
        shared = sum(block.num_owners > 1 for block in owned.values())
        sharing = f", {shared} shared" if shared else ""
        return (
            f"step {self.step}: {queues}; {len(owned)} of {self.num_blocks} blocks of "
            f"{self.block_size} in use{full}{sharing}"
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Generator[Text]:
        yield self.picture(options.max_width)
