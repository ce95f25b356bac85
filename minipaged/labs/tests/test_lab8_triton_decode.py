"""Lab 8: the results that the kernel must give, interpreted on a CPU or compiled on a GPU.

The pools are adversarial (`paged_setup`). All tensors are surrounded by NaN, so a read outside a
tensor shows in the result, and neither a read nor a write outside crashes the process.
"""

from dataclasses import fields, replace

import pytest
import torch

from minipaged.evaluation.testing.paged_setup import PagedSetup, dense_attention, paged_setup

from numbers_alike import closely
from serving import serves_what_the_library_serves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIELD = 2**17  # elements of NaN before a tensor and after it
EMPTY = torch.empty  # before it is poisoned

# (query_len, context_len): single tokens whose contexts end before, at and after a block boundary.
DECODES = [(1, 6), (1, 0), (1, 7), (1, 8), (1, 3)]
MIXED = [(1, 6), (3, 5), (1, 0), (4, 0), (2, 11)]


def why_no_kernel() -> str | None:
    """Why no kernel can run here; None if it can."""
    from minipaged.attention.triton.machine import why_no_triton

    return why_no_triton(torch.device(DEVICE), head_dim=64)


def why_not_compiled() -> str | None:
    """Why no kernel can be compiled here; None if it can."""
    if DEVICE == "cpu":
        return "this machine has no CUDA GPU"
    from minipaged.attention.triton.machine import is_interpreted

    return "TRITON_INTERPRET=1 asks for the interpreter" if is_interpreted() else None


NO_KERNEL = why_no_kernel()
NO_COMPILER = NO_KERNEL or why_not_compiled()
pytestmark = pytest.mark.skipif(NO_KERNEL is not None, reason=str(NO_KERNEL))
compiled = pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))


essential = pytest.mark.essential


def task(number: int) -> pytest.MarkDecorator:
    return pytest.mark.lab(number=8, task=number)


@pytest.fixture
def decode(part):
    """The kernel by name, because the library's default for this role is not the kernel."""
    return part("minipaged.attention.triton.naive_decode.naive_paged_attention")


@pytest.fixture
def agrees(decode, monkeypatch):
    """Fails unless the kernel agrees with dense attention in float64, sequence by sequence."""

    def poisoned(*shape, **options):
        tensor = EMPTY(*shape, **options)
        if not tensor.is_floating_point():
            return tensor
        return in_a_field(tensor.fill_(torch.nan))

    def check(setup: PagedSetup, tolerance: float = 2e-5, gap: int = 0) -> None:
        expected, ours = dense_attention(setup), on_device(setup, gap)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", poisoned)  # elements that are not written stay NaN
            got = run(decode, ours).double().cpu()
        assert got.shape == expected.shape
        for number, span in enumerate(setup.batch.spans):
            rows = slice(span.start, span.stop)
            what = f"sequence {number}, {span.query_len} queries after {span.context_len} keys"
            assert not got[rows].isnan().any(), f"{what}: NaN, from outside the sequence"
            closely(got[rows], expected[rows], tolerance, what)

    return check


def run(attention, setup: PagedSetup):
    """The kernel's result. A compiler error is reported in one line."""
    from triton.compiler.errors import CompilationError

    try:
        return attention(setup.q, setup.k_cache, setup.v_cache, setup.batch, setup.scale)
    except CompilationError as error:
        pytest.fail(f"the kernel does not compile: {' '.join(str(error).split())[-400:]}")


def on_device(setup: PagedSetup, gap: int) -> PagedSetup:
    """The setup on the kernel's device, with a gap of NaN between the rows of queries."""
    values = {field.name: getattr(setup.batch, field.name) for field in fields(setup.batch)}
    tensors = {name: v.to(DEVICE) for name, v in values.items() if isinstance(v, torch.Tensor)}
    table = tensors["block_tables"]
    of_the_pool = (table >= 0) & (table < len(setup.k_cache))
    tensors["block_tables"] = table.where(of_the_pool, 0)  # block 0 is free, full of NaN
    return replace(
        setup,
        q=in_a_field(setup.q, gap),
        k_cache=in_a_field(setup.k_cache),
        v_cache=in_a_field(setup.v_cache),
        batch=replace(setup.batch, **tensors),
    )


def in_a_field(tensor, gap: int = 0):
    """A copy surrounded by NaN, also between its rows if there is a gap."""
    *_, width = shape = list(tensor.shape)
    margin = -(-FIELD // tensor[0].numel())
    rows = slice(margin, margin + len(tensor))
    shape[0], shape[-1] = len(tensor) + 2 * margin, width + gap
    field = torch.full(shape, torch.nan, dtype=tensor.dtype, device=DEVICE)
    field[rows, ..., :width] = tensor.to(DEVICE)
    return field[rows, ..., :width]


# ---- task 1: one query, one head, one block ------------------------------------------------------


def one_sequence(length: int, **sizes) -> PagedSetup:
    return paged_setup([(1, length - 1)], **({"heads": 1, "kv_heads": 1} | sizes))


@task(1)
def test_one_full_block_gives_the_result_of_dense_attention(agrees):
    agrees(one_sequence(4))


@task(1)
@essential("nothing after the query's own position may affect the result (rule 3).")
@pytest.mark.parametrize("length", [1, 2, 3])
def test_empty_slots_of_a_block_are_ignored(agrees, length):
    agrees(one_sequence(length))


@task(1)
@pytest.mark.parametrize("head_dim", [8, 16, 24, 64])
def test_heads_have_any_size(agrees, head_dim):
    agrees(one_sequence(3, head_dim=head_dim))


@task(1)
@pytest.mark.parametrize("block_size", [1, 2, 3, 6, 16])
def test_blocks_have_any_size(agrees, block_size):
    agrees(one_sequence(block_size, block_size=block_size))


@task(1)
def test_the_block_is_found_through_the_table(agrees):
    for seed in range(4):
        agrees(one_sequence(4, seed=seed))


@task(1)
def test_scores_are_multiplied_by_the_scale(agrees):
    agrees(replace(one_sequence(4), scale=0.02))


@task(1)
def test_large_scores_do_not_overflow(agrees):
    setup = one_sequence(4, magnitude=100.0)
    agrees(setup, tolerance=1e-3)
    agrees(replace(setup, q=-setup.q), tolerance=1e-3)


# ---- task 2: all blocks, in one pass -------------------------------------------------------------


@task(2)
@essential("the result is that of plain attention, for every length (rule 1).")
@pytest.mark.parametrize("length", [5, 7, 8, 9, 12, 13])
def test_a_sequence_of_several_blocks_is_attended_in_full(agrees, length):
    agrees(one_sequence(length, magnitude=2.0))


@task(2)
@pytest.mark.parametrize("larger", [0, 1, 2])
def test_the_largest_score_may_be_in_any_block(agrees, larger):
    setup = one_sequence(11)
    setup.keys[0][4 * larger] = 2.0 * setup.q[0]  # the largest score
    setup.k_cache[setup.tables[0].blocks[larger], :, 0] = 2.0 * setup.q[0]
    agrees(setup)


@task(2)
def test_a_long_sequence_gives_the_result_of_dense_attention(agrees):
    agrees(one_sequence(150, magnitude=3.0))


@task(2)
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_blocks_of_any_size_one_after_another(agrees, block_size):
    agrees(one_sequence(2 * block_size + 1, block_size=block_size))


@task(2)
def test_large_scores_in_several_blocks_do_not_overflow(agrees):
    agrees(one_sequence(11, magnitude=100.0), tolerance=1e-3)


# ---- task 3: batches, grouped heads, prompts -----------------------------------------------------


@task(3)
@essential("no key of another sequence may affect the result (rule 3).")
def test_each_sequence_reads_its_own_blocks(agrees):
    agrees(paged_setup(DECODES, heads=1, kv_heads=1))


@task(3)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (4, 2), (6, 3)])
def test_neighbouring_query_heads_share_a_kv_head(agrees, heads, kv_heads):
    agrees(paged_setup([(1, 6), (1, 3)], heads=heads, kv_heads=kv_heads))


@task(3)
def test_a_block_may_be_in_several_tables(agrees):
    agrees(paged_setup([(1, 8), (1, 10), (1, 12)], shared_blocks=2, heads=2, kv_heads=1))


@task(3)
def test_a_prompt_is_many_queries_of_one_sequence(agrees):
    agrees(paged_setup([(6, 0)], heads=2, kv_heads=1))


@task(3)
def test_prompts_chunks_and_single_tokens_may_share_a_batch(agrees):
    agrees(paged_setup(MIXED, heads=2, kv_heads=1))


@task(3)
def test_rows_of_queries_may_have_gaps_between_them(agrees):
    """As in a model whose queries, keys and values are columns of one product."""
    agrees(paged_setup([(1, 6), (2, 3)], heads=4, kv_heads=2), gap=32)


# ---- task 4: serve a language model --------------------------------------------------------------


@task(4)
def test_the_model_generates_the_same_with_your_kernel_and_the_library(observed, decode):
    serves_what_the_library_serves(
        observed, also={"paged_attention": decode}, num_blocks=8, block_size=4,
        texts=("Once upon a time", "Once"), max_tokens=4,
    )  # fmt: skip


# ---- task 5: compiled, on a GPU ------------------------------------------------------------------


@task(5)
@compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_is_right_for_the_heads_of_a_real_model(agrees, dtype):
    setup = paged_setup(
        [(1, 99), (1, 100), (5, 30)], heads=32, kv_heads=8, head_dim=128, block_size=16, dtype=dtype
    )
    agrees(setup, tolerance=4e-2 if dtype is torch.bfloat16 else 4e-3)


@task(5)
@essential("read each key once, as part of a tile, or the kernel is slower than the plain one.")
@compiled
def test_it_takes_at_most_one_and_a_half_times_as_long_as_the_library(decode):
    """64 sequences of 2,048 tokens decode one token each; medians of interleaved runs."""
    from minipaged.attention.triton.naive_decode import naive_paged_attention
    from minipaged.evaluation.bench.cases import Case, Heads, make_inputs
    from minipaged.evaluation.bench.timing import median_seconds

    device = torch.device(DEVICE)
    case = Case(Heads("of an 8B model", 32, 8, 128), num_seqs=64, length=2048)
    made = make_inputs(case, device, torch.float16)
    inputs = (made.q, made.k_cache, made.v_cache, made.batch, made.scale)
    works = {"yours": decode, "the library's": naive_paged_attention}
    seconds = median_seconds({name: lambda f=f: f(*inputs) for name, f in works.items()}, device)
    ratio = seconds["yours"] / seconds["the library's"]
    assert ratio < 1.5, f"yours takes {ratio:.1f} times as long as the library's plain kernel"
