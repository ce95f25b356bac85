"""Lab 3: the results that paged attention must give, however it is computed.

The pools are adversarial (`paged_setup`): blocks in any order, NaN in free ones, large finite
values in empty slots, and invalid table entries after the end of a sequence.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minipaged.attention.batch import Batch
from minipaged.attention.quantized_cache import QuantizedPool
from minipaged.evaluation.testing.paged_setup import (
    NO_BLOCKS,
    PagedSetup,
    dense_attention,
    paged_setup,
)

from numbers_alike import closely
from serving import prompts, serves_what_the_library_serves

# (query_len, context_len): prompts, chunks of prompts and single tokens. With blocks of 4, some end
# before a block boundary, some at it and some after it.
MIXED = [(5, 0), (1, 6), (3, 5), (1, 7), (4, 4), (1, 8), (8, 0), (2, 11), (1, 0)]


essential = pytest.mark.essential


def task(number: int) -> pytest.MarkDecorator:
    return pytest.mark.lab(number=3, task=number)


@pytest.fixture
def gather(part):
    return part("minipaged.attention.reference.gather")


@pytest.fixture
def attend(part):
    return part("minipaged.attention.reference.causal_attention")


@pytest.fixture
def by_gathering(part):
    return part("paged_attention")


@pytest.fixture
def by_blocks(part):
    return part("minipaged.attention.blockwise.blockwise_paged_attention")


def agrees(attention, setup: PagedSetup, tolerance: float = 2e-5) -> None:
    """Compare with attention over contiguous keys in float64. Raises AssertionError."""
    got = attention(setup.q, setup.k_cache, setup.v_cache, setup.batch, setup.scale)
    agree(got, setup.q, dense_attention(setup), setup.batch, tolerance)


def agree(got, q, expected, batch: Batch, tolerance: float) -> None:
    assert (got.shape, got.dtype) == (q.shape, q.dtype), "shape and dtype, which must be those of q"
    for number, span in enumerate(batch.spans):
        rows = slice(span.start, span.stop)
        what = f"sequence {number}, {span.query_len} queries after {span.context_len} keys"
        assert not got[rows].isnan().any(), f"{what}: NaN"
        closely(got[rows], expected[rows], tolerance, what)


def one_sequence(attend, query_len: int, context_len: int, **sizes):
    """Attention over contiguous keys, and the same in float64."""
    setup = paged_setup([(query_len, context_len)], **sizes)
    got = attend(setup.q, setup.keys[0], setup.values[0], context_len, setup.scale)
    return got, dense_attention(setup), setup


# ---- task 1: gather through the block table ------------------------------------------------------


def numbered(num_blocks: int, kv_heads: int, block_size: int) -> torch.Tensor:
    """A pool whose keys encode their position: block, head, slot."""
    axes = [torch.arange(n) for n in (num_blocks, kv_heads, block_size)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).float()


@task(1)
def test_gather_reads_the_blocks_that_the_table_lists(gather):
    got = gather(numbered(8, 1, 4), torch.tensor([5, 2, 7], dtype=torch.int32), 12)
    blocks = [int(block) for block in got[:, 0, 0]]
    assert blocks == [5, 5, 5, 5, 2, 2, 2, 2, 7, 7, 7, 7]
    assert [int(slot) for slot in got[:, 0, 2]] == [0, 1, 2, 3] * 3


@task(1)
def test_every_head_keeps_its_own_keys(gather):
    got = gather(numbered(4, 3, 2), torch.tensor([3, 1], dtype=torch.int32), 4)
    assert got.shape == (4, 3, 3), "shape, which must be [length, kv_heads, head_dim]"
    assert got[:, :, 1].tolist() == [[0, 1, 2]] * 4


@task(1)
@pytest.mark.parametrize("seq_len", [1, 3, 4, 5, 8, 11])
def test_gather_ends_where_the_sequence_ends(gather, seq_len):
    setup = paged_setup([(1, seq_len - 1)])
    got = gather(setup.k_cache, setup.batch.block_tables[0], seq_len)
    assert got.shape == setup.keys[0].shape
    assert torch.equal(got, setup.keys[0])


@task(1)
@essential("gather only the sequence's tokens: later table entries are not blocks (rule 3).")
@pytest.mark.parametrize("no_block", NO_BLOCKS)
def test_unused_entries_of_a_table_are_never_read(gather, no_block):
    table = torch.tensor([6, 1, no_block, no_block], dtype=torch.int32)
    got = gather(numbered(8, 2, 4), table, 7)
    assert [int(block) for block in got[:, 0, 0]] == [6, 6, 6, 6, 1, 1, 1]


@task(1)
def test_a_block_may_be_in_two_tables(gather):
    setup = paged_setup([(1, 8), (1, 10)], shared_blocks=2)
    for row, values in enumerate(setup.values):
        got = gather(setup.v_cache, setup.batch.block_tables[row], len(values))
        assert torch.equal(got, values)


# ---- task 2: attend causally ---------------------------------------------------------------------


@task(2)
@pytest.mark.parametrize(("query_len", "context_len"), [(1, 0), (6, 0), (1, 9), (3, 5)])
def test_the_result_is_that_of_dense_attention(attend, query_len, context_len):
    got, expected, setup = one_sequence(attend, query_len, context_len, heads=2, kv_heads=2)
    agree(got, setup.q, expected, setup.batch, 1e-5)


@task(2)
@essential("no query may attend to a later key (rule 2).")
def test_a_key_after_a_query_changes_nothing(attend):
    setup = paged_setup([(4, 3)])
    keys, values = setup.keys[0], setup.values[0]
    before = attend(setup.q, keys, values, 3, setup.scale)
    for query in range(4):
        changed, worth = keys.clone(), values.clone()
        changed[3 + query + 1 :], worth[3 + query + 1 :] = 7.0, -7.0
        after = attend(setup.q, changed, worth, 3, setup.scale)
        assert torch.equal(after[query], before[query]), f"query {query} of 4 uses a later key"


@task(2)
def test_a_query_attends_to_itself_and_all_earlier_tokens(attend):
    setup = paged_setup([(4, 3)])
    keys, values = setup.keys[0], setup.values[0]
    before = attend(setup.q, keys, values, 3, setup.scale)
    for query in range(4):
        for key in range(3 + query + 1):
            changed = values.clone()
            changed[key] += 100.0
            after = attend(setup.q, keys, changed, 3, setup.scale)
            assert not torch.equal(after[query], before[query]), f"query {query} ignores key {key}"


@task(2)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (6, 2), (6, 3)])
def test_neighbouring_query_heads_share_a_kv_head(attend, heads, kv_heads):
    got, expected, setup = one_sequence(attend, 2, 5, heads=heads, kv_heads=kv_heads)
    agree(got, setup.q, expected, setup.batch, 1e-5)


@task(2)
def test_scores_are_scaled_before_the_softmax(attend):
    """With a scale of 0 all keys have the same weight; with a huge one, the best key has all."""
    setup = paged_setup([(1, 7)], heads=1, kv_heads=1)
    keys, values = setup.keys[0], setup.values[0]
    even = attend(setup.q, keys, values, 7, 0.0)
    assert torch.allclose(even[0], values.mean(dim=0), atol=1e-5)
    best = (keys[:, 0] @ setup.q[0, 0]).argmax()
    assert torch.allclose(attend(setup.q, keys, values, 7, 1e4)[0], values[best], atol=1e-5)


@task(2)
def test_sums_are_kept_in_full_precision(attend):
    got, expected, setup = one_sequence(
        attend, 3, 60, dtype=torch.bfloat16, heads=4, kv_heads=2, magnitude=4.0
    )
    nearest = expected.bfloat16().double()  # the nearest bfloat16 number
    agree(got, setup.q, expected, setup.batch, 2 * (nearest - expected).abs().max().item())


@task(2)
def test_your_gather_and_attention_serve_a_whole_batch(by_gathering):
    agrees(by_gathering, paged_setup(MIXED))


@task(2)
def test_a_prompt_may_come_in_chunks(by_gathering):
    """Three queries after five keys are the last three of eight."""
    whole, pieces = paged_setup([(8, 0)]), paged_setup([(3, 5)])
    pieces.q.copy_(whole.q[5:])
    in_one, in_two = (
        by_gathering(s.q, whole.k_cache, whole.v_cache, s.batch, s.scale) for s in (whole, pieces)
    )
    assert torch.allclose(in_one[5:], in_two, atol=1e-5)


# ---- task 3: block by block, without gathering ---------------------------------------------------


@task(3)
@pytest.mark.parametrize("length", [1, 3, 4])
def test_one_block_gives_the_result_of_dense_attention(by_blocks, length):
    agrees(by_blocks, paged_setup([(1, length - 1)]))


@task(3)
@pytest.mark.parametrize("length", [5, 8, 9, 50])
def test_one_query_attends_to_several_blocks(by_blocks, length):
    agrees(by_blocks, paged_setup([(1, length - 1)], magnitude=3.0))


@task(3)
@pytest.mark.parametrize("larger", [0, 1, 2])
def test_the_largest_score_may_be_in_any_block(by_blocks, larger):
    setup = paged_setup([(1, 11)], heads=1, kv_heads=1)
    setup.keys[0][4 * larger] = 2.0 * setup.q[0]  # the largest score
    setup.k_cache[setup.tables[0].blocks[larger], :, 0] = 2.0 * setup.q[0]
    agrees(by_blocks, setup)


@task(3)
def test_large_scores_do_not_overflow(by_blocks):
    agrees(by_blocks, paged_setup([(1, 9), (5, 3)], magnitude=100.0), tolerance=1e-3)


@task(3)
def test_very_negative_scores_do_not_underflow(by_blocks):
    setup = paged_setup([(1, 9)], heads=1, kv_heads=1)
    ones = torch.ones_like(setup.q)
    setup.q.copy_(-100 * ones)
    setup.keys[0].abs_().add_(1)
    for position, key in enumerate(setup.keys[0]):
        block, slot = divmod(setup.tables[0].slot(position), 4)
        setup.k_cache[block, :, slot] = key
    agrees(by_blocks, setup, tolerance=1e-3)


@task(3)
def test_a_query_may_see_nothing_of_a_block(by_blocks):
    agrees(by_blocks, paged_setup([(10, 0)]))
    agrees(by_blocks, paged_setup([(7, 3)]))


@task(3)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 2), (6, 3)])
def test_block_by_block_neighbours_share_a_kv_head(by_blocks, heads, kv_heads):
    agrees(by_blocks, paged_setup([(2, 5), (1, 6)], heads=heads, kv_heads=kv_heads))


@task(3)
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_blocks_have_any_size(by_blocks, block_size):
    agrees(by_blocks, paged_setup(MIXED, block_size=block_size))


@task(3)
def test_block_by_block_sums_are_exact(by_blocks):
    setup = paged_setup([(3, 60)], dtype=torch.bfloat16, magnitude=4.0)
    expected = dense_attention(setup)
    rounding = (expected.bfloat16().double() - expected).abs().max().item()
    agrees(by_blocks, setup, tolerance=2 * rounding)


@task(3)
@essential("do not gather in this task: read one physical block at a time.")
def test_blocks_are_read_one_at_a_time(by_blocks):
    """The pool refuses to read two blocks at once."""
    setup = paged_setup([(2, 13), (1, 6)])
    pool = [OneBlockAtATime(cache, cache) for cache in (setup.k_cache, setup.v_cache)]
    assert by_blocks(setup.q, *pool, setup.batch, setup.scale).shape == setup.q.shape


@task(3)
@essential("do not gather in this task: neither copy blocks nor collect them in one tensor.")
def test_memory_does_not_grow_with_the_number_of_blocks(by_blocks):
    largest = []
    for num_blocks in (8, 16):
        setup = paged_setup([(1, 4 * num_blocks - 1)])
        with LargestTensor() as made:
            by_blocks(setup.q, setup.k_cache, setup.v_cache, setup.batch, setup.scale)
        largest.append(made.num_elements)
    assert largest[1] == largest[0], "size of the largest new tensor for 16 blocks, and for 8"


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor with its own storage that an operation creates."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if torch.is_tensor(result) and not result._is_view():
            self.num_elements = max(self.num_elements, result.numel())
        return result


class OneBlockAtATime(QuantizedPool):
    """A pool that is not a tensor, like an 8-bit pool, and refuses to read several blocks."""

    def __getitem__(self, index):
        first = index[0] if isinstance(index, tuple) else index
        one = torch.is_tensor(first) and first.numel() == 1
        assert isinstance(first, int) or one, "read one physical block at a time: pool[block]"
        return self.numbers[index]


# ---- task 4: serve a language model with both ----------------------------------------------------


@pytest.fixture(params=["by_gathering", "by_blocks"])
def served(request):
    """The options that make a model use this attention."""
    return {"paged_attention": request.getfixturevalue(request.param)}


@task(4)
def test_the_model_generates_the_same_with_the_attention_of_the_library(observed, served):
    serves_what_the_library_serves(observed, also=served, num_blocks=64, max_tokens=8)


@task(4)
def test_prompts_come_in_chunks_and_blocks_are_reused(observed, served):
    serves_what_the_library_serves(
        observed, also=served, num_blocks=40, block_size=8, max_num_seqs=8,
        max_num_batched_tokens=48, max_tokens=8,
    )  # fmt: skip


@task(4)
def test_samples_read_the_blocks_of_their_prompt_together(observed, served):
    serves_what_the_library_serves(
        observed, also=served, num_blocks=64, samples=2, texts=prompts()[:2], max_tokens=8
    )
