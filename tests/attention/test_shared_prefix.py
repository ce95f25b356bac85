"""Shared prefixes attended once per block, against dense attention and once per owner."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutants import compiled
from torch import Tensor

from minipaged.attention import log_sum_exp, shared_prefix, torch_decode
from minipaged.attention.log_sum_exp import attend_with_lse, can_fuse, merge
from minipaged.attention.quantized_cache import QuantizedPool, quantize
from minipaged.attention.reference import reference_paged_attention
from minipaged.attention.shared_prefix import SharedDecodes, find_prefixes, prepare_decodes
from minipaged.attention.torch_decode import Decodes, InPlace
from minipaged.attention.torch_paged import prepare_torch, torch_paged_attention
from minipaged.evaluation.testing.paged_setup import PagedSetup, dense_attention, paged_setup

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}


def decodes_of(
    setup: PagedSetup, fewest_saved: int | None = 0, module: ModuleType = shared_prefix
) -> Decodes | SharedDecodes | None:
    heads, dtype = setup.q.shape[1], setup.q.dtype
    return module.prepare_decodes(setup.batch, setup.k_cache, heads, dtype, fewest_saved)


def attend(setup: PagedSetup, decodes: Decodes | SharedDecodes) -> Tensor:
    """The outputs of the decoding sequences, in the order of the batch."""
    chosen = setup.q if decodes.tokens is None else setup.q[decodes.tokens]
    out = decodes.attend(chosen, setup.k_cache, setup.v_cache, setup.scale)
    if decodes.tokens is None:
        return out
    return out[decodes.tokens.argsort()]


def expected(setup: PagedSetup) -> Tensor:
    rows = [span.start for span in setup.batch.spans if span.query_len == 1]
    return dense_attention(setup)[rows]


def check(setup: PagedSetup, module: ModuleType = shared_prefix) -> None:
    decodes = decodes_of(setup, module=module)
    assert decodes is not None
    assert not isinstance(decodes, Decodes), "no prefix was found"
    tolerance = TOLERANCE[setup.q.dtype]
    found = attend(setup, decodes).double()
    torch.testing.assert_close(found, expected(setup), rtol=tolerance, atol=tolerance)


# ---- the answer ----------------------------------------------------------------------------------


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """Sequences that fork from earlier ones anywhere, at block boundaries or within blocks."""
    block_size = draw(st.sampled_from([1, 2, 3, 4, 7, 16]))
    lengths = st.integers(0, 6 * block_size + 1)
    # Three out of four decode; the others are prompts, whole or in part.
    queries = st.sampled_from([1, 1, 1, 5])
    sizes = draw(st.lists(st.tuples(queries, lengths), min_size=2, max_size=9))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (4, 1), (3, 3), (4, 2), (6, 2)]))
    forks = {
        child: (draw(st.integers(0, child - 1)), draw(st.integers(0, 7)))
        for child in range(1, len(sizes))
    }
    return {
        "sizes": sizes,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": draw(st.sampled_from([1, 7, 32])),
        "block_size": block_size,
        "forks": forks,
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "seed": draw(st.integers(0, 2**20)),
    }


WAYS = {
    "gathered": {},
    "gathered in small pieces": {"NUMBERS_AT_ONCE": 2**8},
    "in place": {
        "FEWEST_IN_PLACE": 0,
        "LEAST_IN_USE": 0,
        "MOST_ENTRIES": 1000,
        "LARGEST_GROUP": 1000,
    },
}
every_way = pytest.mark.parametrize("way", WAYS)


@contextmanager
def reading(way: str) -> Iterator[None]:
    """Lets `torch_decode` read what sequences do not share in this way."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in WAYS[way].items():
            patch.setattr(torch_decode, name, value)
        yield


@every_way
@given(options=trees())
def test_any_tree_of_sequences_gives_what_dense_attention_gives(
    way: str, options: dict[str, Any]
) -> None:
    setup = paged_setup(**options)
    with reading(way):
        decodes = decodes_of(setup)
    if decodes is None:
        assert all(query_len != 1 for query_len, _ in options["sizes"])
        return
    tolerance = TOLERANCE[options["dtype"]]
    found = attend(setup, decodes).double()
    torch.testing.assert_close(found, expected(setup), rtol=tolerance, atol=tolerance)


@every_way
def test_the_rest_of_owners_is_read_in_place_if_nothing_else_is_shared(way: str) -> None:
    with reading(way):
        decodes = decodes_of(paged_setup([(1, 20), (1, 30), (1, 9)], shared_blocks=2))
    assert isinstance(decodes, SharedDecodes)
    assert isinstance(decodes.own.way, InPlace) == (way == "in place")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("pool", ["same", "bfloat16", "int8", "fp8"])
def test_pools_of_every_type_are_converted_once(dtype: torch.dtype, pool: str) -> None:
    setup = paged_setup([(1, 20), (1, 30), (1, 9), (1, 70)], shared_blocks=2, dtype=dtype)
    caches: list[Any] = [setup.k_cache, setup.v_cache]
    if pool == "bfloat16":
        caches = [cache.bfloat16() for cache in caches]
    if pool in ("int8", "fp8"):
        stored = torch.int8 if pool == "int8" else torch.float8_e4m3fn
        caches = [QuantizedPool(*quantize(cache.nan_to_num(), stored)) for cache in caches]
    decodes = prepare_decodes(setup.batch, caches[0], 4, dtype, 0)
    assert isinstance(decodes, SharedDecodes)
    found = decodes.attend(setup.q, *caches, setup.scale)
    plain = reference_paged_attention(setup.q.float(), *caches, setup.batch, setup.scale)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.float(), plain, rtol=tolerance, atol=tolerance)


def test_enormous_scores_of_one_part_outweigh_the_other() -> None:
    setup = paged_setup([(1, 20), (1, 30), (1, 9)], shared_blocks=2, magnitude=1e8)
    decodes = decodes_of(setup)
    assert isinstance(decodes, SharedDecodes)
    found = attend(setup, decodes)
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), expected(setup), rtol=1e-4, atol=1e-4)


def test_a_mixed_batch_with_prompts_is_attended_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(3, 8), (1, 20), (5, 0), (1, 30), (1, 2), (1, 9), (2, 15)]
    setup = paged_setup(sizes, forks={3: (1, 4), 5: (1, 2), 6: (1, 3)}, dtype=torch.float64)
    monkeypatch.setattr(shared_prefix, "FEWEST_SAVED", 0)
    batch = prepare_torch(setup.batch, setup.k_cache, 4, torch.float64)
    assert isinstance(batch.decodes, SharedDecodes)
    found = torch_paged_attention(setup.q, setup.k_cache, setup.v_cache, batch, setup.scale)
    torch.testing.assert_close(found, dense_attention(setup), rtol=1e-10, atol=1e-10)


def test_a_broken_key_of_one_owner_does_not_reach_the_others() -> None:
    setup = paged_setup([(1, 20), (1, 30), (1, 9)], shared_blocks=2)
    setup.k_cache[setup.tables[1].blocks[-1]] = torch.nan
    decodes = decodes_of(setup)
    assert isinstance(decodes, SharedDecodes)
    broken = attend(setup, decodes).isnan().any(dim=(1, 2))
    assert broken.tolist() == [False, True, False]


# ---- the choice ----------------------------------------------------------------------------------


def found_in(tables: list[list[int]], can_share: list[int] | None = None) -> list[tuple]:
    padded = np.full((len(tables), 9), -1)
    for i, table in enumerate(tables):
        padded[i, : len(table)] = table
    lengths = np.array(can_share or [len(table) for table in tables], np.int64)
    found = find_prefixes(padded, lengths, np.arange(len(tables)))
    return sorted((each.seqs.tolist(), each.num_blocks) for each in found)


def test_sequences_that_share_nothing_have_no_prefix() -> None:
    assert found_in([]) == []
    assert found_in([[1, 2]]) == []
    assert found_in([[1, 2], [3, 2]]) == []
    assert found_in([[], []]) == []


def test_the_longest_common_run_of_blocks_is_found() -> None:
    assert found_in([[5, 6, 7], [5, 6, 8], [5, 6]]) == [([0, 1, 2], 2)]
    assert found_in([[5, 6, 7], [9], [5, 6, 7]]) == [([0, 2], 3)]
    assert found_in([[5, 6], [1, 2], [5, 9], [1, 2]]) == [([0, 2], 1), ([1, 3], 2)]


def test_a_block_that_may_not_be_shared_ends_the_prefix() -> None:
    assert found_in([[5, 6, 7], [5, 6, 7]], [3, 1]) == [([0, 1], 1)]
    assert found_in([[5, 6, 7], [5, 6, 7]], [3, 0]) == []


def test_of_nested_prefixes_those_that_save_most_are_chosen() -> None:
    near_the_end = [[1, 2, 3, 4], [1, 2, 3, 4], [1, 8, 9, 4], [1, 8, 9, 4]]
    assert found_in(near_the_end) == [([0, 1], 4), ([2, 3], 4)]  # 8 saved instead of 3
    near_the_start = [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 6]]
    assert found_in(near_the_start) == [([0, 1, 2, 3], 3)]  # 9 saved instead of 4


@given(
    tables=st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=2, max_size=6),
)
def test_no_other_choice_of_prefixes_saves_more(tables: list[list[int]]) -> None:
    # In a tree, a block has one path to it: name each node by its path.
    tables = [[hash(tuple(t[: i + 1])) % 10**9 for i in range(len(t))] for t in tables]

    def best(seqs: list[int], depth: int) -> int:
        """The most that can be saved, by trying every cut of every subtree."""
        here = (len(seqs) - 1) * depth
        children: dict[int, list[int]] = {}
        for seq in seqs:
            if len(tables[seq]) > depth:
                children.setdefault(tables[seq][depth], []).append(seq)
        deeper = sum(best(child, depth + 1) for child in children.values() if len(child) > 1)
        return max(here, deeper)

    found = found_in(tables)
    owners = [seq for seqs, _ in found for seq in seqs]
    assert len(owners) == len(set(owners))
    for seqs, num_blocks in found:
        assert len({tuple(tables[seq][:num_blocks]) for seq in seqs}) == 1
        assert all(len(tables[seq]) >= num_blocks > 0 for seq in seqs)
    saved = sum((len(seqs) - 1) * num_blocks for seqs, num_blocks in found)
    assert saved == best(list(range(len(tables))), 0)


def test_prefixes_with_equally_many_owners_are_read_in_one_call() -> None:
    sizes = [(1, 30)] * 9
    forks = {1: (0, 7), 2: (0, 7), 4: (3, 5), 5: (3, 5), 7: (6, 2)}  # 3 owners, 3 owners, 2 owners
    decodes = decodes_of(paged_setup(sizes, forks=forks))
    assert isinstance(decodes, SharedDecodes)
    assert [each.blocks.stop for each in decodes.prefixes] == [2, 1]
    check(paged_setup(sizes, forks=forks))


def test_a_short_prefix_of_few_owners_is_read_once_per_owner() -> None:
    few = paged_setup([(1, 40)] * 2, shared_blocks=9)
    assert isinstance(decodes_of(few), SharedDecodes)
    assert isinstance(decodes_of(few, None), Decodes)
    many = paged_setup([(1, 1200)] * 9, shared_blocks=280)
    assert isinstance(decodes_of(many, None), SharedDecodes)


def test_a_short_prefix_is_read_once_if_it_would_keep_many_keys_from_being_in_place() -> None:
    few_others = paged_setup([(1, 100)] * 8, shared_blocks=1)
    assert isinstance(decodes_of(few_others, None), Decodes)
    many_others = paged_setup([(1, 4200)] * 8, shared_blocks=1)  # 8 * 4,200 * 64 is over 2^21
    decodes = decodes_of(many_others, None)
    assert isinstance(decodes, SharedDecodes)
    assert isinstance(decodes.own.way, InPlace)


def test_without_enough_keys_no_prefix_is_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "find_prefixes", None)
    assert isinstance(decodes_of(paged_setup([(1, 100)] * 8, shared_blocks=9), None), Decodes)


def test_a_prefix_leaves_each_owner_a_block_of_its_own() -> None:
    setup = paged_setup([(1, 15), (1, 15)], shared_blocks=4)  # all 4 blocks are shared
    decodes = decodes_of(setup)
    assert isinstance(decodes, SharedDecodes)
    assert len(decodes.prefixes[0].blocks.rows) == 3 * setup.k_cache.shape[1]
    check(setup)


# ---- two parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "step by step"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_merged_parts_are_the_attention_over_both(
    dtype: torch.dtype, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_sum_exp, "can_fuse", lambda _: fused)
    torch.manual_seed(0)
    q, keys, values = (torch.randn(2, 3, n, 8, dtype=torch.float64).to(dtype) for n in (5, 40, 40))
    parts = [
        attend_with_lse(q, keys[:, :, part], values[:, :, part], None, 0.3)
        for part in (slice(0, 7), slice(7, 40))
    ]
    whole = torch.softmax(0.3 * q.double() @ keys.double().mT, -1) @ values.double()
    found = merge(*parts)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), whole, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_an_operator_that_is_missing_or_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = log_sum_exp._fused
    with ExitStack() as after:
        after.callback(can_fuse.cache_clear)
        for faulty in (
            lambda *_: torch.ops.aten._no_such_operator(),
            lambda *args: (right(*args)[0], 2 * right(*args)[1]),
            lambda *args: (right(*args)[0],),
        ):
            can_fuse.cache_clear()
            monkeypatch.setattr(log_sum_exp, "_fused", faulty)
            assert not can_fuse(torch.float32)
            check(paged_setup([(1, 20), (1, 30), (1, 9)], shared_blocks=2))


# ---- deliberate faults ---------------------------------------------------------------------------


def fixed_setups() -> list[PagedSetup]:
    exact = {"dtype": torch.float64}
    forks = {3: (1, 4), 5: (1, 2), 6: (1, 3)}
    sizes = [(3, 8), (1, 20), (5, 0), (1, 30), (1, 2), (1, 9), (1, 15)]
    return [
        paged_setup([(1, 20), (1, 30), (1, 9)], shared_blocks=2, **exact),
        paged_setup([(1, 11), (1, 15), (1, 9)], shared_blocks=9, heads=3, kv_heads=3, **exact),
        paged_setup(sizes, forks=forks, **exact),
        paged_setup([(1, 15), (1, 15)], shared_blocks=4, **exact),
        paged_setup([(1, 40), (1, 40), (1, 9), (1, 9)], forks={1: (0, 9), 3: (2, 1)}, **exact),
        paged_setup(
            [(1, 30)] * 9, forks={1: (0, 7), 2: (0, 6), 4: (3, 5), 5: (3, 5), 7: (6, 2)}, **exact
        ),
    ]


MUTANTS = {
    "the prefix is left out": (
        shared_prefix, "for each in self.prefixes:", "for each in self.prefixes[:0]:"
    ),
    "only the prefix counts": (
        log_sum_exp, "(lse_two - lse_one).sigmoid()", "torch.ones_like(lse_two)"
    ),
    "both parts count the same": (
        log_sum_exp, "(lse_two - lse_one).sigmoid()", "(0 * lse_two).sigmoid()"
    ),
    "the parts are exchanged": (log_sum_exp, "lse_two - lse_one", "lse_one - lse_two"),
    "the maximum is left out of the log-sum-exp": (
        log_sum_exp, "exact.amax(-1) - weights.amax(-1).log()", "-weights.amax(-1).log()"
    ),
    "the sum is left out of the log-sum-exp": (
        log_sum_exp, "exact.amax(-1) - weights.amax(-1).log()", "exact.amax(-1)"
    ),
    "a mask is forgotten": (log_sum_exp, "scores if mask is None else scores + mask", "scores"),
    "owners are in the wrong order": (
        shared_prefix, "Prefixes(piece, torch.tensor(owners))",
        "Prefixes(piece, torch.tensor(owners[1:] + owners[:1]))",
    ),
    "owners are numbered as in the batch": (
        shared_prefix, "query_of[batch.spans[seq].start]", "int(seq) % len(query_of)"
    ),
    "the prefix is one block too short": (
        shared_prefix, "columns = [each.num_blocks for each in call]",
        "columns = [max(1, each.num_blocks - 1) for each in call]",
    ),
    "the prefix is one block too long": (
        shared_prefix, "else int(is_common.argmin())", "else int(is_common.argmin()) + 1"
    ),
    "no block is left to the owner": (
        shared_prefix, "(batch.seq_lens - 1) // block_size", "batch.seq_lens // block_size"
    ),
    "the rest begins one block early": (
        shared_prefix, "left_out[seqs] = num_blocks", "left_out[seqs] = num_blocks - 1"
    ),
    "the rest sees what follows it": (
        shared_prefix, "batch.context_lens - torch", "batch.context_lens - 0 * torch"
    ),
    "a padded prefix is not masked": (
        shared_prefix, "masked_fill_(hidden, -inf)", "masked_fill_(hidden, 0)"
    ),
    "a padded entry is read": (
        shared_prefix, "torch.where(used, tables, tables[:, :1])", "tables"
    ),
    "queries of owners are exchanged": (
        shared_prefix, "head_dim).transpose(1, 2)", "head_dim).transpose(1, 2).flip(2)"
    ),
}  # fmt: skip


def altered(module: ModuleType, *changes: tuple[str, str]) -> ModuleType:
    """`shared_prefix` with pieces of its text replaced, or of that of `log_sum_exp`."""
    if module is shared_prefix:
        return compiled(shared_prefix, *changes)
    user, mutant = compiled(shared_prefix), compiled(log_sum_exp, *changes)
    mutant.can_fuse = lambda _: False  # without PyTorch's operator, which has no faults
    for name in ("attend_with_lse", "merge", "softmax_with_lse"):
        setattr(user, name, getattr(mutant, name))
    return user


def check_all(module: ModuleType) -> None:
    for setup in fixed_setups():
        check(setup, module)


@every_way
@pytest.mark.parametrize("module", [shared_prefix, log_sum_exp], ids=["prefix", "lse"])
def test_without_a_fault_the_altered_modules_are_right(module: ModuleType, way: str) -> None:
    with reading(way):
        check_all(altered(module))


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_a_deliberate_fault_is_caught(mutant: tuple[ModuleType, str, str]) -> None:
    module, old, new = mutant
    faulty = altered(module, (old, new))
    with pytest.raises((AssertionError, IndexError, RuntimeError, ZeroDivisionError)):
        check_all(faulty)
