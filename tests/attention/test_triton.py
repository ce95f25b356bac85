"""The Triton kernels against the reference: on a GPU if there is one, else interpreted.

The expected results come from PyTorch on the CPU. All scratch memory is poisoned: in this file
`torch.empty` returns NaN, so a number that no kernel wrote is noticed.
"""

import importlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minipaged.attention import kv_cache
from minipaged.attention.backend import PagedAttention, choose_backend
from minipaged.attention.batch import Batch
from minipaged.attention.blockwise import blockwise_paged_attention
from minipaged.attention.quantized_cache import (
    LARGEST,
    SMALLEST_SCALE,
    KVPool,
    QuantizedPool,
    quantize,
)
from minipaged.attention.reference import gather, reference_paged_attention, store_kv
from minipaged.attention.torch_paged import prepare_torch, torch_paged_attention
from minipaged.attention.triton import decode as decode_module
from minipaged.attention.triton import machine
from minipaged.attention.triton.backend import triton_paged_attention
from minipaged.attention.triton.copy_blocks import CHUNK_BYTES, copy_blocks
from minipaged.attention.triton.decode import count_places, decode
from minipaged.attention.triton.machine import (
    Multiprocessor,
    is_interpreted,
    programs_per_sm,
    why_no_triton,
)
from minipaged.attention.triton.naive_decode import naive_paged_attention
from minipaged.attention.triton.prefill import prefill
from minipaged.attention.triton.shapes import TileShape, TileShapes
from minipaged.attention.triton.splits import (
    LONGEST_SPLIT,
    MOST_SPLITS,
    SHORTEST_SPLIT,
    SPLIT_RULE,
    most_splits,
    splits_to_fill,
)
from minipaged.attention.triton.store_kv import rope_and_store_kv, triton_store_kv
from minipaged.errors import InvalidOption
from minipaged.evaluation.bench.cases import largest_error
from minipaged.evaluation.testing.paged_setup import PagedSetup, dense_attention, paged_setup
from minipaged.models.rope import Rotary, rotate
from minipaged.models.rope_config import RopeConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EMPTY = torch.empty  # before it is poisoned

KERNELS = "minipaged.attention.triton"
TOLERANCE = {
    torch.float32: 2e-5,
    torch.float16: 4e-3,  # half a unit in the last place of 4 is 2e-3
    torch.bfloat16: 4e-2,  # ... and 1.6e-2, or 3.1e-2 interpreted: it cuts digits off, unrounded
}
# Decode, prefill and chunks, one sequence without a query, one with a single key. They end at,
# before and after boundaries of blocks and of tiles, which are of 16, 32 or 64.
MIXED = [(1, 6), (5, 0), (3, 61), (1, 62), (0, 3), (1, 63), (1, 0), (1, 64), (8, 24), (2, 15)]
LONG = [(1, 126), (1, 127), (40, 30), (1, 128), (3, 125), (66, 0), (1, 129), (17, 47), (2, 14)]
FEW = [(1, 6), (3, 5), (0, 3), (1, 0), (2, 15)]  # the naive kernel has many programs

EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]
no_fp8_here = pytest.mark.skipif(
    DEVICE == "cuda" and why_no_triton(torch.device(DEVICE), 64, "fp8") is not None,
    reason="this GPU has no float8",
)
every_format = pytest.mark.parametrize(
    "dtype", [torch.int8, pytest.param(torch.float8_e4m3fn, marks=no_fp8_here)], ids=["int8", "fp8"]
)
# Interpreted, Triton loses the carry where rounding a float8 leads to the next power of two.
every_format_to_store = pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        pytest.param(
            torch.float8_e4m3fn,
            marks=[no_fp8_here, pytest.mark.skipif(is_interpreted(), reason="wrong, interpreted")],
        ),
    ],
    ids=["int8", "fp8"],
)
every_kernel = pytest.mark.parametrize(
    "attention", [triton_paged_attention, naive_paged_attention], ids=["triton", "naive"]
)


@pytest.fixture(autouse=True, scope="module")
def _poisoned_scratch() -> Iterator[None]:
    def poisoned(*shape: Any, **options: Any) -> Tensor:
        tensor = EMPTY(*shape, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        yield


def on_device(setup: PagedSetup) -> PagedSetup:
    """The setup where the kernels read it; what is expected stays on the CPU."""
    return replace(
        setup,
        q=setup.q.to(DEVICE),
        k_cache=pool_on_device(setup.k_cache),
        v_cache=pool_on_device(setup.v_cache),
        batch=batch_on_device(setup.batch),
    )


def batch_on_device(batch: Batch) -> Batch:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return replace(batch, **{name: tensor.to(DEVICE) for name, tensor in tensors.items()})


def pool_on_device(pool: KVPool) -> KVPool:
    if isinstance(pool, QuantizedPool):
        return QuantizedPool(pool.numbers.to(DEVICE), pool.scales.to(DEVICE))
    return pool.to(DEVICE)


def run(attention: PagedAttention, setup: PagedSetup) -> Tensor:
    there = on_device(setup)
    return attention(there.q, there.k_cache, there.v_cache, there.batch, there.scale).cpu()


def check(attention: PagedAttention, setup: PagedSetup) -> None:
    out = run(attention, setup)
    assert out.dtype == setup.q.dtype
    assert_near(out, dense_attention(setup))


def assert_near(out: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    tolerance = tolerance or TOLERANCE[out.dtype]
    torch.testing.assert_close(out.double(), expected.double(), rtol=tolerance, atol=tolerance)


def padded(setup: PagedSetup, count: int, slot: int = 0) -> PagedSetup:
    """With `count` tokens of no sequence after the last one, as in a CUDA graph."""
    batch = setup.batch
    nobody = {
        name: torch.cat((getattr(batch, name), torch.full((count,), number)))
        for name, number in (("token_ids", 0), ("positions", 0), ("slot_mapping", slot))
    }
    q = setup.q.new_zeros((count, *setup.q.shape[1:]))
    return replace(setup, q=torch.cat((setup.q, q)), batch=replace(batch, **nobody))


# ---- the answer ----------------------------------------------------------------------------------

HEAD_DIMS = (32, 64, 80, 96, 128, 33)
BLOCK_SIZES = (1, 2, 4, 7, 16, 64)
HEADS = ((2, 2), (3, 1), (4, 2))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Every pair of a head size, a block size, head counts and a dtype occurs.
PAIRWISE = [
    pytest.param(*HEADS[(i + j) % 3], head_dim, block_size, DTYPES[(i + 2 * j) % 3])
    for i, head_dim in enumerate(HEAD_DIMS)
    for j, block_size in enumerate(BLOCK_SIZES)
]


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "dtype"), PAIRWISE, ids=str
)
def test_a_mixed_batch_gives_what_dense_attention_gives(
    heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    options = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}
    check(triton_paged_attention, paged_setup(MIXED, block_size=block_size, **options))
    check(naive_paged_attention, paged_setup(FEW[:4], block_size=block_size, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32, "head_dim": 128, "block_size": 16},
        {"dtype": torch.float32, "head_dim": 64, "block_size": 5},
        {"dtype": torch.float16, "head_dim": 32, "block_size": 64},
        {"dtype": torch.float16, "head_dim": 256, "block_size": 16},
    ],
    ids=str,
)
def test_long_sequences_end_anywhere_in_a_tile(options: dict[str, Any]) -> None:
    check(triton_paged_attention, paged_setup(LONG, heads=2, kv_heads=1, **options))


@pytest.mark.parametrize(("rows", "tile"), [(16, 16), (64, 128), (32, 32)])
def test_the_shape_of_the_tiles_does_not_change_the_result(rows: int, tile: int) -> None:
    setup = paged_setup(LONG, heads=3, kv_heads=1, block_size=16)
    there = on_device(setup)
    inputs = there.q, there.k_cache, there.v_cache, there.batch, there.scale
    out = torch.empty(there.q.shape, device=DEVICE)
    decode(*inputs, out, 1, TileShape(tile, 4, 2))
    prefill(*inputs, out, TileShapes(rows, tile, 4, 2))
    assert_near(out.cpu(), dense_attention(setup))


@pytest.mark.parametrize("heads", [16, 17])
def test_a_kv_head_may_serve_any_number_of_query_heads(heads: int) -> None:
    check(triton_paged_attention, paged_setup(FEW, heads=heads, kv_heads=1))


@st.composite
def any_options(draw: st.DrawFn) -> dict[str, Any]:
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1)]))
    # Half of the lengths are at a boundary of tiles, or one token before or after it.
    near_boundary = st.builds(
        lambda tiles, shift: 16 * tiles + shift, st.integers(1, 8), st.integers(-1, 1)
    )
    context_len = st.one_of(st.integers(0, 140), near_boundary)
    query_len = st.one_of(st.just(1), st.integers(1, 40), near_boundary)
    return {
        "sizes": draw(st.lists(st.tuples(query_len, context_len), min_size=1, max_size=3)),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": draw(st.sampled_from([32, 128, 20, 1])),
        "block_size": draw(st.integers(1, 33)),
        "shared_blocks": draw(st.integers(0, 3)),
        "seed": draw(st.integers(0, 2**20)),
    }


@settings(max_examples=15)
@given(options=any_options())
def test_any_ragged_batch_gives_what_the_reference_gives(options: dict[str, Any]) -> None:
    setup = paged_setup(**options)
    assert_near(run(triton_paged_attention, setup), run_reference(setup))


def run_reference(setup: PagedSetup) -> Tensor:
    inputs = setup.q, setup.k_cache, setup.v_cache, setup.batch
    return reference_paged_attention(*inputs, setup.scale)


@every_kernel
def test_enormous_scores_do_not_overflow(attention: PagedAttention) -> None:
    assert run(attention, paged_setup(FEW, magnitude=1e8)).isfinite().all()


@every_kernel
def test_queries_may_be_a_slice_of_a_larger_tensor(attention: PagedAttention) -> None:
    setup = paged_setup(FEW)
    there = on_device(setup)
    wide = torch.cat((there.q, torch.full_like(there.q, torch.nan)), dim=1)
    out = attention(wide[:, :4], there.k_cache, there.v_cache, there.batch, there.scale)
    assert_near(out.cpu(), dense_attention(setup))


@every_kernel
def test_nan_after_the_end_of_a_sequence_does_not_change_the_result(
    attention: PagedAttention,
) -> None:
    check(attention, with_nan_behind(paged_setup(FEW, block_size=16)))


def with_nan_behind(setup: PagedSetup) -> PagedSetup:
    for table, span in zip(setup.tables, setup.batch.spans, strict=True):
        behind = slice((span.seq_len - 1) % setup.k_cache.shape[2] + 1, None)
        setup.k_cache[table.blocks[-1], :, behind] = torch.nan
        setup.v_cache[table.blocks[-1], :, behind] = torch.nan
    return setup


@every_kernel
def test_rows_after_the_last_sequence_are_not_written(attention: PagedAttention) -> None:
    setup = paged_setup(FEW)
    out = run(attention, padded(setup, 5))
    assert_near(out[:-5], dense_attention(setup))
    assert out[-5:].isnan().all()


@every_kernel
def test_a_recorded_batch_is_padded_and_has_only_bounds(attention: PagedAttention) -> None:
    # As in a CUDA graph: sequences without tokens, and lengths that are longer than the sequences.
    setup = paged_setup([(1, 6), (1, 0), (1, 62)])
    expected = dense_attention(setup)
    setup = padded(setup, 2)
    more = {
        "cu_seqlens_q": torch.tensor([3, 3]),
        "context_lens": torch.tensor([9, 0]),
        "block_tables": setup.batch.block_tables[:2] * 0 - 1,
    }
    batch = {name: torch.cat((getattr(setup.batch, name), new)) for name, new in more.items()}
    on_host = {"query_lens": np.full(5, 1), "seq_lens": np.full(5, 1000)}
    batch = {name: tensor.int() for name, tensor in batch.items()} | on_host
    out = run(attention, replace(setup, batch=replace(setup.batch, **batch)))
    assert_near(out[:3], expected)
    assert out[3:].isnan().all()


@pytest.mark.parametrize("num_splits", [1, 4])
def test_decode_and_prefill_leave_the_rows_of_the_other_alone(num_splits: int) -> None:
    check_rows(decode, prefill, num_splits)


def check_rows(decode: Callable[..., None], prefill: Callable[..., None], splits: int = 1) -> None:
    setup = tame(paged_setup(MIXED))
    there = on_device(padded(setup, 64))  # room for rows that a faulty kernel would write
    inputs = there.q, there.k_cache, there.v_cache, there.batch, there.scale
    lengths = setup.batch.cu_seqlens_q.diff()
    decodes = torch.cat((lengths.repeat_interleave(lengths) == 1, torch.zeros(64).bool()))
    prefills = torch.cat((lengths.repeat_interleave(lengths) > 1, torch.zeros(64).bool()))
    expected = dense_attention(setup)
    for rows, kernel in ((decodes, lambda out: decode(*inputs, out, splits)),
                         (prefills, lambda out: prefill(*inputs, out))):  # fmt: skip
        out = torch.full_like(there.q, torch.nan)
        kernel(out)
        assert_near(out.cpu()[rows], expected[rows[:-64]])
        assert out.cpu()[~rows].isnan().all()


@every_kernel
def test_wrong_head_counts_are_refused(attention: PagedAttention) -> None:
    setup = on_device(paged_setup(FEW, heads=4, kv_heads=2))
    single, triple = setup.k_cache[:, :1].contiguous(), setup.k_cache[:, [0, 1, 1]]
    for q, k_cache, v_cache in (
        (setup.q, triple, triple),  # 3 KV heads for 4 query heads
        (setup.q[:, :2], setup.k_cache, single),
        (setup.q[..., :1], setup.k_cache, setup.v_cache),
    ):
        with pytest.raises(AssertionError):
            attention(q, k_cache, v_cache, setup.batch, setup.scale)
    gaps = setup.k_cache.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(AssertionError, match="without gaps"):
        attention(setup.q, gaps, gaps, setup.batch, setup.scale)


# ---- needles: every tile and every split counts --------------------------------------------------


def with_needles(lengths: list[int], tile: int, **options: Any) -> PagedSetup:
    """One query per sequence, and one key per sequence that has nearly all of its weight.

    Of the sequences with the same length, each has its needle in another tile, alternately at its
    first and at its last position. A kernel that skips a single tile returns something else.
    """
    places = [
        (length, min(start + (0 if start // tile % 2 else tile - 1), length - 1))
        for length in lengths
        for start in range(0, length, tile)
    ]
    setup = paged_setup([(1, length - 1) for length, _ in places], kv_heads=1, heads=1, **options)
    for seq, (_, needle) in enumerate(places):
        table = setup.tables[seq]
        block, offset = divmod(table.slot(needle), table.block_size)
        q = setup.q[seq, 0]
        key = 30 * q / (q @ q) / setup.scale  # its score is 30, all others are a few units
        setup.keys[seq][needle, 0] = setup.k_cache[block, 0, offset] = key
    return setup


def relative_error(out: Tensor, setup: PagedSetup) -> float:
    return largest_error(out, dense_attention(setup))


def check_needles(decode: Callable[..., None], setup: PagedSetup, num_splits: int) -> None:
    there = on_device(tame(setup))
    out = torch.full_like(there.q, torch.nan)
    shape = TileShape(16, 4, 3)
    inputs = there.q, there.k_cache, there.v_cache, there.batch, there.scale
    decode(*inputs, out, num_splits, shape)
    assert relative_error(out.cpu(), setup) < 1e-4


@pytest.mark.parametrize("num_splits", [1, 3])
def test_decode_finds_a_needle_in_every_tile_and_every_split(num_splits: int) -> None:
    check_needles(decode, with_needles([600], 16, head_dim=16, block_size=16), num_splits)


@every_kernel
def test_attention_finds_a_needle_in_every_tile(attention: PagedAttention) -> None:
    setup = with_needles([97, 130], 16, head_dim=32, block_size=16)
    assert relative_error(run(attention, tame(setup)), setup) < 1e-4


# ---- splits --------------------------------------------------------------------------------------

AROUND_SPLITS = [(1, n - 1) for n in (1, 255, 256, 257, 600, 1100)] + [(4, 20)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_the_number_of_splits_does_not_change_the_result(dtype: torch.dtype) -> None:
    setup = paged_setup(AROUND_SPLITS, heads=2, kv_heads=1, block_size=16, dtype=dtype)
    whole, *cut = [run_splits(decode, setup, n) for n in (1, 2, 4, 8)]
    assert_near(whole, dense_attention(setup)[:-4])
    for out in cut:
        assert_near(out, whole)


def run_splits(decode: Callable[..., None], setup: PagedSetup, num_splits: int) -> Tensor:
    """The rows of all sequences but the last, which does not decode."""
    there = on_device(setup)
    out = torch.empty(there.q.shape, dtype=there.q.dtype, device=DEVICE)
    decode(there.q, there.k_cache, there.v_cache, there.batch, there.scale, out, num_splits)
    return out[:-4].cpu()


def test_decode_chooses_the_number_of_splits_if_none_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[int] = []

    def choose(*numbers: int) -> int:
        chosen.append(splits_to_fill(*numbers))
        return chosen[-1]

    monkeypatch.setattr(f"{KERNELS}.decode.splits_to_fill", choose)
    check(triton_paged_attention, paged_setup([(1, 1500)], heads=2, kv_heads=1, block_size=64))
    assert len(chosen) == 1


@settings(max_examples=300)
@given(
    num_seqs=st.integers(1, 512),
    kv_heads=st.integers(1, 128),
    longest=st.one_of(st.integers(1, 5000), st.integers(1, 2**21)),
    places=st.integers(1, 1000),
)
def test_splits_fill_the_gpu_once_and_divide_long_sequences(
    num_seqs: int, kv_heads: int, longest: int, places: int
) -> None:
    to_fill = splits_to_fill(num_seqs, kv_heads, places)
    assert 1 <= to_fill <= MOST_SPLITS
    assert to_fill == 1 or to_fill * num_seqs * kv_heads <= places  # none waits for another to end
    assert to_fill == MOST_SPLITS or (to_fill + 1) * num_seqs * kv_heads > places
    splits = most_splits(longest, to_fill)
    assert 1 <= splits <= MOST_SPLITS
    assert longest <= splits * LONGEST_SPLIT or splits == MOST_SPLITS
    assert splits == 1 or longest > (splits - 1) * SHORTEST_SPLIT  # no slivers
    assert splits >= min(to_fill, -(-longest // SHORTEST_SPLIT))
    for shorter in (1, longest // 2, longest - 1):  # so a bound for the longest serves all
        assert most_splits(max(1, shorter), to_fill) <= splits


def test_many_sequences_get_few_splits_and_few_sequences_get_many() -> None:
    places = 4 * 132  # four programs on each multiprocessor of an H200

    def splits(num_seqs: int, kv_heads: int, longest: int) -> int:
        return most_splits(longest, splits_to_fill(num_seqs, kv_heads, places))

    assert splits(1, 8, 32_768) == 66  # 528 programs: all that find room
    assert splits(4, 8, 32_768) == 16
    assert splits(1, 8, 2_048) == 8  # no slivers
    assert splits(64, 8, 2_048) == 1  # 512 programs fill it
    assert splits(64, 32, 65_536) == 16  # it is full; but one sequence is long


HOPPER = Multiprocessor(shared_bytes=228 * 1024, threads=2048)


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "num_warps", "programs"),
    [
        (128, 0, 4, 4),  # 512 registers per lane, of 2,048
        (129, 0, 4, 3),  # allocated in units of 8: 136
        (16, 56 * 1024 - 1, 4, 4),  # 57 KiB with the 1 KiB of the driver
        (16, 57 * 1024 + 1, 4, 3),
        (16, 0, 8, 8),  # 2,048 threads
        (240, 100 * 1024, 8, 1),
    ],
)  # fmt: skip
def test_a_multiprocessor_runs_as_many_programs_as_its_scarcest_resource_allows(
    registers: int, shared_bytes: int, num_warps: int, programs: int
) -> None:
    assert programs_per_sm(registers, shared_bytes, num_warps, HOPPER) == programs


def test_the_compiled_kernel_decides_how_many_splits_fill_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = SimpleNamespace(
        multi_processor_count=132,
        shared_memory_per_multiprocessor=HOPPER.shared_bytes,
        max_threads_per_multi_processor=HOPPER.threads,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(f"{KERNELS}.decode.is_interpreted", lambda: False)
    loaded: list[SimpleNamespace] = []

    def warmup(*_: Any, **given: Any) -> SimpleNamespace:
        assert given["SPLIT"]
        metadata = SimpleNamespace(shared=20_000, num_warps=given["num_warps"])
        kernel = SimpleNamespace(metadata=metadata, _init_handles=lambda: loaded.append(kernel))
        kernel.n_regs = 128 if given["TILE"] == 16 else 255
        return kernel

    monkeypatch.setattr(f"{KERNELS}.decode.decode_kernel", SimpleNamespace(warmup=warmup))
    decode_module._compiled_places.cache_clear()
    setup = paged_setup([(1, 9)], heads=4, kv_heads=2, block_size=16)
    counted = [
        count_places(setup.q, setup.k_cache, setup.v_cache, TileShape(tile, 4, 2))
        for tile in (16, 16, 32)
    ]
    assert counted == [132 * 4, 132 * 4, 132 * 2]
    assert len(loaded) == 2  # each kernel once


RAGGED = [(1, n - 1) for n in (1100, 700, 40, 2000, 257)]


@pytest.mark.parametrize("fixed_split_size", [256, 512, 4096])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8], ids=str)
def test_with_a_fixed_split_size_the_batch_changes_no_bit_of_a_result(
    fixed_split_size: int, kv_dtype: torch.dtype
) -> None:
    setup = paged_setup(RAGGED, heads=2, kv_heads=1, block_size=16)
    setup = in_8_bits(setup, kv_dtype) if kv_dtype is torch.int8 else setup
    check_batch_invariance(decode, setup, fixed_split_size)


def test_otherwise_a_sequence_alone_is_split_more_often() -> None:
    with pytest.raises(AssertionError):
        check_batch_invariance(decode, paged_setup(RAGGED, heads=2, kv_heads=1), None)


def check_batch_invariance(
    decode: Callable[..., None], setup: PagedSetup, fixed_split_size: int | None
) -> None:
    together = decode_alone(decode, setup, range(len(RAGGED)), fixed_split_size)
    assert_near(together, dense_attention(setup))
    for seq in range(len(RAGGED)):
        assert torch.equal(decode_alone(decode, setup, [seq], fixed_split_size)[0], together[seq])


def decode_alone(
    decode: Callable[..., None], setup: PagedSetup, seqs: Sequence[int], size: int | None
) -> Tensor:
    """The rows of these sequences, in a batch of their own."""
    chosen, batch = list(seqs), setup.batch
    there = replace(
        batch,
        cu_seqlens_q=batch.cu_seqlens_q[: len(chosen) + 1],
        context_lens=batch.context_lens[chosen],
        block_tables=batch.block_tables[chosen],
        query_lens=batch.query_lens[chosen],
        seq_lens=batch.seq_lens[chosen],
    )
    setup = on_device(replace(setup, q=setup.q[chosen], batch=there))
    out = torch.empty(setup.q.shape, dtype=setup.q.dtype, device=DEVICE)
    inputs = setup.q, setup.k_cache, setup.v_cache, setup.batch, setup.scale
    decode(*inputs, out, fixed_split_size=size)
    return out.cpu()


def test_a_short_sequence_is_not_split_because_another_is_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, length in (("LONGEST", 256), ("SHORTEST", 64)):
        monkeypatch.setattr(f"{KERNELS}.splits.{name}_SPLIT", length)
        monkeypatch.setitem(SPLIT_RULE, name, length)
    setup = paged_setup([(1, 1023), (1, 255), (1, 99)], heads=2, kv_heads=1, block_size=16)
    written: list[Tensor] = []
    empty = torch.empty

    def watched(shape: tuple[int, ...], **options: Any) -> Tensor:
        tensor = empty(shape, **options).fill_(torch.nan)
        written.append(tensor)
        return tensor

    monkeypatch.setattr(torch, "empty", watched)
    there = on_device(setup)
    out = empty(there.q.shape, dtype=there.q.dtype, device=DEVICE)
    decode(there.q, there.k_cache, there.v_cache, there.batch, there.scale, out, 1)
    assert_near(out.cpu(), dense_attention(setup))
    _, log_sums = written
    assert log_sums.shape == (3, 2, 4)
    assert (~log_sums.isnan()).sum(dim=-1)[:, 0].tolist() == [4, 1, 1]


@pytest.mark.parametrize("queries", [1, 5])
def test_tiny_values_in_8_bits_survive_half_precision(queries: int) -> None:
    # Weight times scale alone would fall among the smallest numbers that float16 has. (Only a GPU
    # multiplies in float16: interpreted, this shows that the scales are undone.)
    setup = paged_setup([(queries, 300)], head_dim=64, block_size=16, dtype=torch.float16)
    there = on_device(in_8_bits(setup, torch.int8))
    there.v_cache.scales.mul_(1e-3)
    expected = reference_paged_attention(
        there.q, there.k_cache, there.v_cache, there.batch, there.scale
    )
    out = triton_paged_attention(there.q, there.k_cache, there.v_cache, there.batch, there.scale)
    assert (out - expected).float().norm() < 2e-3 * expected.float().norm()


# ---- keys and values in 8 bits -------------------------------------------------------------------


def torch_attention(q, k_cache, v_cache, batch, scale):
    batch = prepare_torch(batch, k_cache, q.shape[1], q.dtype)
    return torch_paged_attention(q, k_cache, v_cache, batch, scale)


LARGEST_ERROR = {torch.int8: 0.03, torch.float8_e4m3fn: 0.12}  # of attention, on normal numbers


def in_8_bits(setup: PagedSetup, dtype: torch.dtype) -> PagedSetup:
    """The same setup over a quantized pool; its keys are what reading the pool gives."""
    k_cache = QuantizedPool(*quantize(setup.k_cache, dtype))
    v_cache = QuantizedPool(*quantize(setup.v_cache, dtype))

    def read(pool: QuantizedPool) -> list[Tensor]:
        rows = zip(setup.batch.block_tables, setup.batch.spans, strict=True)
        return [gather(pool, table, span.seq_len) for table, span in rows]

    pools = {"k_cache": k_cache, "v_cache": v_cache}
    return replace(setup, keys=read(k_cache), values=read(v_cache), **pools)


@pytest.mark.sampled
@every_format
@pytest.mark.parametrize(
    "attention",
    [
        reference_paged_attention,
        blockwise_paged_attention,
        torch_attention,
        triton_paged_attention,
        naive_paged_attention,
    ],
)
@pytest.mark.parametrize("head_dim", [32, 80])
def test_all_kernels_read_an_8_bit_cache_alike(
    attention: PagedAttention, dtype: torch.dtype, head_dim: int
) -> None:
    sizes = FEW if attention is naive_paged_attention else MIXED
    exact = paged_setup(sizes, head_dim=head_dim, block_size=5)
    setup = in_8_bits(exact, dtype)
    check(attention, setup)
    error = (run(attention, setup) - dense_attention(exact)).abs().max()
    assert error < LARGEST_ERROR[dtype]


@every_format
@pytest.mark.parametrize("q_dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_queries_in_half_precision_read_8_bits(dtype: torch.dtype, q_dtype: torch.dtype) -> None:
    setup = in_8_bits(paged_setup(MIXED, block_size=16), dtype)
    check(triton_paged_attention, replace(setup, q=setup.q.to(q_dtype)))


@every_format
def test_splits_of_8_bits_are_merged(dtype: torch.dtype) -> None:
    setup = paged_setup(AROUND_SPLITS, heads=2, kv_heads=1, block_size=16)
    setup = in_8_bits(setup, dtype)
    assert_near(run_splits(decode, setup, 4), dense_attention(setup)[:-4])


def test_keys_in_8_bits_and_values_in_floats_are_refused() -> None:
    setup = on_device(paged_setup(FEW))
    pool = QuantizedPool(*quantize(setup.k_cache, torch.int8))
    for pools in ((pool, setup.v_cache), (setup.k_cache, pool)):
        with pytest.raises(AssertionError, match="quantized"):
            triton_paged_attention(setup.q, *pools, setup.batch, setup.scale)


def check_round_trip(keys: Tensor, dtype: torch.dtype) -> None:
    stored, scales = quantize(keys, dtype)
    assert stored.dtype is dtype
    assert stored.float().abs().max() <= LARGEST[dtype]
    error = (stored.double() * scales.double()[..., None] - keys.double()).abs()
    step = scales.double()[..., None]
    # Half of a step; in float8 steps are 1/8 of a power of two, at the lowest 2^-9.
    bound = 0.5 * step if dtype is torch.int8 else keys.double().abs() / 16 + step / 2**10
    # Rounding key / scale to a float32 moves it by some 1e-7 of itself.
    assert (error <= bound + 1e-6 * keys.double().abs()).all()


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=["int8", "fp8"])
def test_quantizing_loses_at_most_half_a_step(dtype: torch.dtype) -> None:
    keys = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(0))
    check_round_trip(keys, dtype)
    for magnitude in (1e-20, 1e20, 1e38):
        check_round_trip(keys * (magnitude / keys.abs().max()), dtype)
    check_round_trip(keys * 10.0 ** torch.linspace(-25, 30, 50)[:, None, None], dtype)


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=["int8", "fp8"])
@settings(max_examples=100)
@given(
    numbers=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8)
)  # fmt: skip
def test_any_key_survives_the_round_trip(dtype: torch.dtype, numbers: list[float]) -> None:
    # Of smaller keys (1e-28 and below) the smallest scale makes zeros: let them be that small.
    keys = torch.tensor([numbers])
    stored, scales = quantize(keys, dtype)
    if scales > SMALLEST_SCALE:
        check_round_trip(keys, dtype)
    else:
        assert (stored.float() * scales[:, None] - keys).abs().max() <= LARGEST[dtype] * 1e-30


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=["int8", "fp8"])
def test_a_key_of_zeros_stays_zero(dtype: torch.dtype) -> None:
    stored, scales = quantize(torch.zeros(2, 3, 8), dtype)
    assert not stored.float().any()
    assert (scales == SMALLEST_SCALE).all()


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=["int8", "fp8"])
def test_a_quantized_pool_reads_and_writes_like_a_tensor(dtype: torch.dtype) -> None:
    shape = (5, 2, 4, 16)
    generator = torch.Generator().manual_seed(0)
    pool = QuantizedPool(*quantize(torch.randn(shape, generator=generator), dtype))
    before = pool.numbers.float(), pool.scales.clone()
    dense = before[0] * before[1][..., None]
    blocks, offsets = torch.tensor([4, 0, 2]), torch.tensor([1, 3, 0])
    for index in (2, blocks, (blocks, slice(None), offsets), (slice(1, 3), 1)):
        assert torch.equal(pool[index], dense[index])

    new = torch.randn(3, 2, 16, generator=generator)
    pool[blocks, :, offsets] = new
    numbers, scales = quantize(new, dtype)
    before[0][blocks, :, offsets], before[1][blocks, :, offsets] = numbers.float(), scales
    assert torch.equal(pool.numbers.float(), before[0])
    assert torch.equal(pool.scales, before[1])


# ---- storing keys and values ---------------------------------------------------------------------


def bits(pool: KVPool) -> list[Tensor]:
    """The content of the pool, NaN included, to be compared."""
    tensors = [pool.numbers, pool.scales] if isinstance(pool, QuantizedPool) else [pool]
    return [tensor.cpu().contiguous().view(torch.uint8) for tensor in tensors]


def assert_same(pools: list[KVPool], expected: list[KVPool]) -> None:
    for pool, right in zip(pools, expected, strict=True):
        assert all(map(torch.equal, bits(pool), bits(right)))


def pools_of(setup: PagedSetup, dtype: torch.dtype) -> list[KVPool]:
    """Two pools full of NaN (as far as there is one), like those of the setup."""
    if dtype not in LARGEST:
        return [torch.full(setup.k_cache.shape, torch.nan, dtype=dtype) for _ in range(2)]
    numbers = torch.full(setup.k_cache.shape, 77, dtype=torch.int8).view(dtype)
    scales = torch.full(setup.k_cache.shape[:3], torch.nan)
    return [QuantizedPool(numbers.clone(), scales.clone()) for _ in range(2)]


def fused(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers as two slices of one tensor, as a projection to q, k and v gives them."""
    qkv = torch.cat((torch.full_like(k, torch.nan), k, v), dim=1)
    return qkv[:, k.shape[1] : 2 * k.shape[1]], qkv[:, 2 * k.shape[1] :]


def check_store(store: Callable[..., None], setup: PagedSetup, dtype: torch.dtype) -> None:
    expected = pools_of(setup, dtype)
    store_kv(setup.new(setup.keys), setup.new(setup.values), *expected, setup.batch)
    batch = batch_on_device(padded(setup, 3).batch)  # the block of slot 0 has no owner
    k, v = (with_3_more(setup.new(tensors)) for tensors in (setup.keys, setup.values))
    for new in ((k, v), fused(k, v), (fused(k, v)[0], v)):
        pools = [pool_on_device(pool) for pool in pools_of(setup, dtype)]
        store(*new, *pools, batch)
        assert_same(pools, expected)


def with_3_more(new: Tensor) -> Tensor:
    return torch.cat((new, new[:3])).to(DEVICE)


@pytest.mark.parametrize(
    ("block_size", "kv_heads", "head_dim", "dtype", "cache_dtype"),
    [
        (1, 1, 32, torch.float32, torch.float32),
        (4, 3, 33, torch.float16, torch.float16),
        (7, 1, 80, torch.float32, torch.float32),
        (16, 3, 80, torch.float16, torch.float32),
        (4, 1, 33, torch.float32, torch.float16),
        (7, 3, 32, torch.bfloat16, torch.bfloat16),
        (1, 3, 80, torch.float16, torch.int8),
        (7, 3, 33, torch.float32, torch.int8),
        (16, 1, 32, torch.bfloat16, torch.int8),
    ],
)
def test_new_keys_go_to_their_slots_and_nowhere_else(
    block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    heads = {"heads": kv_heads, "kv_heads": kv_heads, "head_dim": head_dim}
    setup = paged_setup(FEW, block_size=block_size, dtype=dtype, **heads)
    check_store(triton_store_kv, setup, cache_dtype)


@every_format_to_store
def test_8_bits_are_stored_as_pytorch_stores_them(dtype: torch.dtype) -> None:
    setup = paged_setup(FEW, head_dim=80, block_size=7)
    for i, magnitude in enumerate((0.0, 1e-20, 1e20, 1.0, 1e-35)):
        setup.keys[i] *= magnitude
    check_store(triton_store_kv, setup, dtype)


def test_what_does_not_fit_the_cache_is_refused() -> None:
    setup = paged_setup(FEW)
    k, v = setup.new(setup.keys), setup.new(setup.values)
    inputs = setup.k_cache, setup.v_cache, setup.batch
    wrong = [(k[:, :1], v), (k, v[:, :1]), (k[:1], v), (k, v[..., :1])]
    apart = v.transpose(1, 2).contiguous().transpose(1, 2)
    cos = sin = torch.ones(len(k), 1, 16)
    for new in (*wrong, (k, apart)):
        with pytest.raises(AssertionError, match=r"the cache expects|not contiguous"):
            triton_store_kv(*new, *inputs)
        with pytest.raises(AssertionError, match=r"the cache expects|not contiguous"):
            rope_and_store_kv(setup.q, *new, cos, sin, *inputs)


def check_rope(
    rope_and_store: Callable[..., Tensor],
    setup: PagedSetup,
    dtype: torch.dtype,
    tolerance: float = 1e-6,
) -> None:
    k, v = setup.new(setup.keys), setup.new(setup.values)
    cos, sin = Rotary(RopeConfig(), setup.q.shape[-1])(setup.batch.positions, setup.q.dtype)
    expected = pools_of(setup, dtype)
    store_kv(rotate(k, cos, sin), v, *expected, setup.batch)

    pools = [pool_on_device(pool) for pool in pools_of(setup, dtype)]
    there = padded(setup, 3)
    new = (with_3_more(tensor) for tensor in (setup.q, k, v, cos, sin))
    q = rope_and_store(*new, *pools, batch_on_device(there.batch)).cpu()
    assert_near(q[:-3], rotate(setup.q, cos, sin), tolerance)
    assert q[-3:].isnan().all()
    assert_same(pools[1:], expected[1:])
    for pool, right in zip(pools, expected, strict=True):
        if isinstance(pool, QuantizedPool):
            # A number between two steps may be rounded to either.
            steps = (pool.numbers.cpu().float() - right.numbers.float()).abs()
            assert (steps <= (1 if dtype is torch.int8 else 32)).all()
            assert (steps > 0).float().mean() < 0.01
            torch.testing.assert_close(pool.scales.cpu(), right.scales, equal_nan=True)
        else:
            options = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
            torch.testing.assert_close(pool.cpu(), right, **options)


@pytest.mark.parametrize("block_size", [1, 7, 16])
@pytest.mark.parametrize("head_dim", [32, 80])
def test_queries_and_keys_are_rotated_while_they_are_stored(block_size: int, head_dim: int) -> None:
    setup = paged_setup(FEW, heads=6, kv_heads=3, head_dim=head_dim, block_size=block_size)
    check_rope(rope_and_store_kv, setup, torch.float32)


def test_half_precision_is_rotated_in_full_precision() -> None:
    # `rotate` rounds three times to half precision, the kernel once.
    setup = paged_setup(FEW, dtype=torch.float16)
    check_rope(rope_and_store_kv, setup, torch.float16, tolerance=4e-3)


@every_format_to_store
def test_rotated_keys_are_stored_in_8_bits(dtype: torch.dtype) -> None:
    check_rope(rope_and_store_kv, paged_setup(FEW, kv_heads=1, head_dim=48), dtype)


# ---- copying blocks ------------------------------------------------------------------------------


def check_copy(copy: Callable[..., None], *block: int, dtype: torch.dtype = torch.float32) -> None:
    """Inside one pool, and from it to a larger and to a smaller one."""
    generator = torch.Generator().manual_seed(0)

    def pool(num_blocks: int) -> Tensor:
        numbers = torch.randint(-127, 127, (2, 2, num_blocks, *block), generator=generator)
        return numbers.to(dtype)

    source = pool(9)
    for target in (source, pool(12), pool(5)):
        targets = torch.randperm(5, generator=generator)[:3]
        sources = 5 + torch.randperm(4, generator=generator)[:3]
        pairs = torch.stack((sources, targets), dim=1)
        from_there = source.to(DEVICE)
        to_there = from_there if target is source else target.to(DEVICE)
        copy(from_there, to_there, pairs.to(DEVICE))
        expected = target.clone()
        kv_cache.copy_blocks(source, expected, pairs)
        assert torch.equal(to_there.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("block", [(2, 4, 16), (3, 7, 33), (1, 1, 1)], ids=str)
def test_blocks_are_copied_as_pytorch_copies_them(
    block: tuple[int, ...], dtype: torch.dtype
) -> None:
    check_copy(copy_blocks, *block, dtype=dtype)


def test_a_block_larger_than_a_chunk_is_copied_whole() -> None:
    check_copy(copy_blocks, 3, 25, 80)
    assert CHUNK_BYTES < 3 * 25 * 80 * 4


def test_one_chunk_copies_the_scales_of_several_layers() -> None:
    check_copy(copy_blocks, 2, 16)  # 128 bytes per layer, keys or values: one chunk for all
    check_copy(copy_blocks, 3, 250)  # 3,000 bytes: a chunk ends in the middle of a layer


@pytest.mark.parametrize("num_programs", [1, 3, 7, 1000])
def test_a_few_programs_share_the_copying(num_programs: int) -> None:
    check_copy(partial(copy_blocks, num_programs=num_programs), 3, 25, 80)


def test_tensors_of_different_shape_or_dtype_are_not_copied() -> None:
    pool, pairs = torch.zeros(2, 2, 5, 4), torch.tensor([[0, 1]])
    for other in (pool[:1], pool[..., :3], pool.half(), pool.transpose(0, 1)):
        with pytest.raises(AssertionError):
            copy_blocks(pool, other, pairs)


@pytest.mark.skipif(DEVICE == "cpu", reason="there is but one memory")
def test_a_gpu_swaps_with_pinned_memory() -> None:
    pool = torch.randn(2, 2, 6, 3, 7)
    there, host = pool.to(DEVICE), torch.zeros(2, 2, 4, 3, 7).pin_memory()
    copy_blocks(there, host, torch.tensor([[5, 0], [2, 3]], device=DEVICE))
    torch.cuda.synchronize()
    assert torch.equal(host[:, :, [0, 3]], pool[:, :, [5, 2]])


# ---- more numbers than 32 bits count -------------------------------------------------------------


HUGE_BLOCKS = 2**32 // 2048 + 40
BLOCKS_OF_2048 = {"heads": 1, "kv_heads": 1, "head_dim": 128, "block_size": 16}


@pytest.fixture(scope="module")
def huge() -> QuantizedPool:
    """4 GiB, of which no more than the pages that are written take any memory.

    The fast kernels read two elements as one number, so these have offsets beyond 2^31 as well.
    """
    numbers = EMPTY(HUGE_BLOCKS, 1, 16, 128, dtype=torch.int8, device=DEVICE)
    return QuantizedPool(numbers, EMPTY(HUGE_BLOCKS, 1, 16, device=DEVICE))


def far_away(setup: PagedSetup, huge: QuantizedPool) -> PagedSetup:
    """The setup with its blocks at the end of a huge pool, keys and values in the same."""
    setup = in_8_bits(setup, torch.int8)
    first = len(huge.numbers) - len(setup.k_cache.numbers)
    assert first * 2048 >= 2**32
    huge.numbers[first:] = setup.k_cache.numbers.to(DEVICE)
    huge.scales[first:] = setup.k_cache.scales.to(DEVICE)
    batch = setup.batch
    tables = torch.where(batch.block_tables.abs() < 10**6, batch.block_tables + first, 2**31 - 1)
    batch = replace(batch, block_tables=tables.int(), slot_mapping=batch.slot_mapping + first * 16)
    return replace(setup, k_cache=huge, v_cache=huge, batch=batch, values=setup.keys)


@every_kernel
def test_attention_computes_offsets_in_64_bits(
    attention: PagedAttention, huge: QuantizedPool
) -> None:
    check(attention, far_away(paged_setup(FEW, **BLOCKS_OF_2048), huge))


def test_storing_computes_offsets_in_64_bits(huge: QuantizedPool) -> None:
    setup = far_away(paged_setup(FEW, **BLOCKS_OF_2048), huge)
    new = torch.randn(len(setup.q), 1, 128, generator=torch.Generator().manual_seed(0))
    there = new.to(DEVICE)
    triton_store_kv(there, there, huge, huge, batch_on_device(setup.batch))
    numbers, scales = quantize(new, torch.int8)
    blocks, offsets = (
        (setup.batch.slot_mapping // 16).to(DEVICE),
        (setup.batch.slot_mapping % 16).to(DEVICE),
    )
    assert torch.equal(huge.numbers[blocks, :, offsets].cpu(), numbers)
    assert torch.equal(huge.scales[blocks, :, offsets].cpu(), scales)


def test_copying_computes_offsets_in_64_bits(huge: QuantizedPool) -> None:
    pool = huge.numbers.view(1, 2, -1, 16, 128)  # the values follow the keys
    last = pool.shape[2] - 1
    pool[:, :, last - 2] = torch.arange(2048, device=DEVICE).view(16, 128) % 100
    pool[:, 1, last] = 0
    copy_blocks(pool, pool, torch.tensor([[last - 2, last]], dtype=torch.int32, device=DEVICE))
    assert torch.equal(pool[:, :, last - 2], pool[:, :, last])


# ---- deliberate faults: each must fail where the real thing passes -------------------------------


def tame(setup: PagedSetup) -> PagedSetup:
    """A faulty kernel reads through a block of NaN without an owner, and never foreign memory."""
    tables = setup.batch.block_tables
    tables = torch.where((tables >= 0) & (tables < len(setup.k_cache)), tables, 0)
    more = torch.zeros(len(tables), 100, dtype=torch.int32)
    return replace(setup, batch=replace(setup.batch, block_tables=torch.cat((tables, more), dim=1)))


def part(package: str, file: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"{package}.{file}"), name)


def attention_passes(package: str) -> None:
    attention = part(package, "backend", "triton_paged_attention")
    check(attention, tame(paged_setup(MIXED)))
    sizes = [(70, 0), (2, 14), (21, 3)]
    check(attention, tame(paged_setup(sizes, heads=6, kv_heads=2, block_size=3)))


def rows_pass(package: str) -> None:
    check_rows(part(package, "decode", "decode"), part(package, "prefill", "prefill"))


def ends_pass(package: str) -> None:
    attention = part(package, "backend", "triton_paged_attention")
    check(attention, tame(with_nan_behind(paged_setup(FEW, block_size=16))))


def splits_pass(package: str) -> None:
    setup = paged_setup([(1, 299), (1, 699), (1, 40), (4, 20)], heads=2, kv_heads=1, block_size=16)
    out = run_splits(part(package, "decode", "decode"), tame(setup), 4)
    assert_near(out, dense_attention(setup)[:-4])


def needles_pass(package: str) -> None:
    setup = with_needles([545], 16, head_dim=16, block_size=16)
    check_needles(part(package, "decode", "decode"), setup, 3)


def fixed_passes(package: str) -> None:
    setup = paged_setup(RAGGED, heads=2, kv_heads=1, block_size=16)
    check_batch_invariance(part(package, "decode", "decode"), setup, 1024)


def far_passes(package: str) -> None:
    """As `huge`, with as much unused memory before it: a negative offset reads from there."""
    numbers = EMPTY(2 * HUGE_BLOCKS, 1, 16, 128, dtype=torch.int8, device=DEVICE)[HUGE_BLOCKS:]
    huge = QuantizedPool(numbers, EMPTY(HUGE_BLOCKS, 1, 16, device=DEVICE))
    attention = part(package, "backend", "triton_paged_attention")
    check(attention, far_away(paged_setup(FEW, **BLOCKS_OF_2048), huge))


def bits_pass(package: str) -> None:
    setup = in_8_bits(tame(paged_setup([*FEW, (1, 300), (3, 150)])), torch.int8)
    check(part(package, "backend", "triton_paged_attention"), setup)
    check(part(package, "naive_decode", "naive_paged_attention"), setup)


def naive_passes(package: str) -> None:
    setup = tame(paged_setup(FEW))
    out = run(part(package, "naive_decode", "naive_paged_attention"), padded(setup, 2))
    assert_near(out[:-2], dense_attention(setup))
    assert out[-2:].isnan().all()


def store_passes(package: str) -> None:
    store = part(package, "store_kv", "triton_store_kv")
    check_store(store, paged_setup(FEW, head_dim=33), torch.float32)
    check_store(store, paged_setup(FEW), torch.int8)


def rope_passes(package: str) -> None:
    for dtype in (torch.float32, torch.int8):
        check_rope(part(package, "store_kv", "rope_and_store_kv"), paged_setup(FEW), dtype)


def copy_passes(package: str) -> None:
    check_copy(part(package, "copy_blocks", "copy_blocks"), 3, 25, 80)


MUTANTS = {
    "a query does not see its own key": (
        attention_passes, "tile", "positions[None, :] <= row", "positions[None, :] < row"
    ),
    "a slot after the end is read": (ends_pass, "tile", "positions < end", "positions <= end"),
    "the output is not corrected": (
        attention_passes, "tile", "output[0] * correction", "output[0]"
    ),
    "the odd elements of the output are not corrected": (
        bits_pass, "tile", "output[1] * correction", "output[1]"
    ),
    "odd elements of keys meet even ones of queries": (
        bits_pass, "tile", "tl.dot(query[1],", "tl.dot(query[0],"
    ),
    "even elements of values are also the odd ones": (
        bits_pass, "tile", "tl.dot(weights, values[1]", "tl.dot(weights, values[0]"
    ),
    "odd elements lose their sign": (
        bits_pass, "unpack", "(pairs >> 8).to", "((pairs >> 8) & 127).to"
    ),
    "even elements come after the odd ones": (
        bits_pass, "unpack", "tl.join(even, odd)", "tl.join(odd, even)"
    ),
    "the total is not corrected": (
        attention_passes, "tile", "total * correction", "total"
    ),
    "a whole tile is taken for one block": (
        attention_passes, "tile", "TILE) // BLOCK_SIZE\n", "TILE) // BLOCK_SIZE * 0\n"
    ),
    "every tile is taken to start at the beginning of a block": (
        attention_passes, "tile", "return start % BLOCK_SIZE + tl", "return tl"
    ),
    "one split is ignored": (
        needles_pass, "decode", "if start >= end:", "if (start >= end) | (split == 1):"
    ),
    "one tile is skipped": (
        needles_pass, "decode", "for tile_start in range(start,",
        "for tile_start in range(start + TILE * (split == 2),"
    ),
    "block numbers of the next tile are used for this one": (
        needles_pass, "decode", "tile_start, end, blocks,", "tile_start, end, next_blocks,"
    ),
    "block numbers stay those of the first tile": (
        needles_pass, "decode", "blocks = next_blocks", "next_blocks"
    ),
    "prefill keeps the block numbers of the first tile": (
        attention_passes, "prefill", "blocks = next_blocks", "next_blocks"
    ),
    "the merge leaves out the last split": (
        needles_pass, "splits", "splits * split_len < seq_len",
        "(splits + 1) * split_len < seq_len"
    ),
    "a fixed split size is divided among the batch": (
        fixed_passes, "decode", '"LONGEST"] = 1,', '"LONGEST"] = max(1, 8 // batch.num_seqs),'
    ),
    "the merge does not know the fixed split size": (
        fixed_passes, "splits", '{"LONGEST": longest_split}', "{}"
    ),
    "the last tile is not masked": (
        ends_pass, "decode", "BLOCK_SIZE, TILE, True,", "BLOCK_SIZE, TILE, False,"
    ),
    "offsets have 32 bits": (far_passes, "tile", ".to(tl.int64)", ""),
    "slots before heads in the pool": (
        attention_passes, "tile",
        "kv_head * BLOCK_SIZE + offsets", "kv_head + offsets * KV_HEADS",
    ),
    "scales of values are forgotten": (
        bits_pass, "tile", "weights *= (scales", "weights *= (0 * scales + 1"
    ),
    "scales of values are applied to scores": (
        bits_pass, "tile", "_load_scales(k_scales", "_load_scales(v_scales"
    ),
    "decode groups heads the wrong way": (
        attention_passes, "decode", "kv_head * GROUP + rows", "kv_head + rows * KV_HEADS"
    ),
    "decode takes prefills too": (
        rows_pass, "decode", "- token != 1:", "- token < 1:"
    ),
    "prefill takes decodes too": (rows_pass, "prefill", "(query_len == 1)", "(query_len == 0)"),
    "a split reads to the end": (
        splits_pass, "decode", "tl.minimum(start + split_len, seq_len)", "seq_len"
    ),
    "an empty split is merged": (
        splits_pass, "splits", "splits * split_len < seq_len", "splits >= 0"
    ),
    "the merge weighs in the wrong base": (
        splits_pass, "decode", "maximum + tl.log2(total)", "maximum + tl.log(total)"
    ),
    "splits are averaged": (splits_pass, "splits", "tl.exp2(sums - tl.max(sums, axis=0))",
                            "tl.where(written, 1.0, 0.0)"),
    "the first tile forgets the sequences before": (
        attention_passes, "prefill", "(first_token // QUERIES + seq)", "(first_token // QUERIES)"
    ),
    "a tile writes over the end of its sequence": (
        rows_pass, "prefill", " & (queries < query_len)", ""
    ),
    "a chunk forgets its context": (
        attention_passes, "prefill", "row_positions = context_len + queries",
        "row_positions = queries",
    ),
    "a tile across the diagonal goes unmasked": (
        attention_passes, "prefill", "first_query + 1) // TILE", "first_query + 2) // TILE"
    ),
    "the naive kernel sees one key too few": (
        naive_passes, "naive_decode", "offsets <= position)", "offsets < position)"
    ),
    "the naive kernel groups heads the wrong way": (
        naive_passes, "naive_decode", "head // GROUP", "head % KV_HEADS"
    ),
    "the naive kernel takes padding for a token": (
        naive_passes, "naive_decode", "if token >= tl", "if token > tl"
    ),
    "padding is stored": (store_passes, "store_kv", "if token >= tl", "if token > tl"),
    "values are read like keys": (
        store_passes, "store_kv", "v + token * v_token_stride", "v + token * k_token_stride"
    ),
    "keys are stored slot by slot": (
        store_passes, "store_kv", "* KV_HEADS + heads) * BLOCK_SIZE + slot % BLOCK_SIZE",
        "* BLOCK_SIZE + slot % BLOCK_SIZE) * KV_HEADS + heads",
    ),
    "steps are cut off instead of rounded": (store_passes, "store_kv", "steps + 0.5", "steps"),
    "keys are turned backwards": (
        rope_passes, "store_kv", "second * cos + first", "second * cos - first"
    ),
    "half of a key chooses its scale": (
        rope_passes, "store_kv", "tl.maximum(tl.abs(first), tl.abs(second))", "tl.abs(first)"
    ),
    "the target is taken to be as large as the source": (
        copy_passes, "copy_blocks", "part * num_target_blocks", "part * num_source_blocks"
    ),
    "only the first chunk is copied": (copy_passes, "copy_blocks", "% CHUNKS * CHUNK", "* 0"),
    "all layers are copied from the first": (
        copy_passes, "copy_blocks", "part * num_source_blocks", "0 * part"
    ),
}  # fmt: skip


def altered(folder: Path, file: str, old: str, new: str) -> str:
    """A package of all the kernels with one piece of one file replaced, wherever it occurs."""
    # On disk, and with imports of its own: Triton reads the text of a kernel from its file.
    package = folder / f"mutant_of_{folder.name}"
    shutil.copytree(Path(machine.__file__).parent, package)
    for path in package.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.stem == file:
            assert old in text, f"{file}.py has changed, no more {old!r}: renew this mutant"
            text = text.replace(old, new)
        path.write_text(text.replace(KERNELS, package.name), encoding="utf-8")
    return package.name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # interpreted, -inf less -inf is one
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_a_deliberate_fault_is_caught(
    mutant: tuple[Callable[[str], None], str, str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes, *fault = mutant
    monkeypatch.syspath_prepend(tmp_path)
    package = altered(tmp_path, *fault)
    with pytest.raises(AssertionError):
        passes(package)


@pytest.mark.parametrize("passes", dict.fromkeys(passes for passes, *_ in MUTANTS.values()))
def test_the_checks_that_catch_the_faults_pass_the_real_kernels(
    passes: Callable[[str], None],
) -> None:
    passes(KERNELS)


# ---- devices -------------------------------------------------------------------------------------

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def on_gpu(patch: pytest.MonkeyPatch, capability: tuple[int, int], name: str) -> None:
    patch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    patch.setattr(torch.cuda, "get_device_name", lambda _: name)


def assert_refused(reason: str, device: torch.device, *options: Any) -> None:
    said = why_no_triton(device, *options)
    assert said is not None
    assert reason in said
    assert not said.endswith(".")
    told = pytest.warns(UserWarning, match="runs in PyTorch") if device == GPU else nullcontext()
    with told:
        assert choose_backend("auto", device, *options).name == "torch"
    for name in ("triton", "triton-naive"):
        with pytest.raises(InvalidOption) as refusal:
            choose_backend(name, device, *options)
        assert f'attention_backend="{name}" cannot run: {said}. Choose "auto"' in str(refusal.value)


def test_without_triton_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda _: None)
    machine.prepare_triton()
    for device in (CPU, GPU):
        assert_refused('"triton" is not installed', device, 64)


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, (7, 5), "Tesla T4")
    assert_refused("capability 8.0 or newer, but Tesla T4 has 7.5", GPU, 64)


def test_an_ampere_gpu_is_accepted_but_not_for_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, (8, 0), "NVIDIA A100")
    assert why_no_triton(GPU, 64) is None
    assert why_no_triton(GPU, 64, "int8") is None
    assert choose_backend("auto", GPU).name == "triton"
    assert_refused("capability 8.9 or newer, but NVIDIA A100 has 8.0", GPU, 64, "fp8")
    on_gpu(monkeypatch, (9, 0), "NVIDIA H200")
    monkeypatch.setattr(machine, "is_interpreted", lambda: False)
    assert why_no_triton(GPU, 64, "fp8") is None


def test_a_head_too_large_is_refused() -> None:
    assert_refused("heads of up to 256 elements, but this model's have 512", CPU, 512)
    assert_refused("heads of up to 256 elements, but this model's have 512", GPU, 512)


def test_8_bits_and_an_odd_number_of_elements_are_refused() -> None:
    for device in (CPU, GPU):
        assert_refused(
            "in pairs, but this model's heads have 33, an odd number", device, 33, "int8"
        )
    assert why_no_triton(CPU, 33) is None
    setup = in_8_bits(paged_setup(FEW, head_dim=33), torch.int8)
    with pytest.raises(Exception, match="read in pairs"):
        run(triton_paged_attention, setup)


def test_compiled_kernels_refuse_tensors_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "is_interpreted", lambda: False)
    assert_refused("TRITON_INTERPRET=1", CPU, 64)


def test_the_interpreter_does_not_take_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "is_interpreted", lambda: True)
    assert_refused("rounds fp8 incorrectly", CPU, 64, "fp8")
    assert why_no_triton(CPU, 64, "int8") is None


@pytest.mark.skipif(not is_interpreted(), reason="a process that compiles refuses")
@pytest.mark.parametrize("name", ["triton", "triton-naive"])
def test_interpreted_kernels_are_accepted_with_a_warning(name: str) -> None:
    with pytest.warns(UserWarning, match="interpreter"):
        backend = choose_backend(name, CPU)
    assert backend.name == name
    assert backend.cuda_graph_safe
    assert choose_backend("auto", CPU).name == "torch"


def test_an_old_interpreter_with_a_new_numpy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy
    import triton

    monkeypatch.setattr(machine, "is_interpreted", lambda: True)
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(numpy, "__version__", "2.4.1")
    assert_refused("install triton 3.9, or numpy below 2.4", CPU, 64)
    monkeypatch.setattr(numpy, "__version__", "2.3.5")
    assert why_no_triton(CPU, 64) is None


# ---- what a launcher refuses, since a pointer cannot ---------------------------------------------


def test_values_of_another_shape_than_keys_are_refused() -> None:
    setup = on_device(paged_setup([(3, 2)]))
    k, v = setup.q[:, :2], setup.q[:, 2:]
    smaller = setup.v_cache[1:].contiguous()
    for call in (
        lambda: triton_store_kv(k, v, setup.k_cache, smaller, setup.batch),
        lambda: triton_paged_attention(setup.q, setup.k_cache, smaller, setup.batch, 1.0),
        lambda: naive_paged_attention(setup.q, setup.k_cache, smaller, setup.batch, 1.0),
    ):
        with pytest.raises(AssertionError):
            call()


def test_heads_with_strided_elements_are_refused() -> None:
    setup = on_device(paged_setup([(3, 2)]))
    apart = setup.q.transpose(1, 2).contiguous().transpose(1, 2)
    for attend in (triton_paged_attention, naive_paged_attention):
        with pytest.raises(AssertionError, match="not contiguous"):
            attend(apart, setup.k_cache, setup.v_cache, setup.batch, 1.0)
    k = setup.q[:, :2]
    cos = torch.ones(3, 1, setup.q.shape[2] // 2, device=DEVICE)
    pools = setup.k_cache, setup.v_cache
    with pytest.raises(AssertionError, match="not contiguous"):
        rope_and_store_kv(apart, k, k, cos, cos, *pools, setup.batch)
    with pytest.raises(AssertionError, match="angles are"):
        rope_and_store_kv(setup.q, k, k, cos[:2], cos, *pools, setup.batch)


def test_strided_pairs_of_elements_are_refused() -> None:
    pool = torch.zeros(1, 2, 5, 1, 4, 8, device=DEVICE)
    pairs = torch.tensor([[3, 0], [1, 2]], device=DEVICE)
    with pytest.raises(AssertionError):
        copy_blocks(pool, pool, pairs.t())
