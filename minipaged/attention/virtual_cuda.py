"""Pages of a GPU's virtual memory, by the CUDA driver's own calls; what vAttention is made of.

A driver maps pages of 2 MiB, and slowly: published measurements of these calls add up to some 40
microseconds a page, so a group over all layers of a large model costs milliseconds. Hence pages are
created beforehand and mapped again and again. vAttention's own system also maps in the background,
while a step computes; this one does not. (PyTorch's `expandable_segments` uses the same calls.)

Written from the documentation: it has not yet run on a GPU, and its speed is unmeasured.
"""

import importlib
import weakref
from typing import Any

import torch
from torch import Tensor

from minipaged.errors import InvalidOption
from minipaged.memory.baselines.slots import RegionLayout

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


def load_driver() -> Any:
    """NVIDIA's Python bindings of the driver. Raises InvalidOption if they are not installed."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise InvalidOption(
            'memory="virtual" on a GPU maps pages through the package cuda-bindings: install it by '
            "pip install 'minipaged[cuda]'."
        ) from error


class CudaPages:
    """The pages of a layout, on a GPU. As many are created as may be mapped at a time.

    To touch an address that is not mapped is an error that no later call of the process survives:
    the memory manager maps what a step needs before the step is launched.

    Args:
        budget: page groups.

    Raises:
        InvalidOption: the bindings are missing, the GPU has other pages, or it has too few.
    """

    def __init__(self, layout: RegionLayout, budget: int, device: torch.device) -> None:
        self.layout = layout
        # The driver works in the context that PyTorch makes with its first tensor.
        self.device = torch.zeros(1, device=device).device
        self._num_mapped = [0] * layout.num_slots
        self._driver = load_driver()
        page, like = layout.page_bytes, self._like_these()
        self._refuse_other_pages(like)
        self._address = int(self._call("cuMemAddressReserve", layout.num_bytes, page, 0, 0))
        self._spare: list[Any] = []  # pages that are mapped nowhere
        self._mapped: dict[int, Any] = {}  # the others, by address
        weakref.finalize(
            self, _give_back, self._driver, self._address, layout, self._spare, self._mapped
        )
        for _ in range(budget * layout.num_buffers):
            self._spare.append(self._call("cuMemCreate", page, like, 0))

    # ---- what the memory manager asks for ------------------------------------------------------

    def map(self, slot: int, groups: range) -> None:
        """Put pages behind these page groups of a slot. What is in them is whatever was before."""
        assert groups.start == self._num_mapped[slot], f"slot {slot} would have a hole"
        page = self.layout.page_bytes
        for start, length in self.layout.pieces(slot, groups):
            begin = self._address + start
            for address in range(begin, begin + length, page):
                self._mapped[address] = self._spare.pop()
                self._call("cuMemMap", address, page, 0, self._mapped[address], 0)
            self._call("cuMemSetAccess", begin, length, [self._read_and_write()], 1)
        self._num_mapped[slot] = groups.stop

    def unmap(self, slot: int, groups: range) -> None:
        """Take the pages behind these page groups away, once no kernel can be using them."""
        assert groups.stop == self._num_mapped[slot], f"slot {slot} would have a hole"
        torch.cuda.synchronize(self.device)
        page = self.layout.page_bytes
        for start, length in self.layout.pieces(slot, groups):
            begin = self._address + start
            for address in range(begin, begin + length, page):
                self._call("cuMemUnmap", address, page)
                self._spare.append(self._mapped.pop(address))
        self._num_mapped[slot] = groups.start

    def num_mapped(self, slot: int) -> int:
        """How many first page groups of the slot have memory behind them."""
        return self._num_mapped[slot]

    # ---- what lies there -----------------------------------------------------------------------

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        data = (self._address, False)  # False: not read-only
        return {"shape": (self.layout.num_bytes,), "typestr": "|u1", "data": data, "version": 3}

    def tensor(self) -> Tensor:
        """All bytes of the layout, [num_bytes]. It keeps this object alive."""
        # PyTorch asks the driver whose the first address is, so there must be a page.
        self.map(0, range(1))
        tensor = torch.as_tensor(self, device=self.device)
        assert tensor.data_ptr() == self._address, "copied, where a view was meant"
        self.unmap(0, range(1))
        return tensor

    # ---- calls of the driver -------------------------------------------------------------------

    def _like_these(self) -> Any:
        """The kind of page that is wanted: on this GPU, for nobody outside this process."""
        like = self._driver.CUmemAllocationProp()
        like.type = self._driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        like.location.type = self._driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        like.location.id = self.device.index
        return like

    def _read_and_write(self) -> Any:
        access = self._driver.CUmemAccessDesc()
        access.location.type = self._driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = self.device.index
        access.flags = self._driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        return access

    def _refuse_other_pages(self, like: Any) -> None:
        kinds = self._driver.CUmemAllocationGranularity_flags
        least = kinds.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        smallest = int(self._call("cuMemGetAllocationGranularity", like, least))
        if self.layout.page_bytes % smallest:
            raise InvalidOption(
                f"this GPU has pages of {smallest} bytes, of which {self.layout.page_bytes} is no "
                'multiple: choose memory="paged".'
            )

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._driver, name)(*arguments)
        if int(error) == _OUT_OF_MEMORY:
            raise InvalidOption(
                f"the GPU has no room for {len(self._spare) + 1} pages of "
                f"{self.layout.page_bytes} bytes: lower gpu_memory_utilization or num_blocks."
            )
        if int(error) != 0:
            raise RuntimeError(f"{name} failed: {error!r}")
        return values[0] if values else None


def _give_back(
    driver: Any, address: int, layout: RegionLayout, spare: list[Any], mapped: dict[int, Any]
) -> None:
    """Return all pages and addresses, when nobody can touch them any more."""
    driver.cuCtxSynchronize()
    for start, page in mapped.items():
        driver.cuMemUnmap(start, layout.page_bytes)
        driver.cuMemRelease(page)
    for page in spare:
        driver.cuMemRelease(page)
    driver.cuMemAddressFree(address, layout.num_bytes)
