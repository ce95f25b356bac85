"""Every option and part under every kind of memory: it has an effect, or it is refused by name."""

import warnings
from dataclasses import fields
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from checkpoints import make_checkpoint

from minipaged import LLM, Parts, SamplingParams
from minipaged.attention.backend import BACKENDS
from minipaged.config import OPTIONS, MemoryKind
from minipaged.engine import refusals
from minipaged.engine.arg_utils import LLMArgs
from minipaged.engine.refusals import UNUSED_OPTIONS, UNUSED_PARTS, refuse_what_is_ignored
from minipaged.engine.sampling_request import SamplingRequest
from minipaged.errors import InvalidOption
from minipaged.memory import BlockAllocator, BlockManager, BlockTable, PrefixCache
from minipaged.memory.baselines.contiguous import CONTIGUOUS
from minipaged.memory.baselines.pages import HUGE_PAGE, SMALL_PAGE, why_no_pages_of
from minipaged.memory.baselines.virtual import VIRTUAL
from minipaged.models.linear import Linear
from minipaged.scheduler.fcfs import FCFSScheduler, youngest
from minipaged.utils import device

KINDS = get_args(MemoryKind)
PROMPTS = [[5 + n] * (7 * n + 1) for n in range(6)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
SMALL = {"block_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def need_pages(memory: str) -> None:
    if memory in VIRTUAL:
        reason = why_no_pages_of(HUGE_PAGE if VIRTUAL[memory].huge_pages else SMALL_PAGE)
        if reason is not None:
            pytest.skip(reason)


def small(memory: str) -> dict[str, object]:
    """Options for a small pool; pages of 2 MiB need more bytes for the same requests."""
    num_blocks = 100_000 if memory in VIRTUAL and VIRTUAL[memory].huge_pages else 40
    return {**SMALL, "memory": memory, "num_blocks": num_blocks}


def build(folder, memory: str, **options) -> LLM:
    need_pages(memory)
    return LLM(folder, **{**small(memory), **options})


# ---- parts ---------------------------------------------------------------------------------------


def spies(calls: list[str]) -> dict[str, object]:
    """Custom parts that do what the library's do, and note that they were called."""

    def noting(name: str, function):
        def call(*positional, **named):
            calls.append(name)
            return function(*positional, **named)

        return call

    class Table(BlockTable):
        def __init__(self, *positional, **named) -> None:
            calls.append("block_table")
            super().__init__(*positional, **named)

    reference = BACKENDS["reference"]
    return {
        "allocator": noting("allocator", BlockAllocator),
        "block_table": Table,
        "prefix_cache": noting("prefix_cache", PrefixCache),
        "memory": noting("memory", BlockManager),
        "scheduler": noting("scheduler", FCFSScheduler),
        "select_victim": noting("select_victim", youngest),
        "paged_attention": noting("paged_attention", reference.paged_attention),
        "store_kv": noting("store_kv", reference.store_kv),
        "sampling_request": noting("sampling_request", SamplingRequest),
        "adjust_logits": noting("adjust_logits", lambda logits, rows: logits),
        "memory_wrappers": (noting("memory_wrappers", lambda build: build),),
        "scheduler_wrappers": (noting("scheduler_wrappers", lambda scheduler: scheduler),),
        "executor_wrappers": (noting("executor_wrappers", lambda executor: executor),),
    }


PARTS = [each.name for each in fields(Parts)]


def scarce(folder, memory: str) -> dict[str, int]:
    """Options under which requests have to be preempted, where this memory preempts."""
    if memory not in VIRTUAL:
        return {}
    engine = build(folder, memory, num_blocks=100_000).engine
    group_bytes = engine.executor.runner.kv_cache.layout.group_bytes
    block_bytes = 4 * engine.executor.runner.model.config.kv_bytes_per_token(4)
    return {"num_blocks": -(-7 * group_bytes // block_bytes)}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("memory", KINDS)
def test_a_part_is_called_or_refused(folder, memory, part):
    calls: list[str] = []
    parts = Parts(**{part: spies(calls)[part]})
    if part in {unused.name for unused in UNUSED_PARTS[memory]}:
        with pytest.raises(InvalidOption, match=f"part {part} would never be called") as refusal:
            LLM(folder, memory=memory, parts=parts)
        assert refusal.value.param == part
        return
    if part == "select_victim" and memory in VIRTUAL and VIRTUAL[memory].huge_pages:
        pytest.skip("no sequence of this small model outgrows a page of 2 MiB")
    need_pages(memory)
    options = scarce(folder, memory) if part == "select_victim" else {}
    build(folder, memory, parts=parts, **options).generate(PROMPTS, PARAMS, use_tqdm=False)
    assert part in calls


@pytest.mark.parametrize("memory", KINDS)
def test_every_memory_accepts_the_parts_of_the_library_even_checked(folder, memory):
    build(folder, memory, parts=Parts())
    build(folder, memory, parts=Parts().checked())


@pytest.mark.parametrize("memory", CONTIGUOUS)
def test_a_custom_scheduler_may_preempt_where_the_default_one_never_does(folder, memory):
    own = spies([])
    with pytest.raises(InvalidOption, match="part select_victim would never be called"):
        LLM(folder, memory=memory, parts=Parts(select_victim=own["select_victim"]).checked())
    parts = Parts(select_victim=own["select_victim"], scheduler=own["scheduler"])
    build(folder, memory, parts=parts)


# ---- options -------------------------------------------------------------------------------------


def block_bytes_of(llm: LLM) -> object:
    """The size of the pool: in blocks, or the bytes of a budget."""
    memory = llm.engine.scheduler.memory
    return getattr(memory, "budget", None) or (memory.block_size, memory.num_blocks)


EFFECTS = {
    "model": lambda llm: str(llm.folder),
    "device": lambda llm: llm.engine.executor.runner.kv_cache.device,
    "dtype": lambda llm: next(llm.engine.executor.runner.model.parameters()).dtype,
    "weight_dtype": lambda llm: {
        type(module.packed)
        for module in llm.engine.executor.runner.model.modules()
        if isinstance(module, Linear)
    },
    "attention_backend": lambda llm: attention_of(llm).name,
    "seed": lambda llm: [
        output.outputs[0].token_ids
        for output in llm.generate(PROMPTS, SamplingParams(temperature=2.0), use_tqdm=False)
    ],
    "memory": lambda llm: type(llm.engine.scheduler.memory),
    "kv_cache_dtype": lambda llm: [
        getattr(pool, "numbers", pool).dtype
        for pool in llm.engine.executor.runner.kv_cache.layers[0]
    ],
    "block_size": block_bytes_of,
    "num_blocks": block_bytes_of,
    "num_swap_blocks": lambda llm: llm.engine.scheduler.memory.num_swap_blocks,
    "enable_prefix_caching": lambda llm: (
        llm.generate([PROMPTS[-1]] * 2, PARAMS, use_tqdm=False)[1].num_cached_tokens > 0
    ),
    "watermark": lambda llm: watermark_of(llm),
    "fixed_split_size": lambda llm: attention_of(llm).paged_attention.keywords,
    "tensor_parallel_size": lambda llm: type(llm.engine.executor),
}
"""What to look at in an engine. An option that is not among them is read by the scheduler."""

VALUES = {
    "dtype": ["bfloat16"],
    "weight_dtype": ["float16"],
    "attention_backend": ["reference", "blockwise"],
    "fixed_split_size": [256],
    "seed": [1],
    "kv_cache_dtype": ["bfloat16", "int8"],
    "block_size": [8],
    "num_blocks": [200_001],
    "num_swap_blocks": [0, 3],
    "enable_prefix_caching": [True, False],
    "max_model_len": [64],
    "max_logprobs": [-1, 0],
    "max_num_seqs": [3],
    "max_num_batched_tokens": [50],
    "enable_chunked_prefill": [False],
    "preemption": ["recompute", "swap"],
    "watermark": [0.5],
    "async_scheduling": [True],
    "tensor_parallel_size": [2],
    "start_timeout": [5.5],
    "step_timeout": [5.5],
}
"""Values that differ from the default, and so ask for something."""

ALREADY_SO = {
    "device": "a machine without a GPU has one device",
    "gpu_memory_utilization": "a CPU has no GPU's memory to share out",
    "enforce_eager": "a CPU launches every kernel: there is no CUDA graph to replay",
    "model": "which model it is matters to no memory",
    "memory": "the other parameter of this test",
}


def attention_of(llm: LLM):
    for module in llm.engine.executor.runner.model.modules():
        for value in vars(module).values():
            if hasattr(value, "paged_attention"):
                return value
    raise AssertionError("the model has no attention backend")


def watermark_of(llm: LLM) -> int:
    memory = llm.engine.scheduler.memory
    names = ("_watermark_blocks", "_watermark_groups")
    return next(getattr(memory, name) for name in names if hasattr(memory, name))


def observed(llm: LLM, name: str) -> object:
    return EFFECTS.get(name, lambda llm: getattr(llm.engine.scheduler.config, name))(llm)


def test_every_option_is_in_the_enumeration():
    assert set(VALUES) | set(ALREADY_SO) == set(OPTIONS)


@pytest.mark.parametrize(
    ("option", "value"), [(name, value) for name, values in VALUES.items() for value in values]
)
@pytest.mark.parametrize("memory", KINDS)
def test_an_option_has_an_effect_or_is_refused(folder, memory, option, value):
    other = {"max_num_batched_tokens": 128} if option == "enable_chunked_prefill" else {}
    asked = {**small(memory), **other, option: value}
    said = refusal("cpu", **asked)
    if said:
        with pytest.raises(InvalidOption, match=f"^{option} is {value!r}, but ") as error:
            LLM(folder, **asked)
        assert error.value.param == option
        return
    need_pages(memory)
    llm = LLM(folder, **asked)
    if option in ("enable_prefix_caching", "num_swap_blocks"):
        assert observed(llm, option) == value  # may be what this memory does by default
        return
    assert observed(llm, option) != observed(LLM(folder, **small(memory)), option)


@pytest.mark.parametrize("memory", KINDS)
def test_every_memory_works_with_the_default_options(folder, memory):
    llm = build(folder, memory)
    assert llm.engine.config.enable_prefix_caching == (memory == "paged")
    assert (llm.engine.config.num_swap_blocks > 0) == (memory == "paged")


# ---- devices and backends ------------------------------------------------------------------------


def refusal(device_type: str, parts: Parts | None = None, **options) -> str:
    try:
        refuse_what_is_ignored(LLMArgs(**options), parts or Parts(), device_type)
    except InvalidOption as error:
        return str(error)
    return ""


def test_gpu_memory_utilization_is_accepted_on_every_device():
    half = {"gpu_memory_utilization": 0.5}
    for device_type in ("cpu", "cuda"):
        assert refusal(device_type, **half) == refusal(device_type, num_blocks=7, **half) == ""


@pytest.mark.parametrize("memory", VIRTUAL)
def test_virtual_memory_is_refused_on_a_gpu(memory):
    assert 'choose device="cpu", or memory="paged"' in refusal("cuda", memory=memory)
    assert refusal("cpu", memory=memory) == ""


@pytest.mark.parametrize("backend", OPTIONS["attention_backend"].choices)
def test_a_backend_whose_attention_is_replaced_as_a_whole_is_refused(backend):
    own = spies([])
    both = Parts(paged_attention=own["paged_attention"], store_kv=own["store_kv"])
    said = refusal("cpu", both, attention_backend=backend)
    assert ("replace all of its attention" in said) == (backend != "auto")
    one = Parts(paged_attention=own["paged_attention"])
    assert refusal("cpu", one, attention_backend=backend) == ""


def test_weights_in_float16_are_refused_where_nothing_rounds_them(monkeypatch):
    for weight_dtype in ("float32", "float16"):
        asked = {"weight_dtype": weight_dtype}
        assert "a GPU multiplies weights in the type" in refusal("cuda", **asked)
        for dtype in ("bfloat16", "half"):
            assert f"dtype is {dtype!r}, and only float32" in refusal("cpu", dtype=dtype, **asked)
        assert refusal("cpu", dtype="float32", **asked) == refusal("cpu", **asked) == ""
    monkeypatch.setattr(refusals, "works", lambda form: False)
    assert "cannot multiply such weights" in refusal("cpu", weight_dtype="float16")
    assert refusal("cpu", weight_dtype="float32") == ""


@pytest.mark.filterwarnings("ignore:no GPU")
def test_a_fixed_split_size_reaches_the_only_kernel_that_makes_splits(folder):
    pytest.importorskip("triton")
    triton = {"attention_backend": "triton", "fixed_split_size": 512}
    llm = LLM(folder, **triton)
    assert observed(llm, "fixed_split_size") == {"fixed_split_size": 512}
    for backend in set(OPTIONS["attention_backend"].choices) - {"triton"}:
        for device_type in ("cpu", "cuda"):
            said = refusal(device_type, **triton | {"attention_backend": backend})
            assert f"attention_backend is {backend!r}" in said
    own = Parts(paged_attention=spies([])["paged_attention"])
    assert "the part paged_attention replaces the kernel" in refusal("cuda", own, **triton)


@pytest.mark.parametrize("device", ["cpu:1", "cuda:99", "tpu"])
def test_a_device_that_is_not_there_is_refused_by_name(folder, device):
    if torch.cuda.is_available() and device.startswith("cuda"):
        said = "device is 'cuda:99'"
    else:
        said = "device"
    with pytest.raises(InvalidOption, match=said) as error:
        LLM(folder, device=device)
    assert error.value.param == "device"


def test_refusals_name_options_and_parts_that_exist():
    names = {each.name for each in fields(Parts)}
    for kind in KINDS:
        assert {unused.name for unused in UNUSED_PARTS[kind]} <= names
        assert {unused.name for unused in UNUSED_OPTIONS[kind]} <= set(OPTIONS)


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_on_a_processor_without_it_is_called_slow(folder, monkeypatch, supported):
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda: supported)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LLM(folder, dtype="bfloat16", device="cpu", num_blocks=8)
        LLM(folder, dtype="float32", device="cpu", num_blocks=8)
    said = [str(each.message) for each in caught if "bfloat16" in str(each.message)]
    assert said == [] if supported else "leave out dtype" in said[0]
    assert len(said) == (0 if supported else 1)


@pytest.mark.parametrize(
    ("machine", "found", "expected"),
    [
        ("x86_64", {"_is_avx512_bf16_supported": False, "_is_amx_tile_supported": False}, False),
        ("x86_64", {"_is_avx512_bf16_supported": False, "_is_amx_tile_supported": True}, True),
        ("AMD64", {"_is_avx512_bf16_supported": True}, True),
        ("x86_64", {}, True),  # unknown
        ("arm64", {"_is_avx512_bf16_supported": False}, True),
    ],
)
def test_a_processor_without_bfloat16_is_recognised(monkeypatch, machine, found, expected):
    monkeypatch.setattr(device.platform, "machine", lambda: machine)
    answers = {name: (lambda is_there=is_there: is_there) for name, is_there in found.items()}
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(**answers))
    assert device.multiplies_bfloat16() is expected
