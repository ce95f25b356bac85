"""Pages of this process's virtual memory, mapped and unmapped on demand. Linux only.

An address can be had without memory: `mmap` reserves as many as one likes, and the system puts a
page behind one when it is first written. Here that is done ahead, page group by page group, and
undone by MADV_DONTNEED; so what is mapped is at all times what the memory manager believes.
"""

import ctypes
import errno
import mmap
import sys
from pathlib import Path

from minipaged.errors import InvalidOption
from minipaged.memory.baselines.slots import RegionLayout

SMALL_PAGE = mmap.PAGESIZE  # 4 KiB on most machines
HUGE_PAGE = 2 * 1024**2  # which is also the smallest that a GPU maps
_THP = Path("/sys/kernel/mm/transparent_hugepage")
# Not every Python knows these names; the numbers are Linux's.
_MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)
_MADV_POPULATE_WRITE: int = getattr(mmap, "MADV_POPULATE_WRITE", 23)


def why_no_pages_of(page_bytes: int) -> str | None:
    """Why pages of this size cannot be had here; None if they can."""
    if sys.platform != "linux":
        return f"virtual memory is mapped by calls of Linux, and this is {sys.platform}"
    if page_bytes == SMALL_PAGE:
        return None
    if page_bytes != HUGE_PAGE or _thp("hpage_pmd_size") != str(HUGE_PAGE):
        return f"this machine has pages of {SMALL_PAGE} and no huge pages of {page_bytes} bytes"
    if "[never]" in _thp("enabled"):
        return f"huge pages are switched off: write madvise to {_THP / 'enabled'}"
    return None


def _thp(name: str) -> str:
    setting = _THP / name
    return setting.read_text(encoding="ascii").strip() if setting.exists() else "[never]"


class MappedPages:
    """The pages of a layout, in this process. All addresses are reserved, and nothing is mapped.

    Args:
        layout: its page_bytes are SMALL_PAGE or HUGE_PAGE.

    Raises:
        InvalidOption: the system has no such pages, or refuses the addresses.
    """

    def __init__(self, layout: RegionLayout) -> None:
        if reason := why_no_pages_of(layout.page_bytes):
            raise InvalidOption(f'memory="virtual" cannot run: {reason}.')
        self.layout = layout
        self._num_mapped = [0] * layout.num_slots
        page = layout.page_bytes
        # [ unused | guard | all buffers | guard ]: a huge page begins at a multiple of its size,
        # so the beginning is looked for in a mapping that is larger than necessary.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            self._memory = mmap.mmap(-1, layout.num_bytes + 3 * page, flags=flags)
        except (OSError, OverflowError) as error:
            raise InvalidOption(
                f"the system refuses {layout.num_bytes} bytes of addresses ({error}): lower "
                "max_num_seqs or max_model_len, or lift the limit (ulimit -v)."
            ) from error
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._start = page - base % page + page
        self._address = base + self._start
        self._forbid(self._address - SMALL_PAGE)
        self._forbid(self._address + layout.num_bytes)
        self._choose_page_size()

    def _forbid(self, address: int) -> None:
        """Make a guard of a page: who writes past an end is stopped, and our part stands apart.

        The kernel joins neighbouring mappings that are alike, and then reports them as one.
        """
        system = ctypes.CDLL(None, use_errno=True)
        system.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        assert system.mprotect(address, SMALL_PAGE, 0) == 0, f"mprotect: {ctypes.get_errno()}"

    def _choose_page_size(self) -> None:
        if self.layout.page_bytes == SMALL_PAGE:
            # Where huge pages are given to all, a write would bring 2 MiB. A kernel without any
            # does not know the word.
            self._advise(mmap.MADV_NOHUGEPAGE, 0, self.layout.num_bytes, may_be_unknown=True)
            return
        self._advise(mmap.MADV_HUGEPAGE, 0, self.layout.num_bytes)
        # The kernel may give small pages all the same, and says nothing. So one is tried.
        self._populate(0, HUGE_PAGE)
        if self.huge_bytes() != HUGE_PAGE:
            raise InvalidOption(
                "the kernel gives small pages where huge ones were asked for, most likely because "
                'no 2 MiB of memory lie in one piece: choose memory="virtual".'
            )
        self._advise(mmap.MADV_DONTNEED, 0, HUGE_PAGE)

    # ---- what the memory manager asks for ------------------------------------------------------

    def map(self, slot: int, groups: range) -> None:
        """Put memory behind these page groups of a slot. It is zero."""
        assert groups.start == self._num_mapped[slot], f"slot {slot} would have a hole"
        for start, length in self.layout.pieces(slot, groups):
            self._populate(start, length)
        self._num_mapped[slot] = groups.stop

    def unmap(self, slot: int, groups: range) -> None:
        """Take the memory behind these page groups away; what was there is lost."""
        assert groups.stop == self._num_mapped[slot], f"slot {slot} would have a hole"
        for start, length in self.layout.pieces(slot, groups):
            self._advise(mmap.MADV_DONTNEED, start, length)
        self._num_mapped[slot] = groups.start

    def num_mapped(self, slot: int) -> int:
        """How many first page groups of the slot have memory behind them."""
        return self._num_mapped[slot]

    # ---- what lies there -----------------------------------------------------------------------

    def view(self) -> memoryview:
        """All bytes of the layout. While a view exists, the mapping cannot be closed."""
        return memoryview(self._memory)[self._start : self._start + self.layout.num_bytes]

    def resident_bytes(self) -> int:
        """Bytes of memory that the kernel says are there.

        It counts a page that was only read as well, unless asked for Rss: all such pages are one
        and the same, full of zeros.
        """
        return self._smaps("Rss:")

    def huge_bytes(self) -> int:
        """Those among them that lie in huge pages."""
        return self._smaps("AnonHugePages:")

    def _smaps(self, field: str) -> int:
        total, ours = 0, False
        for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
            words = line.split()
            if not words[0].endswith(":"):  # the first line of a mapping, with its addresses
                start, end = (int(address, 16) for address in words[0].split("-"))
                ours = self._address <= start and end <= self._address + self.layout.num_bytes
            elif ours and words[0] == field:
                total += int(words[1]) * 1024
        return total

    # ---- calls of the system -------------------------------------------------------------------

    def _populate(self, start: int, length: int) -> None:
        if not self._advise(_MADV_POPULATE_WRITE, start, length, may_be_unknown=True):
            # Linux before 5.14: a page comes with the first byte that is written to it.
            for page in range(self._start + start, self._start + start + length, SMALL_PAGE):
                self._memory[page] = 0

    def _advise(self, advice: int, start: int, length: int, may_be_unknown: bool = False) -> bool:
        try:
            self._memory.madvise(advice, self._start + start, length)
        except OSError as error:
            if may_be_unknown and error.errno == errno.EINVAL:
                return False
            raise
        return True
