"""vAttention with real pages: what is mapped, what attention reads, and the same tokens as paging.

Where the machine gives no huge pages, what needs them is skipped and says why.
"""

import gc
import subprocess
import sys
from dataclasses import replace
from itertools import count, product

import pytest
import torch
from checkpoints import VOCAB_SIZE, make_checkpoint
from mutants import compiled

from minipaged import LLM, BeamSearchParams, Parts, SamplingParams
from minipaged.attention import unpaged
from minipaged.attention.batch import BatchBuilder
from minipaged.attention.unpaged import prepare_unpaged, unpaged_attention, unpaged_store_kv
from minipaged.attention.virtual_cache import VirtualKVCache
from minipaged.config import ModelConfig
from minipaged.errors import InvalidOption, InvalidRequest, PromptTooLong
from minipaged.evaluation.testing.paged_setup import dense_attention, paged_setup
from minipaged.memory import BlockTable
from minipaged.memory.baselines import pages
from minipaged.memory.baselines.pages import HUGE_PAGE, SMALL_PAGE, MappedPages
from minipaged.memory.baselines.regions import RegionLayout
from minipaged.memory.baselines.virtual import VIRTUAL
from minipaged.scheduler.output import SequenceInput
from minipaged.tracing.block_map import BlockMap
from minipaged.tracing.events import EventLog

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are mapped by Linux's calls")

SIZES = {SMALL_PAGE: "small", HUGE_PAGE: "huge"}


def need(page_bytes: int) -> None:
    """Skip what this machine cannot show, with its reason."""
    try:
        MappedPages(RegionLayout(1, 1, page_bytes, 1, page_bytes))
    except InvalidOption as error:
        pytest.skip(str(error))


@pytest.fixture(params=SIZES, ids=SIZES.get)
def mapped(request) -> MappedPages:
    need(request.param)
    page = request.param
    return MappedPages(RegionLayout(3, 4, 4 * page, 1, page))


def write(mapped: MappedPages, region: int, group: int, number: int) -> None:
    view = mapped.view()
    for start, length in mapped.layout.pieces(region, range(group, group + 1)):
        view[start : start + length] = bytes([number]) * length


def read(mapped: MappedPages, region: int, group: int) -> set[int]:
    view = mapped.view()
    pieces = mapped.layout.pieces(region, range(group, group + 1))
    return {number for start, length in pieces for number in view[start : start + length]}


# ---- pages ---------------------------------------------------------------------------------------


def test_addresses_cost_no_memory():
    layout = RegionLayout(64, 64, 2**29, 1, SMALL_PAGE)  # 2 TiB
    mapped = MappedPages(layout)
    assert len(mapped.view()) == layout.num_bytes == 2**41
    assert mapped.resident_bytes() == 0


def test_resident_memory_is_exactly_what_is_mapped(mapped):
    layout = mapped.layout
    assert mapped.resident_bytes() == 0
    for region, groups in ((0, range(2)), (3, range(1)), (0, range(2, 4)), (1, range(1))):
        before = mapped.resident_bytes()
        mapped.map(region, groups)
        assert mapped.resident_bytes() == before + len(groups) * layout.group_bytes
    if layout.page_bytes == HUGE_PAGE:
        assert mapped.huge_bytes() == mapped.resident_bytes()
    else:
        assert mapped.huge_bytes() == 0
    mapped.unmap(0, range(1, 4))
    assert mapped.resident_bytes() == 3 * layout.group_bytes
    assert [mapped.num_mapped(region) for region in range(4)] == [1, 1, 0, 1]


def test_unmapping_returns_memory_and_leaves_the_neighbours_alone(mapped):
    for region in range(3):
        mapped.map(region, range(4))
        for group in range(4):
            write(mapped, region, group, 10 * region + group + 1)
    mapped.unmap(1, range(2, 4))
    kept = {(region, group) for region in range(3) for group in range(4)} - {(1, 2), (1, 3)}
    assert all(read(mapped, region, group) == {10 * region + group + 1} for region, group in kept)
    mapped.map(1, range(2, 4))
    assert read(mapped, 1, 2) == read(mapped, 1, 3) == {0}


def test_a_region_grows_and_shrinks_at_its_end_only(mapped):
    mapped.map(2, range(2))
    with pytest.raises(AssertionError, match="region 2 would have a hole"):
        mapped.map(2, range(3, 4))
    with pytest.raises(AssertionError, match="region 2 would have a hole"):
        mapped.unmap(2, range(1))


def test_an_older_linux_gets_its_pages_by_touching_them(mapped, monkeypatch):
    monkeypatch.setattr(pages, "_MADV_POPULATE_WRITE", 9999)
    mapped.map(1, range(3))
    assert mapped.resident_bytes() == 3 * mapped.layout.group_bytes


def test_a_tensor_keeps_its_mapping_alive():
    model = ModelConfig(
        architecture="", num_layers=1, num_heads=1, num_kv_heads=1, head_dim=64, hidden_size=64,
        vocab_size=1, max_position_embeddings=64,
    )  # fmt: skip
    layout = RegionLayout.for_model(model, 4, num_regions=2, longest=64, page_bytes=SMALL_PAGE)
    cache = VirtualKVCache(model, layout, torch.float32)
    cache.pages.map(1, range(1))
    memory = cache.pages._memory
    keys, _ = cache.layers[0]
    del cache
    gc.collect()
    with pytest.raises(BufferError):
        memory.close()
    del memory
    gc.collect()
    keys[1, :, :8] = 3.0
    assert keys[1, :, :8].sum() == 3 * 8 * 64


@pytest.mark.parametrize("offset", [-1, 2 * SMALL_PAGE])
def test_a_write_past_the_end_of_a_region_kills_the_process(offset):
    program = (
        "import ctypes\n"
        "from minipaged.memory.baselines.pages import MappedPages, SMALL_PAGE\n"
        "from minipaged.memory.baselines.regions import RegionLayout\n"
        "mapped = MappedPages(RegionLayout(1, 2, SMALL_PAGE, 1, SMALL_PAGE))\n"
        "ctypes.memset(mapped._address, 1, 2 * SMALL_PAGE)\n"
        "print('inside', flush=True)\n"
        f"ctypes.memset(mapped._address + {offset}, 1, 1)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert (result.stdout, result.returncode) == (b"inside\n", -11)


def test_other_operating_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InvalidOption, match="by Linux system calls, but this is darwin"):
        LLM(memory="virtual")


def test_huge_pages_that_are_switched_off_or_not_mapped_are_reported(monkeypatch, tmp_path):
    layout = RegionLayout(1, 1, HUGE_PAGE, 1, HUGE_PAGE)
    monkeypatch.setattr(pages, "_THP", tmp_path)
    with pytest.raises(InvalidOption, match="no huge pages of 2097152"):
        MappedPages(layout)
    (tmp_path / "hpage_pmd_size").write_text(f"{HUGE_PAGE}\n")
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    with pytest.raises(InvalidOption, match="huge pages are switched off: write madvise to"):
        MappedPages(layout)
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.setattr(MappedPages, "huge_bytes", lambda _: 0)
    monkeypatch.setattr(MappedPages, "_advise", lambda *_, **__: True)
    with pytest.raises(InvalidOption, match="the kernel maps small pages"):
        MappedPages(layout)


# ---- attention over regions ----------------------------------------------------------------------


@pytest.mark.parametrize("sliced", [False, True], ids=["whole", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes", [[(1, 6)], [(9, 0)], [(3, 5)], [(1, 6), (5, 0), (3, 5), (1, 90), (1, 0), (4, 61)]]
)
def test_attention_in_regions_gives_what_dense_attention_gives(sizes, dtype, sliced):
    setup = paged_setup(sizes, dtype=dtype)
    cache, batch = in_regions(setup, sizes, dtype, sliced)
    k_cache, v_cache = cache.layers[1]
    unpaged_store_kv(setup.new(setup.keys), setup.new(setup.values), k_cache, v_cache, batch)
    resident = cache.pages.resident_bytes()
    batch = prepare_unpaged(batch, k_cache, setup.q.shape[1], dtype)
    out = unpaged_attention(setup.q, k_cache, v_cache, batch, setup.scale)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert torch.allclose(out.double(), dense_attention(setup), atol=tolerance, rtol=tolerance)
    assert cache.pages.resident_bytes() == resident, "read or written where nothing is mapped"


DECODES = [(1, 6), (1, 0), (1, 90)]
PROMPTS_TOO = [(1, 6), (3, 5), (5, 0), (1, 90)]


@pytest.mark.parametrize(
    ("sizes", "right", "wrong"),
    [
        (DECODES, ": span.seq_len]", ": span.seq_len + 1]"),
        (DECODES, ": span.seq_len]", ": span.seq_len - 1]"),
        (DECODES, "region : region + 1", ": 1"),
        (DECODES, "(k_cache.shape[1], -1))", "(-1, k_cache.shape[1])).transpose(1, 2)"),
        (PROMPTS_TOO, "0, batch.slot_mapping, new", "0, batch.slot_mapping.flip(0), new"),
        (PROMPTS_TOO, "causal_mask(span, dtype, batch.block_tables.device)", "None"),
    ],
)
def test_a_deliberate_fault_of_attention_is_caught(sizes, right, wrong):
    mutant = compiled(unpaged, (right, wrong))
    setup = paged_setup(sizes)
    cache, batch = in_regions(setup, sizes, torch.float32, sliced=False)
    new = setup.new(setup.keys), setup.new(setup.values)
    mutant.unpaged_store_kv(*new, *cache.layers[1], batch)
    k_cache, _ = cache.layers[1]
    batch = mutant.prepare_unpaged(batch, k_cache, setup.q.shape[1], torch.float32)
    out = mutant.unpaged_attention(setup.q, *cache.layers[1], batch, setup.scale)
    assert not torch.allclose(out.double(), dense_attention(setup), atol=1e-3, rtol=1e-3)


def in_regions(setup, sizes, dtype, sliced):
    """The contexts of a setup in regions that are otherwise full of NaN, and a batch over them."""
    kv_heads, head_dim = setup.keys[0].shape[1:]
    model = ModelConfig(
        architecture="", num_layers=3, num_heads=4, num_kv_heads=kv_heads, head_dim=head_dim,
        hidden_size=1, vocab_size=1, max_position_embeddings=128,
    )  # fmt: skip
    layout = RegionLayout.for_model(
        model, dtype.itemsize, num_regions=len(sizes) + 2, longest=128, page_bytes=SMALL_PAGE,
        sliced=sliced,
    )  # fmt: skip
    cache = VirtualKVCache(model, layout, dtype)
    regions = torch.randperm(len(sizes) + 2, generator=torch.Generator().manual_seed(1)).tolist()
    queries = []
    for i, (query_len, context_len) in enumerate(sizes):
        needed = range(layout.groups_for(query_len + context_len))
        cache.pages.map(regions[i], needed)
        fill_with_nan(cache, regions[i], needed)
        for kv, numbers in zip(cache.layers[1], (setup.keys, setup.values), strict=True):
            kv[regions[i], :, :context_len] = numbers[i][:context_len].transpose(0, 1)
        table = BlockTable(layout.region_len, [regions[i]], query_len + context_len)
        queries.append(SequenceInput(i, [0] * query_len, context_len, table.blocks))
    return cache, BatchBuilder(len(sizes), 1, layout.region_len).build(queries)


def fill_with_nan(cache: VirtualKVCache, region: int, groups: range) -> None:
    view = cache.pages.view()
    for start, length in cache.layout.pieces(region, groups):
        view[start : start + length] = b"\xff" * length


@pytest.mark.parametrize("sliced", [False, True], ids=["whole", "sliced"])
def test_a_copy_copies_all_tokens_and_maps_nothing(sliced):
    setup = paged_setup([(1, 40)])
    cache, _ = in_regions(setup, [(1, 40)], torch.float32, sliced)
    source = next(region for region in range(3) if cache.pages.num_mapped(region))
    target = (source + 1) % 3
    cache.pages.map(target, range(cache.pages.num_mapped(source)))
    resident = cache.pages.resident_bytes()
    cache.copy([(source, target)])
    for kv in cache.layers[1]:
        assert torch.equal(kv[target, :, :40], kv[source, :, :40])
        assert not kv[target, :, :40].isnan().any()
    assert cache.pages.resident_bytes() == resident


# ---- the engine ----------------------------------------------------------------------------------

LENGTHS = (3, 50, 17, 64, 1, 31)
PROMPTS = [[(7 * i + 11 * n) % (VOCAB_SIZE - 3) + 3 for i in range(n)] for n in LENGTHS]
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True),
    "samples": SamplingParams(n=3, temperature=1.2, seed=5, max_tokens=24, ignore_eos=True),
    "beams": BeamSearchParams(beam_width=4, max_tokens=24, ignore_eos=True),
}
OPTIONS = {"max_num_seqs": 12, "max_num_batched_tokens": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(folder):
    llm = LLM(folder, **OPTIONS)
    return {name: tokens(llm.generate(PROMPTS, p, use_tqdm=False)) for name, p in PARAMS.items()}


def tokens(outputs) -> list[list[list[int]]]:
    return [[one.token_ids for one in output.outputs] for output in outputs]


def virtual(folder, memory: str = "virtual", groups: int | None = None, **options) -> LLM:
    """A checked engine over regions; `groups` is the budget in page groups, given as blocks."""
    need(HUGE_PAGE if VIRTUAL[memory].huge_pages else SMALL_PAGE)
    options = {**OPTIONS, "parts": Parts().checked(), **options}
    if groups is None and not VIRTUAL[memory].huge_pages:
        return LLM(folder, memory=memory, **options)
    one = LLM(folder, memory=memory, num_blocks=100_000, **options).engine
    layout = one.executor.runner.kv_cache.layout
    block_bytes = one.executor.runner.model.config.kv_bytes_per_token(4) * 16
    num_blocks = -(-(groups or 40) * layout.group_bytes // block_bytes)
    llm = LLM(folder, memory=memory, num_blocks=num_blocks, **options)
    assert llm.engine.scheduler.memory.budget == (groups or 40)
    return llm


def belief_and_truth(llm: LLM) -> tuple[int, int]:
    cache, memory = llm.engine.executor.runner.kv_cache, llm.engine.scheduler.memory
    return memory.num_mapped * cache.layout.group_bytes, cache.pages.resident_bytes()


@pytest.mark.sampled
@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("memory", VIRTUAL)
def test_regions_give_the_tokens_of_paging(folder, expected, memory, params):
    llm = virtual(folder, memory)
    assert tokens(llm.generate(PROMPTS, PARAMS[params], use_tqdm=False)) == expected[params]
    manager = llm.engine.scheduler.memory
    assert manager.num_free == manager.num_blocks
    believed, resident = belief_and_truth(llm)
    assert believed == resident > 0


@pytest.mark.sampled
@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("memory", ["virtual", "virtual-sliced"])
def test_a_starved_budget_preempts_and_gives_the_same_tokens(folder, expected, memory, params):
    llm = virtual(folder, memory, groups={"virtual": 14, "virtual-sliced": 24}[memory])
    manager = llm.engine.scheduler.memory
    for copy, index in product(range(2), range(len(PROMPTS))):
        llm.engine.add_request(f"{copy} {index}", PROMPTS[index], PARAMS[params])
    finished, preemptions, steps = {}, 0, count()
    while llm.engine.has_unfinished_requests():
        for progress in llm.engine.step():
            if progress.finished:
                output = finished[progress.request_id] = progress.output()
                preemptions += output.metrics.num_preemptions
        if next(steps) % 8 == 0:  # the kernel's account takes longer than a step
            believed, resident = belief_and_truth(llm)
            assert believed == resident <= manager.budget * manager.layout.group_bytes
    for copy in range(2):
        outputs = [finished[f"{copy} {index}"] for index in range(len(PROMPTS))]
        assert tokens(outputs) == expected[params]
    assert preemptions >= 2


def test_stale_values_in_a_region_are_never_read(folder, expected):
    llm = virtual(folder)
    cache = llm.engine.executor.runner.kv_cache
    for name, params in PARAMS.items():
        for region in range(cache.layout.num_regions):
            fill_with_nan(cache, region, range(cache.pages.num_mapped(region)))
        assert tokens(llm.generate(PROMPTS, params, use_tqdm=False)) == expected[name]


@pytest.mark.parametrize("params", ["samples", "beams"])
def test_a_fork_without_its_copy_loses_the_shared_tokens(folder, expected, params, monkeypatch):
    """The proof that the tokens above are those of copies, and not of luck."""
    monkeypatch.setattr(VirtualKVCache, "copy", lambda *_: None)
    outputs = virtual(folder).generate(PROMPTS, PARAMS[params], use_tqdm=False)
    assert tokens(outputs) != expected[params]


def test_the_second_batch_maps_a_quarter_of_the_first_at_most(folder, monkeypatch):
    llm = virtual(folder)
    pages, mapped = llm.engine.executor.runner.kv_cache.pages, []
    map_really = pages.map

    def note(region: int, groups: range) -> None:
        mapped.extend(groups)
        map_really(region, groups)

    monkeypatch.setattr(pages, "map", note)
    llm.generate(PROMPTS, PARAMS["greedy"], use_tqdm=False)
    first = len(mapped)
    llm.generate(PROMPTS, PARAMS["greedy"], use_tqdm=False)
    assert len(mapped) - first <= first / 4


def test_virtual_memory_has_as_many_bytes_as_the_requested_blocks(folder):
    llm = virtual(folder, num_blocks=33, block_size=8)
    memory, model = llm.engine.scheduler.memory, llm.engine.executor.runner.model.config
    pool = 33 * 8 * model.kv_bytes_per_token(4)
    assert memory.budget == pool // memory.layout.group_bytes
    assert memory.num_blocks == OPTIONS["max_num_seqs"]
    assert memory.block_size >= llm.engine.config.max_model_len


def test_unsupported_options_are_refused_with_a_sentence(folder):
    with pytest.raises(InvalidOption, match="backends read whole blocks"):
        virtual(folder, attention_backend="torch")
    with pytest.raises(InvalidOption, match="no pages for the scales"):
        virtual(folder, kv_cache_dtype="int8")
    with pytest.raises(InvalidOption, match="does not swap"):
        virtual(folder, preemption="swap")
    with pytest.raises(InvalidOption, match="but the pool has 6144: raise num_blocks"):
        virtual(folder, num_blocks=1)
    with pytest.raises(InvalidOption, match="attention_backend is 'unpaged': choose one of auto"):
        LLM(folder, attention_backend="unpaged")
    llm = virtual(folder, groups=2)
    length = llm.engine.scheduler.memory.layout.tokens_in(2) + 1
    with pytest.raises(PromptTooLong, match=r"needs 3 page groups .* shorten the prompt by 1 tok"):
        llm.generate([[5] * length], use_tqdm=False)
    with pytest.raises(InvalidRequest, match="enable_prefix_caching"):
        llm.cache_prefix([5] * 20)


def test_the_block_map_draws_regions(folder):
    log = EventLog()
    llm = virtual(folder, groups=14, parts=Parts().checked().traced(log))
    memory = llm.engine.scheduler.memory
    block_map = BlockMap(llm.engine.scheduler)
    log.listeners.append(block_map)
    for params in PARAMS.values():
        llm.generate(PROMPTS, params, use_tqdm=False)
    picture = block_map.fullest().plain
    assert f"of {memory.num_blocks} blocks of {memory.block_size} in use" in picture
    assert {"g", "h", "·"} <= set(picture.splitlines()[-1])


def test_the_embedded_model_answers_from_regions():
    need(SMALL_PAGE)
    story = "Once upon a time Theo the frog put the white key in the meadow."
    prompt = f"{story}\nQ: What did Theo do with the key?\nA:"
    params = SamplingParams(temperature=0.0, max_tokens=32)
    answers = [
        llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].text
        for llm in (LLM(), LLM(memory="virtual"))
    ]
    assert answers[0] == answers[1]
    assert "meadow" in answers[1]


@pytest.mark.parametrize("option", ["dtype", "kv_cache_dtype"])
def test_bfloat16_keys_fit_in_regions(folder, option):
    options = {**OPTIONS, option: "bfloat16"}
    few = {**options, "max_num_seqs": 2}
    runs = [LLM(folder, memory="virtual", **chosen) for chosen in (options, few)]
    params = PARAMS["greedy"]
    # One at a time: in bfloat16, the rounding of products depends on the number of sequences.
    for prompt in PROMPTS:
        many, pairs = (tokens(llm.generate([prompt], params, use_tqdm=False)) for llm in runs)
        assert many == pairs
    if option == "kv_cache_dtype":  # computed in float32
        many, pairs = (tokens(llm.generate(PROMPTS, params, use_tqdm=False)) for llm in runs)
        assert many == pairs


def test_the_layout_of_another_model_is_detected():
    model = ModelConfig(
        architecture="", num_layers=3, num_heads=1, num_kv_heads=1, head_dim=64, hidden_size=64,
        vocab_size=1, max_position_embeddings=64,
    )  # fmt: skip
    layout = RegionLayout.for_model(model, 4, num_regions=2, longest=64, page_bytes=SMALL_PAGE)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        VirtualKVCache(replace(model, head_dim=32), layout, torch.float32)
