"""No number that is left in memory reaches a result, whatever reads the memory.

Every engine here runs a workload twice: once in memory that is all zeros, and once in memory that
is filled with NaN or infinity before each step, as far as no sequence and no cached prefix owns it.
The tokens must be the same.
"""

import sys

import pytest
import torch
from checkpoints import VOCAB_SIZE, make_checkpoint
from engine_runs import assert_all_blocks_are_back
from graphs_on_a_cpu import with_graphs

from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.attention import shared_prefix, torch_decode
from minipaged.attention.virtual_cache import VirtualKVCache

pytestmark = pytest.mark.filterwarnings("ignore:no GPU")

PROMPTS = [[(7 * i + 11 * n) % (VOCAB_SIZE - 3) + 3 for i in range(n)] for n in (5, 9, 2, 4, 11)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=7, ignore_eos=True)
SAMPLES = SamplingParams(n=3, temperature=1.3, seed=4, max_tokens=6, ignore_eos=True)
BEAMS = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
AMPLE = {"block_size": 4, "num_blocks": 64, "max_model_len": 24, "max_num_seqs": 8}
STARVED = AMPLE | {"num_blocks": 11, "watermark": 0.0}

# name: options, then what is asked one after another
WORKLOADS = {
    "prefill": (AMPLE, [(PROMPTS, SamplingParams(temperature=0.0, max_tokens=1))]),
    "decode": (AMPLE, [(PROMPTS, GREEDY)]),
    "chunks": (AMPLE | {"max_num_batched_tokens": 8}, [(PROMPTS, GREEDY)]),
    "samples": (AMPLE, [(PROMPTS[:2], SAMPLES)]),
    "beams": (AMPLE, [(PROMPTS[:2], BEAMS)]),
    "swapping": (STARVED | {"preemption": "swap"}, [(PROMPTS[:3], [GREEDY, SAMPLES, BEAMS])]),
    "recomputation": (
        STARVED | {"preemption": "recompute", "num_swap_blocks": 0},
        [(PROMPTS[:3], [GREEDY, SAMPLES, BEAMS])],
    ),
    "few": (AMPLE, [(PROMPTS[1:4], SamplingParams(temperature=0.0, max_tokens=3))]),
    "cached prefix": (AMPLE, [(PROMPTS, GREEDY), (PROMPTS[4:], SAMPLES), (PROMPTS[1:2], GREEDY)]),
}
MATRIX = tuple(name for name in WORKLOADS if name != "few")  # short, so it can show little
ANY_MEMORY = ("prefill", "decode", "chunks", "samples", "beams")
BASELINES = ("contiguous-max", "contiguous-pow2", "contiguous-oracle", "static")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"), head_dim=16)


def numbers_of(llm: LLM, workload: str):
    """All tokens that a workload gives, and its log-probabilities."""
    found = []
    for prompts, params in WORKLOADS[workload][1]:
        if isinstance(params, BeamSearchParams):
            outputs = llm.beam_search(prompts, params, use_tqdm=False)
        else:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        found += [(c.token_ids, c.cumulative_logprob) for o in outputs for c in o.outputs]
    assert_all_blocks_are_back(llm)
    return found


def fill(tensor: torch.Tensor, value: float) -> None:
    if tensor.dtype == torch.int8:
        tensor.fill_(127)
    else:  # float8 has no infinity
        tensor.copy_(torch.full_like(tensor, value, dtype=torch.float32))


def poison(llm: LLM, value: float) -> None:
    """Fill all that has no owner: blocks, swap blocks, and tables that steps use again."""
    memory, cache = llm.engine.memory, llm.engine.executor.runner.kv_cache
    if isinstance(cache, VirtualKVCache):
        owned = {table.blocks[0] for table in memory.tables.values()}
        for region in range(memory.num_blocks):
            mapped = cache.layout.tokens_in(cache.pages.num_mapped(region))
            if region not in owned:
                fill(cache._pool[:, :, region, : min(mapped, cache.layout.region_len)], value)
        return
    in_tables = {b for table in memory.tables.values() for b in table.blocks}
    for block in set(range(memory.num_blocks)) - in_tables - set(memory.cached):
        for tensor in cache._pool:
            fill(tensor[:, :, block], value)
    for block in range(memory.num_swap_blocks):
        if memory.swap_ref_count(block) == 0:
            for tensor in cache._swap_pool:
                fill(tensor[:, :, block], value)
    batches = llm.engine.executor.runner.batches
    for tables in {"_tables", "_device_tables"} & vars(batches).keys():
        getattr(batches, tables)[:] = 2**31 - 1
    batches._written = [[] for _ in batches._written]


def poisoned(llm: LLM, value: float) -> LLM:
    """The same engine, in which `poison` comes before each step."""
    step = llm.engine.step

    def poisoned_step():
        poison(llm, value)
        return step()

    llm.engine.step = poisoned_step
    return llm


def check(folder, workload: str, value: float, monkeypatch, prepare=lambda llm: llm, **options):
    options = WORKLOADS[workload][0] | options
    clean = prepare(LLM(folder, **options))
    expected = [numbers_of(clean, workload) for _ in range(2)]
    empty = torch.empty

    def no_zeros(*shape, **kinds):
        tensor = empty(*shape, **kinds)
        return tensor.fill_(value) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", no_zeros)
    llm = poisoned(prepare(LLM(folder, **options)), value)
    assert [numbers_of(llm, workload) for _ in range(2)] == expected


@pytest.fixture(params=[torch.nan, torch.inf], ids=["nan", "inf"])
def value(request):
    return request.param


@pytest.fixture(params=["gathered", "in place", "prefixes once", "prefixes once, rest in place"])
def way(request, monkeypatch):
    """All ways of decoding in pure PyTorch, whatever the size of the batch."""
    monkeypatch.setattr(torch_decode, "_is_worth_it", lambda *_: "in place" in request.param)
    fewest_saved = 0 if "once" in request.param else 2**60
    monkeypatch.setattr(shared_prefix, "FEWEST_SAVED", fewest_saved)
    monkeypatch.setattr(torch_decode, "LEAST_IN_USE", 0)
    monkeypatch.setattr(torch_decode, "MOST_ENTRIES", 100)


@pytest.mark.sampled
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "float16", "int8", "fp8"])
@pytest.mark.parametrize("workload", MATRIX)
@pytest.mark.usefixtures("way")
def test_torch_reads_nothing_stale(folder, workload, value, kv_cache_dtype, monkeypatch):
    check(folder, workload, value, monkeypatch, kv_cache_dtype=kv_cache_dtype)


@pytest.mark.sampled
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("workload", MATRIX)
@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_plain_attention_reads_nothing_stale(
    folder, backend, workload, value, kv_cache_dtype, monkeypatch
):
    options = {"attention_backend": backend, "kv_cache_dtype": kv_cache_dtype}
    check(folder, workload, value, monkeypatch, **options)


@pytest.mark.sampled
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("memory", BASELINES)
@pytest.mark.parametrize("workload", ANY_MEMORY)
@pytest.mark.usefixtures("way")
def test_a_reused_contiguous_region_is_cleared(
    folder, workload, memory, value, kv_cache_dtype, monkeypatch
):
    options = {"enable_prefix_caching": False, "kv_cache_dtype": kv_cache_dtype}
    options |= {"memory": memory, "num_blocks": 96}
    check(folder, workload, value, monkeypatch, **options)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("memory", ["virtual", "virtual-sliced"])
@pytest.mark.parametrize("workload", ANY_MEMORY)
def test_a_reused_region_of_virtual_memory_is_cleared(folder, workload, memory, value, monkeypatch):
    options = {"enable_prefix_caching": False, "memory": memory}
    check(folder, workload, value, monkeypatch, **options)


@pytest.mark.full  # interpreted, a step takes a second
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("backend", ["triton", "triton-naive"])
def test_kernels_read_nothing_stale(folder, backend, kv_cache_dtype, monkeypatch):
    pytest.importorskip("triton")
    options = {"attention_backend": backend, "kv_cache_dtype": kv_cache_dtype}
    for workload in ("chunks", "swapping"):
        check(folder, workload, torch.nan, monkeypatch, **options)


def test_padded_rows_of_a_graph_read_nothing_stale(folder, monkeypatch):
    pytest.importorskip("triton")
    check(folder, "few", torch.nan, monkeypatch, with_graphs, attention_backend="triton")
