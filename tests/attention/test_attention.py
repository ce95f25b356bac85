"""Every implementation of paged attention against dense attention over the unpaged keys."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import compiled
from torch import Tensor

from minipaged.attention import blockwise, reference, torch_decode, torch_paged
from minipaged.attention.backend import BACKENDS, PagedAttention, StoreKV, choose_backend
from minipaged.attention.batch import Batch
from minipaged.attention.quantized_cache import KVPool
from minipaged.attention.reference import store_kv
from minipaged.attention.torch_paged import torch_store_kv
from minipaged.errors import InvalidOption
from minipaged.evaluation.testing.paged_setup import PagedSetup, dense_attention, paged_setup

try:
    from jaxtyping import TypeCheckError  # with it, a signature refuses a wrong shape
except ModuleNotFoundError:
    TypeCheckError = AssertionError
REFUSALS: tuple[type[Exception], ...] = (AssertionError, TypeCheckError, IndexError)


def prepared(module: ModuleType) -> PagedAttention:
    """The attention of `torch_paged` or a copy of it, with the preparation of its batch."""

    def attention(q: Tensor, k_cache: KVPool, v_cache: KVPool, batch: Batch, scale: float):
        batch = module.prepare_torch(batch, k_cache, q.shape[1], q.dtype)
        return module.torch_paged_attention(q, k_cache, v_cache, batch, scale)

    return attention


torch_attention = prepared(torch_paged)


def torch_in_place(q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, scale: float):
    """PyTorch's, which decodes in place whatever the batch, unless sequences share blocks."""
    with always_in_place(torch_decode):
        return torch_attention(q, k_cache, v_cache, batch, scale)


def prepared_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch) -> None:
    batch = torch_paged.prepare_torch(batch, k_cache, k_cache.shape[1], k.dtype)
    torch_store_kv(k, v, k_cache, v_cache, batch)


@contextmanager
def always_in_place(module: ModuleType) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FEWEST_IN_PLACE", 0)
        patch.setattr(module, "LEAST_IN_USE", 0.0)
        patch.setattr(module, "MOST_ENTRIES", 1000)
        patch.setattr(module, "LARGEST_GROUP", 1000)
        yield


every_implementation = pytest.mark.parametrize(
    "attention",
    [
        reference.reference_paged_attention,
        blockwise.blockwise_paged_attention,
        torch_attention,
        torch_in_place,
    ],
    ids=["reference", "blockwise", "torch", "torch in place"],
)

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 4e-3,  # half a unit in the last place of 4 is 2e-3
    torch.bfloat16: 3e-2,  # ... and 1.6e-2
}

# Decode, prefill, chunked prefill and decode once more; lengths at, before and after a boundary.
MIXED = [(1, 6), (5, 0), (3, 5), (1, 7), (1, 0), (1, 8), (8, 4), (2, 15)]


def run(attention: PagedAttention, setup: PagedSetup) -> Tensor:
    return attention(setup.q, setup.k_cache, setup.v_cache, setup.batch, setup.scale)


def check(attention: PagedAttention, setup: PagedSetup) -> None:
    out = run(attention, setup)
    assert out.dtype == setup.q.dtype
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.double(), dense_attention(setup), rtol=tolerance, atol=tolerance)


def fixed_setups() -> list[PagedSetup]:
    """A few setups that between them meet every trap: what the mutants below are put through."""
    exact = {"dtype": torch.float64}
    return [
        paged_setup(MIXED, **exact),
        paged_setup(MIXED, heads=6, kv_heads=2, block_size=3, seed=1, **exact),
        paged_setup(MIXED, heads=3, kv_heads=3, block_size=1, head_dim=5, seed=2, **exact),
        paged_setup(MIXED, heads=4, kv_heads=1, block_size=16, seed=3, **exact),
        paged_setup([(1, 17), (4, 12), (1, 30)], shared_blocks=3, seed=4, **exact),
        paged_setup(MIXED, magnitude=1e4, seed=5, **exact),
        paged_setup([(1, 20)], seed=6, **exact),
    ]


def check_all(attention: PagedAttention) -> None:
    for setup in fixed_setups():
        check(attention, setup)


# ---- the answer ----------------------------------------------------------------------------------


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """What to hand to `paged_setup`."""
    block_size = draw(st.integers(1, 33))
    # Half of the contexts end at the boundary of a block, or one token before or after it.
    at_boundary = st.builds(
        lambda blocks, shift: max(0, blocks * block_size + shift),
        st.integers(0, 64 // block_size + 1),
        st.integers(-1, 1),
    )
    context_len = st.one_of(st.just(0), st.integers(0, 70), at_boundary)
    query_len = st.one_of(st.just(1), st.integers(1, 20))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (4, 1), (3, 3), (4, 2), (6, 2), (9, 3)]))
    return {
        "sizes": draw(st.lists(st.tuples(query_len, context_len), min_size=1, max_size=5)),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": draw(st.sampled_from([32, 64, 80, 128, 256, 33, 7, 1])),
        "block_size": block_size,
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "shared_blocks": draw(st.integers(0, 3)),
        "seed": draw(st.integers(0, 2**20)),
    }


@every_implementation
@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(options=options())
def test_any_ragged_batch_gives_what_dense_attention_gives(
    attention: PagedAttention, options: dict[str, Any]
) -> None:
    check(attention, paged_setup(**options))


@every_implementation
def test_the_reference_passes_every_trap_that_catches_a_mutant(attention: PagedAttention) -> None:
    check_all(attention)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [32, 33, 128])
def test_half_precision_is_right_to_its_last_digits(
    attention: PagedAttention, dtype: torch.dtype, head_dim: int
) -> None:
    check(attention, paged_setup(MIXED, head_dim=head_dim, block_size=5, dtype=dtype))


@every_implementation
@pytest.mark.parametrize("query_len", [1, 2])
def test_half_precision_sums_do_not_stop_at_256(attention: PagedAttention, query_len: int) -> None:
    # In bfloat16, 256 + 1 is 256: a sum over 1000 equal weights kept in it would go far astray.
    setup = paged_setup([(query_len, 1000)], block_size=16, dtype=torch.bfloat16)
    setup.q.zero_()
    check(attention, setup)
    setup.v_cache[setup.tables[0].blocks] = 1
    assert torch.allclose(run(attention, setup), torch.ones_like(setup.q), atol=1e-2)


@every_implementation
def test_enormous_scores_do_not_overflow(attention: PagedAttention) -> None:
    setup = paged_setup(MIXED, magnitude=1e8)  # float32: exp overflows at 89
    assert run(attention, setup).isfinite().all()


@every_implementation
def test_a_later_key_is_invisible(attention: PagedAttention) -> None:
    setup = paged_setup([(6, 0), (6, 5)], dtype=torch.float64)
    before = run(attention, setup)
    for span, table in zip(setup.batch.spans, setup.tables, strict=True):
        block, offset = divmod(table.slot(span.context_len + 3), setup.k_cache.shape[2])
        setup.k_cache[block, :, offset] += 1
        setup.v_cache[block, :, offset] += 1
    changed = (run(attention, setup) - before).abs().amax(dim=(1, 2)) > 1e-9
    assert changed.tolist() == 2 * [False, False, False, True, True, True]


@every_implementation
def test_attention_does_not_modify_the_queries_or_the_pool(attention: PagedAttention) -> None:
    setup = paged_setup(MIXED)
    copies = [t.clone() for t in (setup.q, setup.k_cache, setup.v_cache)]
    run(attention, setup)
    for copy, tensor in zip(copies, (setup.q, setup.k_cache, setup.v_cache), strict=True):
        assert torch.equal(copy.nan_to_num(1e9), tensor.nan_to_num(1e9))


@every_implementation
def test_wrong_head_counts_are_refused(attention: PagedAttention) -> None:
    setup = paged_setup(MIXED, heads=4, kv_heads=2)
    single, triple = setup.k_cache[:, :1], setup.k_cache[:, [0, 1, 1]]
    with pytest.raises(REFUSALS):  # 3 KV heads for 4 query heads
        attention(setup.q, triple, triple, setup.batch, setup.scale)
    with pytest.raises(REFUSALS):  # one value head would be broadcast
        attention(setup.q[:, :2], setup.k_cache, single, setup.batch, setup.scale)
    with pytest.raises(REFUSALS):  # heads of another size
        attention(setup.q[..., :1], setup.k_cache, setup.v_cache, setup.batch, setup.scale)


def test_sequences_too_many_for_one_gather_are_gathered_in_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for positions in (1, 12, 20):  # each sequence alone; two or three together
        monkeypatch.setattr(torch_decode, "NUMBERS_AT_ONCE", positions * 2 * 32)
        check(torch_attention, paged_setup([(1, n) for n in range(12)] + MIXED))


def way_of_decoding(setup: PagedSetup) -> str:
    num_heads, dtype = setup.q.shape[1], setup.q.dtype
    decodes = torch_decode.Decodes.prepare(setup.batch, setup.k_cache, num_heads, dtype)
    assert decodes is not None
    return "in place" if isinstance(decodes.way, torch_decode.InPlace) else "gathered"


def test_large_batches_with_adjacent_blocks_are_decoded_in_place() -> None:
    large = [(1, 400)] * 24  # 24 * 401 keys of 2 * 32 numbers are more than 2^19
    assert way_of_decoding(paged_setup(large)) == "in place"
    assert way_of_decoding(paged_setup([*large, (9, 3)])) == "in place"
    assert way_of_decoding(paged_setup(large[:4])) == "gathered"  # few keys
    assert way_of_decoding(paged_setup(large, shared_blocks=1)) == "gathered"
    assert way_of_decoding(paged_setup(large, heads=8)) == "gathered"  # 4 read the same keys
    uneven = [(1, 9000), *[(1, 50)] * 24]  # padded to the longest, 20 entries for each block
    assert way_of_decoding(paged_setup(uneven)) == "gathered"
    assert way_of_decoding(paged_setup([(1, 9000)] * 2)) == "in place"
    far_apart = [*large, (700, 400 * 24)]  # half of the blocks belong to a prefill
    assert way_of_decoding(paged_setup(far_apart)) == "gathered"


def test_a_pool_of_another_dtype_is_not_read_in_place() -> None:
    setup = paged_setup(MIXED)
    with always_in_place(torch_decode):
        assert way_of_decoding(setup) == "in place"
        half = replace(setup, k_cache=setup.k_cache.half(), v_cache=setup.v_cache.half())
        assert way_of_decoding(half) == "gathered"


def test_a_backend_is_chosen_by_name() -> None:
    assert {choose_backend(name).name for name in BACKENDS} == set(BACKENDS)
    assert choose_backend("auto").name in BACKENDS
    with pytest.raises(InvalidOption, match="no attention backend 'flash'"):
        choose_backend("flash")


# ---- storing keys and values ---------------------------------------------------------------------


every_store = pytest.mark.parametrize("store", [store_kv, prepared_store], ids=["plain", "torch"])


@every_store
@pytest.mark.parametrize("block_size", [1, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_new_keys_go_to_their_slots_and_nowhere_else(
    store: StoreKV, block_size: int, dtype: torch.dtype
) -> None:
    setup = paged_setup(MIXED, block_size=block_size, dtype=dtype)
    k_cache, v_cache = torch.zeros_like(setup.k_cache), torch.ones_like(setup.v_cache)
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    for i, span in enumerate(setup.batch.spans):
        for position in range(span.context_len, span.seq_len):
            block, offset = divmod(setup.tables[i].slot(position), block_size)
            expected_k[block, :, offset] = setup.keys[i][position]
            expected_v[block, :, offset] = setup.values[i][position]
    store(setup.new(setup.keys), setup.new(setup.values), k_cache, v_cache, setup.batch)
    assert torch.equal(k_cache, expected_k)
    assert torch.equal(v_cache, expected_v)


@every_store
def test_keys_with_the_wrong_head_count_are_not_stored(store: StoreKV) -> None:
    setup = paged_setup(MIXED)
    k, v = setup.new(setup.keys), setup.new(setup.values)
    for wrong_k, wrong_v in ((k[:, :1], v), (k, v[:, :1]), (k[:1], v), (k, v[..., :1])):
        with pytest.raises(REFUSALS):
            store(wrong_k, wrong_v, setup.k_cache, setup.v_cache, setup.batch)


# ---- deliberate faults: each must fail where the real thing passes -------------------------------


def altered(module: ModuleType, *changes: tuple[str, str]) -> PagedAttention:
    """The module's paged attention with pieces of its text replaced, wherever they occur."""
    mutant = compiled(module, *changes)
    if module is torch_decode:
        user = compiled(torch_paged)
        user.Decodes, user.prepare_decodes = mutant.Decodes, mutant.Decodes.prepare
        user.gather, user.rows_of_blocks = mutant.gather, mutant.rows_of_blocks
        return prepared(user)
    if module is torch_paged:
        return prepared(mutant)
    name = module.__name__.split(".")[-1].removesuffix("_paged")
    return getattr(mutant, f"{name}_paged_attention")


MUTANTS = {
    "a query sees one key too many": (
        reference, "key_positions > query_positions", "key_positions > 1 + query_positions"
    ),
    "a query does not see its own key": (
        blockwise, "> positions[:, None]", ">= positions[:, None].clamp(min=1)"
    ),
    "KV heads go to the wrong query heads": (
        reference, "repeat_interleave(group_size, dim=1)", "repeat(1, group_size, 1)"
    ),
    "query heads are grouped the wrong way": (
        torch_decode, ".unflatten(1, (kv_heads, -1))", ".unflatten(1, (-1, kv_heads)).mT"
    ),
    "query heads of a prompt are grouped the wrong way": (
        torch_paged,
        "unflatten(0, (keys.shape[0], -1))",
        "unflatten(0, (-1, keys.shape[0])).transpose(0, 1)",
    ),
    "the output is not corrected": (blockwise, "correction * output", "output"),
    "the total is not corrected": (blockwise, "correction * total", "total"),
    "the maximum is not subtracted": (
        blockwise, "torch.maximum(maximum, scores.amax(dim=-1, keepdim=True))", "maximum * 0"
    ),
    "stale slots of the last block are read": (
        torch_decode, "positions >= context_lens", "positions > context_lens"
    ),
    "the last key is not seen": (
        torch_decode, "positions >= context_lens", "1 + positions >= context_lens"
    ),
    "a padded entry becomes block 0": (torch_decode, "tables, tables[:, :1])", "tables, 0)"),
    "a padded entry is read": (torch_decode, "torch.where(used, tables, tables[:, :1])", "tables"),
    "the context is forgotten in a chunk": (
        torch_paged, "positions[span.context_len :, None]", "positions[: span.query_len, None]"
    ),
    "a chunk is taken for a whole prompt": (torch_paged, "if span.context_len == 0:", "if True:"),
    "a prompt's last block is read to its end": (
        torch_paged, "keys[:, : prefill.seq_len]", "keys"
    ),
    "the group's first sequence sets the length": (
        torch_decode, "context_lens[:, None] + 1", "context_lens[:1, None] + 1"
    ),
    "results go to the wrong sequences": (
        torch_decode, "spans[seq].start for seq in seqs", "spans[seq].start for seq in sorted(seqs)"
    ),
    "a sequence between two groups is left out": (
        torch_decode, "start = stop\n", "start = stop + 1\n"
    ),
}  # fmt: skip
IN_PLACE_MUTANTS = {
    "a shared block has one owner": (
        "not torch.equal(entry_of_block[blocks], entries)", "False"
    ),
    "every block has the first query": (
        "owner=entry_of_block // tables.shape[1]", "owner=entry_of_block * 0"
    ),
    "scores keep the order of the blocks": (
        "block_of_entry=(tables - first).flatten()",
        "block_of_entry=torch.arange(tables.numel()).clamp(max=stop - first - 1)",
    ),
    "weights keep the order of the positions": (
        "weights.index_select(0, way.entry_of_block)",
        "weights[torch.arange(num_blocks).clamp(max=len(weights) - 1)]",
    ),
    "stale slots are read": (
        "torch.add(way.mask, scores, alpha=scale)", "(scores * scale)"
    ),
    "a block without an owner is summed": (
        "F.embedding_bag(way.blocks,", "F.embedding_bag(way.owner.argsort(),"
    ),
    "the range ends too early": ("int(blocks.max()) + 1", "int(blocks.max())"),
    "sums begin where the neighbour's end": (
        "starts=ends - torch.tensor(columns)", "starts=ends.clamp(max=len(blocks))"
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_a_deliberate_fault_is_caught(
    mutant: tuple[ModuleType, str, str],
) -> None:
    module, old, new = mutant
    small_groups = [("= 2**20", "= 2**11")] if module is torch_decode else []
    faulty = altered(module, (old, new), *small_groups)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):  # wrong, or no such block
        check_all(faulty)


ALWAYS_IN_PLACE = [
    ("= 2**17", "= 0"),
    ("= 2 / 3", "= 0.0"),
    ("GROUP = 3", "GROUP = 1000"),
    ("ENTRIES = 4", "ENTRIES = 1000"),
]


def test_without_a_fault_the_altered_module_is_right() -> None:
    check_all(altered(torch_decode, ("= 2**20", "= 2**11")))
    check_all(altered(torch_decode, *ALWAYS_IN_PLACE))


@pytest.mark.parametrize("mutant", IN_PLACE_MUTANTS.values(), ids=IN_PLACE_MUTANTS.keys())
def test_a_deliberate_fault_in_place_is_caught(mutant: tuple[str, str]) -> None:
    faulty = altered(torch_decode, mutant, *ALWAYS_IN_PLACE)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check_all(faulty)


@every_implementation
def test_reading_the_table_of_a_neighbour_is_caught(attention: PagedAttention) -> None:
    def faulty(q: Tensor, k_cache: Tensor, v_cache: Tensor, batch, scale: float) -> Tensor:
        rolled = replace(batch, block_tables=batch.block_tables.roll(1, dims=0))
        return attention(q, k_cache, v_cache, rolled, scale)

    with pytest.raises(AssertionError):
        check(faulty, paged_setup([(1, 6), (1, 6), (4, 3)]))


@every_implementation
def test_a_forgotten_scale_is_caught(attention: PagedAttention) -> None:
    with pytest.raises(AssertionError):
        check(lambda *inputs: attention(*inputs[:-1], 1.0), paged_setup(MIXED))
