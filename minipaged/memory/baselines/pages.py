"""Pages of this process's virtual memory, mapped and unmapped on demand. Linux only.

`mmap` reserves addresses without memory, and the kernel maps a page when it is first written. Here
pages are populated ahead of that, one page group at a time, and released by MADV_DONTNEED, so that
exactly the pages are mapped that the memory manager has counted.
"""

import ctypes
import errno
import mmap
import sys
from pathlib import Path

from minipaged.errors import InvalidOption
from minipaged.memory.baselines.regions import RegionLayout

SMALL_PAGE = mmap.PAGESIZE  # 4 KiB on most machines
HUGE_PAGE = 2 * 1024**2  # also the smallest page that a GPU maps
_THP = Path("/sys/kernel/mm/transparent_hugepage")
# Linux's values, where this Python has no names for them.
_MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)
_MADV_POPULATE_WRITE: int = getattr(mmap, "MADV_POPULATE_WRITE", 23)


def why_no_pages_of(page_bytes: int) -> str | None:
    """The reason why pages of this size are not available here; None if they are."""
    if sys.platform != "linux":
        return f"virtual memory is mapped by Linux system calls, but this is {sys.platform}"
    if page_bytes == SMALL_PAGE:
        return None
    if page_bytes != HUGE_PAGE or _thp("hpage_pmd_size") != str(HUGE_PAGE):
        return f"this machine has pages of {SMALL_PAGE} bytes, but no huge pages of {page_bytes}"
    if "[never]" in _thp("enabled"):
        return f"huge pages are switched off: write madvise to {_THP / 'enabled'}"
    return None


def _thp(name: str) -> str:
    setting = _THP / name
    return setting.read_text(encoding="ascii").strip() if setting.exists() else "[never]"


class MappedPages:
    """The pages of a layout in this process. At first all addresses are reserved, none mapped.

    Args:
        layout: with page_bytes SMALL_PAGE or HUGE_PAGE.

    Raises:
        InvalidOption: the system does not have such pages, or refuses the addresses.
    """

    def __init__(self, layout: RegionLayout) -> None:
        if reason := why_no_pages_of(layout.page_bytes):
            raise InvalidOption(f'memory="virtual" cannot run: {reason}.')
        self.layout = layout
        self._num_mapped = [0] * layout.num_regions
        page = layout.page_bytes
        # [ unused | guard | all buffers | guard ]: a huge page starts at a multiple of its size, so
        # the mapping is larger than necessary, and the first such address in it is used.
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
        """Make a guard page: writing to it ends the process.

        It also keeps the kernel from merging this mapping with a neighbouring one, whose pages
        `_smaps` would then count as well.
        """
        system = ctypes.CDLL(None, use_errno=True)
        system.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        assert system.mprotect(address, SMALL_PAGE, 0) == 0, f"mprotect: {ctypes.get_errno()}"

    def _choose_page_size(self) -> None:
        if self.layout.page_bytes == SMALL_PAGE:
            # Where huge pages are always enabled, one write would map 2 MiB. A kernel without
            # huge pages does not know this advice.
            self._advise(mmap.MADV_NOHUGEPAGE, 0, self.layout.num_bytes, may_be_unknown=True)
            return
        self._advise(mmap.MADV_HUGEPAGE, 0, self.layout.num_bytes)
        # The kernel may silently map small pages instead, so try one.
        self._populate(0, HUGE_PAGE)
        if self.huge_bytes() != HUGE_PAGE:
            raise InvalidOption(
                "the kernel maps small pages where huge ones were requested, most likely because "
                'no contiguous 2 MiB of memory are free: choose memory="virtual".'
            )
        self._advise(mmap.MADV_DONTNEED, 0, HUGE_PAGE)

    # ---- for the memory manager ----------------------------------------------------------------

    def map(self, region: int, groups: range) -> None:
        """Map these page groups of a region, filled with zeros."""
        assert groups.start == self._num_mapped[region], f"region {region} would have a hole"
        for start, length in self.layout.pieces(region, groups):
            self._populate(start, length)
        self._num_mapped[region] = groups.stop

    def unmap(self, region: int, groups: range) -> None:
        """Unmap these page groups of a region; their contents are lost."""
        assert groups.stop == self._num_mapped[region], f"region {region} would have a hole"
        for start, length in self.layout.pieces(region, groups):
            self._advise(mmap.MADV_DONTNEED, start, length)
        self._num_mapped[region] = groups.start

    def unmap_all(self) -> None:
        """Unmap every page, for a new memory manager."""
        self._advise(mmap.MADV_DONTNEED, 0, self.layout.num_bytes)
        self._num_mapped = [0] * self.layout.num_regions

    def num_mapped(self, region: int) -> int:
        """The number of mapped page groups of the region, counted from its start."""
        return self._num_mapped[region]

    # ---- inspection ----------------------------------------------------------------------------

    def view(self) -> memoryview:
        """All bytes of the layout. The mapping cannot be closed while a view exists."""
        return memoryview(self._memory)[self._start : self._start + self.layout.num_bytes]

    def resident_bytes(self) -> int:
        """Bytes of memory that the kernel reports as resident.

        Its field Rss leaves out pages that were only read, which all share one page of zeros.
        """
        return self._smaps("Rss:")

    def huge_bytes(self) -> int:
        """Resident bytes in huge pages."""
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

    # ---- system calls --------------------------------------------------------------------------

    def _populate(self, start: int, length: int) -> None:
        if not self._advise(_MADV_POPULATE_WRITE, start, length, may_be_unknown=True):
            # Linux before 5.14: writing a byte maps its page.
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
