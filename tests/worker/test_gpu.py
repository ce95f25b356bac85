"""What only a GPU can show: `pytest -m gpu`. Everywhere else these tests are skipped.

The same kernels run interpreted in test_triton.py; here they are compiled, in all types, over long
contexts, over pools that 32 bits cannot number, and inside CUDA graphs.
"""

import warnings
from collections.abc import Callable
from itertools import product

import pytest
import torch

from minipaged import LLM, SamplingParams
from minipaged.attention import kv_cache
from minipaged.attention.backend import choose_backend
from minipaged.attention.kv_cache import KVCache
from minipaged.attention.quantized_cache import QuantizedPool
from minipaged.attention.reference import reference_paged_attention, store_kv
from minipaged.config import ModelConfig
from minipaged.evaluation.bench.cases import Case, Heads, contiguous_attention, make_inputs
from minipaged.evaluation.testing.paged_setup import dense_attention, paged_setup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

DEVICE = torch.device("cuda")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
MIXED = [(1, 6), (5, 0), (3, 5), (1, 700), (1, 0), (64, 300), (200, 4), (2, 15), (1, 2049)]
KERNELS = ["triton", "triton-naive"]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [
        *((h, kv, d, 16) for (h, kv), d in product([(4, 4), (8, 2), (8, 1)], [32, 64, 128])),
        *((4, 2, d, 16) for d in (16, 33, 80, 96, 256)),
        *((9, 3, 64, b) for b in (1, 2, 3, 4, 8, 32, 64, 128)),
    ],
)
def test_a_mixed_batch_gives_what_dense_attention_gives(
    backend: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    setup = paged_setup(
        MIXED,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
    )
    there = setup.to(DEVICE)
    attend = choose_backend(backend, DEVICE, head_dim).paged_attention
    out = attend(there.q, there.k_cache, there.v_cache, there.batch, there.scale)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        out.cpu().double(), dense_attention(setup), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(("num_seqs", "length"), [(1, 32768), (12, 16384), (64, 1024), (256, 512)])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
def test_long_contexts_are_split_and_merged(num_seqs: int, length: int, kv_dtype: str) -> None:
    if kv_dtype == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    case = Case(Heads("", 32, 8, 128), num_seqs, length, kv_dtype=kv_dtype)
    inputs = make_inputs(case, DEVICE, torch.bfloat16)
    attend = choose_backend("triton", DEVICE, 128, kv_dtype).paged_attention
    out = attend(inputs.q, inputs.k_cache, inputs.v_cache, inputs.batch, inputs.scale)
    [expected, *_] = contiguous_attention(inputs, case).values()
    tolerance = 1e-2 if kv_dtype == "auto" else 5e-2
    torch.testing.assert_close(out, expected(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("queries", [4096, 512, 17])
def test_a_prefill_of_4096_tokens_gives_what_dense_attention_gives(queries: int) -> None:
    case = Case(Heads("", 32, 8, 128), 1, 4096, queries=queries)
    inputs = make_inputs(case, DEVICE, torch.bfloat16)
    attend = choose_backend("triton", DEVICE, 128).paged_attention
    out = attend(inputs.q, inputs.k_cache, inputs.v_cache, inputs.batch, inputs.scale)
    [expected, *_] = contiguous_attention(inputs, case).values()
    torch.testing.assert_close(out, expected(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_pool_of_more_than_2_to_the_31_elements_is_read_correctly(backend: str) -> None:
    setup = paged_setup([(1, 100), (40, 30)], head_dim=128, block_size=16, dtype=torch.bfloat16)
    block = setup.k_cache[0].numel()
    free = 2**31 // block + 1  # blocks, so that every offset is beyond 2^31
    bytes_needed = 2 * 2 * (free + 100) * block * 2  # each pool exists twice for a moment
    if torch.cuda.mem_get_info()[0] < 1.2 * bytes_needed:
        pytest.skip(f"needs {bytes_needed / 2**30:.0f} GiB")
    there = setup.to(DEVICE).after(free)
    chosen = choose_backend(backend, DEVICE, 128)
    k, v = setup.new(setup.keys).to(DEVICE), setup.new(setup.values).to(DEVICE)
    chosen.store_kv(k, v, there.k_cache, there.v_cache, there.batch)
    out = chosen.paged_attention(there.q, there.k_cache, there.v_cache, there.batch, there.scale)
    torch.testing.assert_close(out.cpu().double(), dense_attention(setup), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_8_bit_keys_are_stored_and_read_as_the_reference_does(kv_dtype: torch.dtype) -> None:
    if kv_dtype is not torch.int8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    there = paged_setup([(9, 0), (30, 0), (2, 0)], head_dim=64, block_size=16).to(DEVICE)
    k, v = torch.randn(2, 41, 2, 64, device=DEVICE)

    def empty() -> QuantizedPool:
        numbers = torch.zeros(there.k_cache.shape, dtype=kv_dtype, device=DEVICE)
        return QuantizedPool(numbers, torch.zeros(numbers.shape[:3], device=DEVICE))

    backend = choose_backend("triton", DEVICE, 64)
    pools, expected = (empty(), empty()), (empty(), empty())
    backend.store_kv(k, v, *pools, there.batch)
    store_kv(k, v, *expected, there.batch)
    for pool, right in zip(pools, expected, strict=True):
        torch.testing.assert_close(pool.scales, right.scales, rtol=1e-6, atol=0)
        close = (pool.numbers.float() - right.numbers.float()).abs()
        # A number between two steps may be rounded either way by another division.
        step = 1.0 if kv_dtype is torch.int8 else right.numbers.float().abs() / 8 + 0.01
        assert (close <= step).all()
        assert (close > 0).float().mean() < 0.01
    out = backend.paged_attention(there.q, *pools, there.batch, there.scale)
    right = reference_paged_attention(there.q, *pools, there.batch, there.scale)
    torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-4)


# ---- cache and engine ----------------------------------------------------------------------------

CONFIG = ModelConfig(
    architecture="",
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    hidden_size=256,
    vocab_size=100,
    max_position_embeddings=100,
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_blocks_are_swapped_out_while_others_take_their_place(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "_BYTES_SET_ASIDE", 2**17)  # a few blocks at a time
    copier = choose_backend(backend, DEVICE, 64).copy_blocks
    cache = KVCache(
        CONFIG, 64, 16, num_swap_blocks=64, dtype=dtype, device=DEVICE, copy_blocks=copier
    )
    for tensor in cache._pool:
        tensor.copy_(torch.randint(-100, 100, tensor.shape, device=DEVICE))
    before = [tensor.clone() for tensor in cache._pool]
    cache.swap_out([(i, 63 - i) for i in range(40)])
    for tensor in cache._pool:
        tensor.fill_(7)  # at once: the blocks belong to others now
    cache.copy([(50, 51), (50, 52)])
    cache.swap_in([(63 - i, i + 10) for i in range(40)])
    for tensor, old in zip(cache._pool, before, strict=True):
        assert torch.equal(tensor[:, :, 10:50], old[:, :, :40])
        assert (tensor[:, :, 50:] == 7).all()


def generate(**options) -> list[list[int]]:
    llm = LLM("storyteller", device="cuda", dtype="float32", num_blocks=400, **options)
    prompts = ["Theo the frog", "Mia", "In the village", "Where is the key of Theo?"] * 4
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def test_the_engine_writes_the_same_with_and_without_graphs() -> None:
    expected = generate(attention_backend="reference")
    assert generate(attention_backend="triton") == expected
    assert generate(attention_backend="triton", enforce_eager=True) == expected
    assert generate(attention_backend="triton-naive") == expected
    assert generate(attention_backend="torch") == expected


def test_auto_means_triton_on_a_gpu() -> None:
    assert choose_backend("auto", DEVICE, 128).name == "triton"
    assert choose_backend("auto", DEVICE, 512).name == "torch"


def waits(work: Callable[[], object]) -> int:
    """How often the host waits for the GPU meanwhile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # warns of itself, too
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(w.message) for w in caught)


@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=20, min_p=0.01, max_tokens=20, seed=1),
        SamplingParams(
            repetition_penalty=1.2,
            presence_penalty=0.1,
            logit_bias={5: 1.0},
            min_tokens=15,
            logprobs=5,
            max_tokens=20,
            ignore_eos=True,
        ),
    ],
    ids=["greedy", "sampled", "penalised"],
)
def test_a_decode_step_waits_for_the_gpu_once(params: SamplingParams, enforce_eager: bool) -> None:
    llm = LLM("storyteller", device="cuda", num_blocks=400, enforce_eager=enforce_eager)
    for i in range(4):
        llm.engine.add_request(str(i), "Theo the frog", params)
    for _ in range(4):
        llm.engine.step()  # prefill, compilation, recording
    assert waits(llm.engine.step) == 1
