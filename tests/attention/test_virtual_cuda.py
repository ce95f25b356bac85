"""vAttention on a GPU: the order of its calls, on a driver that is played; and a GPU's tokens."""

from types import SimpleNamespace

import pytest
import torch

from minipaged import LLM, SamplingParams
from minipaged.attention import virtual_cuda
from minipaged.attention.virtual_cuda import CudaPages
from minipaged.errors import InvalidOption
from minipaged.memory.baselines.slots import RegionLayout

LAYOUT = RegionLayout(num_buffers=2, num_slots=3, region_len=40, token_bytes=1, page_bytes=8)


class Driver:
    """Addresses and pages as the CUDA driver keeps them, and whether anybody may be using them."""

    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)

    def __init__(self, num_pages: int = 8, granularity: int = 4):
        self.num_pages = num_pages
        self.granularity = granularity
        self.created: set[str] = set()
        self.reserved = range(0)
        self.mapped: dict[int, str] = {}
        self.usable: set[int] = set()
        self.busy = True

    def CUmemAllocationProp(self):  # noqa: N802
        return SimpleNamespace(location=SimpleNamespace())

    CUmemAccessDesc = CUmemAllocationProp

    def cuMemGetAllocationGranularity(self, like, kind):  # noqa: N802
        return 0, self.granularity

    def cuMemAddressReserve(self, size, alignment, address, flags):  # noqa: N802
        self.reserved = range(1 << 20, (1 << 20) + size)
        return 0, self.reserved.start

    def cuMemCreate(self, size, like, flags):  # noqa: N802
        assert (size, like.type, like.location.type, like.location.id) == (8, 1, 1, 0)
        if len(self.created) == self.num_pages:
            return 2, None
        self.created.add(f"page {len(self.created)}")
        return 0, f"page {len(self.created) - 1}"

    def cuMemMap(self, address, size, offset, page, flags):  # noqa: N802
        assert (size, offset) == (8, 0)
        assert address in self.reserved
        assert address not in self.mapped
        assert page in self.created - set(self.mapped.values())
        self.mapped[address] = page
        return (0,)

    def cuMemSetAccess(self, address, size, access, count):  # noqa: N802
        assert [(a.location.id, a.flags) for a in access] == [(0, 3)] * count
        places = set(range(address, address + size, 8))
        assert places <= self.mapped.keys()
        self.usable |= places
        self.busy = True  # a kernel may be launched now
        return (0,)

    def cuMemUnmap(self, address, size):  # noqa: N802
        assert not self.busy, "unmapped under a kernel"
        del self.mapped[address]
        self.usable.remove(address)
        return (0,)

    def cuMemRelease(self, page):  # noqa: N802
        assert page not in self.mapped.values()
        self.created.remove(page)
        return (0,)

    def cuMemAddressFree(self, address, size):  # noqa: N802
        assert not self.mapped
        assert (address, size) == (self.reserved.start, len(self.reserved))
        self.reserved = range(0)
        return (0,)

    def cuCtxSynchronize(self):  # noqa: N802
        self.busy = False
        return (0,)


def played(monkeypatch, **options) -> Driver:
    driver = Driver(**options)
    monkeypatch.setattr(virtual_cuda, "load_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: driver.cuCtxSynchronize())
    monkeypatch.setattr(torch, "zeros", lambda _, device: SimpleNamespace(device=device))
    return driver


def make(budget: int = 4) -> CudaPages:
    return CudaPages(LAYOUT, budget, torch.device("cuda", 0))


def test_pages_are_created_once_and_mapped_again_and_again(monkeypatch):
    driver = played(monkeypatch)
    pages = make()
    assert (len(driver.created), driver.mapped) == (8, {})
    for _ in range(3):
        pages.map(2, range(3))
        pages.map(0, range(1))
        assert [pages.num_mapped(slot) for slot in range(3)] == [1, 0, 3]
        expected = {start + 8 * i for start, i in ((80, 0), (80, 1), (80, 2), (0, 0))}
        both = expected | {offset + 120 for offset in expected}  # keys, and values behind them
        assert {address - driver.reserved.start for address in driver.mapped} == both
        assert driver.usable == driver.mapped.keys()
        pages.unmap(2, range(1, 3))
        pages.unmap(2, range(1))
        pages.unmap(0, range(1))
        assert not driver.mapped
    assert len(driver.created) == 8


def test_everything_is_given_back_at_the_end(monkeypatch):
    driver = played(monkeypatch)
    pages = make()
    pages.map(1, range(2))
    del pages
    assert (driver.created, driver.mapped, len(driver.reserved)) == (set(), {}, 0)


def test_a_gpu_with_other_or_too_few_pages_is_refused(monkeypatch):
    played(monkeypatch, granularity=16)
    with pytest.raises(InvalidOption, match="this GPU has pages of 16 bytes"):
        make()
    driver = played(monkeypatch, num_pages=5)
    with pytest.raises(InvalidOption, match="no room for 6 pages of 8 bytes"):
        make()
    assert driver.created == set(), "what was created is given back"


def test_missing_bindings_are_named(monkeypatch):
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(virtual_cuda.importlib, "import_module", missing)
    with pytest.raises(InvalidOption, match=r"pip install 'minipaged\[cuda\]'"):
        virtual_cuda.load_driver()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("memory", ["virtual", "virtual-sliced"])
def test_a_gpu_gives_the_tokens_of_paging_from_slots(memory: str) -> None:
    pytest.importorskip("cuda.bindings")
    prompts = ["Once upon a time", "Theo the frog put the white key in the meadow.", "Q:"]
    params = [
        SamplingParams(temperature=0.0, max_tokens=64),
        SamplingParams(n=3, temperature=0.8, seed=1, max_tokens=64),
        SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True),
    ]

    def run(**options):
        llm = LLM(device="cuda", dtype="float32", num_blocks=2048, **options)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [[one.token_ids for one in output.outputs] for output in outputs]

    assert run(memory=memory) == run(attention_backend="torch")
