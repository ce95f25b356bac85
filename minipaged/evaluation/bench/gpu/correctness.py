"""Stage "correctness": each kernel against float64, in ways that let a fault show:

needles   one key has nearly all the weight: a split or tile that is skipped changes everything
poison    memory that becomes the output is NaN first; free blocks of a mixed batch are NaN
exact     from the pool's own elements, so that the error of 8 bits is the kernel's alone
relative  ||out - exact|| / ||exact|| of each head: see `cases.largest_error`
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch

from minipaged.attention.backend import choose_backend
from minipaged.evaluation.bench import decode_step
from minipaged.evaluation.bench.cases import (
    Case,
    Heads,
    Inputs,
    exact_rows,
    largest_error,
    make_inputs,
)
from minipaged.evaluation.bench.gpu.stage import Part, Setup
from minipaged.evaluation.bench.kernel import (
    LLAMA_3_8B,
    MOST_ERROR,
    OPT_13B,
    WrongResult,
    backends_as_candidates,
)
from minipaged.evaluation.testing.paged_setup import dense_attention, paged_setup

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
GPT_2 = Heads("12/12 x 64", 12, 12, 64)
PADDED = Heads("8/8 x 80", 8, 8, 80)
WIDE = Heads("8/4 x 256", 8, 4, 256)
TINY = Heads("2/1 x 32", 2, 1, 32)

CASES = [
    *((BF16, Case(LLAMA_3_8B, 64, 1024, kv_dtype=kv)) for kv in ("auto", "int8", "fp8")),
    *((BF16, Case(LLAMA_3_8B, 1, 32768, kv_dtype=kv)) for kv in ("auto", "int8", "fp8")),
    *((BF16, Case(LLAMA_3_8B, 1, 4096, 4096, kv)) for kv in ("auto", "int8", "fp8")),
    *((BF16, Case(heads, 16, 2048)) for heads in (GPT_2, PADDED, WIDE, OPT_13B)),
    *((BF16, Case(heads, 1, 1024, 1024)) for heads in (GPT_2, PADDED, WIDE, OPT_13B)),
    *((BF16, Case(heads, 4, 1024, kv_dtype="int8")) for heads in (GPT_2, PADDED, WIDE)),
    (BF16, Case(LLAMA_3_8B, 12, 16384)),
    (BF16, Case(LLAMA_3_8B, 64, 32768, short=1024)),
    (BF16, Case(LLAMA_3_8B, 2, 4096, 512)),
    (BF16, Case(LLAMA_3_8B, 2, 4096, 17)),
    (F16, Case(LLAMA_3_8B, 64, 1024)),
    (F16, Case(LLAMA_3_8B, 1, 1024, 1024)),
    (F32, Case(LLAMA_3_8B, 4, 4096)),
    (F32, Case(LLAMA_3_8B, 1, 512, 512)),
]
TINY_CASES = [
    (BF16, Case(TINY, 1, 528)),  # in three splits
    (BF16, Case(Heads("2/1 x 80", 2, 1, 80), 1, 32, kv_dtype="int8")),
    (BF16, Case(TINY, 2, 32, kv_dtype="fp8")),
    (BF16, Case(TINY, 2, 48, short=16)),
    (F16, Case(TINY, 1, 32, 32)),
    (F32, Case(TINY, 1, 32, 17)),
]
MIXED = [(1, 6), (5, 0), (3, 5), (1, 700), (1, 0), (64, 300), (200, 4), (2, 15), (1, 2049)]
TINY_MIXED = [(1, 6), (5, 0), (1, 40)]
MIXED_HEAD_DIMS = (64, 80, 128, 256)
GRAPH_HEADS = Heads("4/2 x 64", 4, 2, 64)
SEEDS = 2


@dataclass(frozen=True)
class Row:
    """The largest relative error of a head's result; above `most_error`, there is no row."""

    what: str
    heads: str
    num_seqs: int
    lengths: str
    dtype: str
    kv_dtype: str
    backend: str
    most_error: float
    error: float
    needle_error: float | None = None

    def checked(self) -> "Row":
        """This row. Raises WrongResult if an error is too large."""
        for error in (self.error, self.needle_error or 0.0):
            if error > self.most_error:
                raise WrongResult(
                    f"{self.backend}, {self.what} of {self.num_seqs} x {self.lengths} tokens, "
                    f"heads {self.heads}, {self.dtype}, {self.kv_dtype}: a result differs by "
                    f"{error:.2%}, and {self.most_error:.2%} is expected at most."
                )
        return self


def typed_cases(setup: Setup) -> list[tuple[torch.dtype, Case]]:
    """The cases, with the type of their queries."""
    return TINY_CASES if setup.is_dry else CASES


def parts(setup: Setup) -> list[Part]:
    """The parts of this stage."""
    found: list[Part] = []
    for dtype, case in typed_cases(setup):
        types = f"{str(dtype).removeprefix('torch.')}, {case.kv_dtype}"
        name = f"{case.name}, {case.heads.name}, {case.num_seqs} x {case.lengths}, {types}"
        found.append(Part(name, partial(_check_case, setup, dtype, case)))
    for head_dim in (32,) if setup.is_dry else MIXED_HEAD_DIMS:
        name = f"decodes and prefills mixed, heads of {head_dim}"
        found.append(Part(name, partial(_check_mixed, setup, head_dim, 0)))
    # Blocks of 2 heads, 16 slots and 128 elements, so that every offset is beyond 2^31.
    free = 7 if setup.is_dry else 2**31 // (2 * 16 * 128) + 1
    found.append(Part("offsets beyond 2^31", partial(_check_mixed, setup, 128, free)))
    found.append(Part("a graph's tokens", partial(_check_graphs, setup)))
    return found


def _check_case(setup: Setup, dtype: torch.dtype, case: Case) -> Iterator[Row]:
    """Compare with random keys, and with needles."""
    names = [setup.kernel(case.heads.head_dim, case.kv_dtype)]
    if case.queries == 1 and names == ["triton"]:
        names.append("triton-naive")
    candidates = backends_as_candidates(names, case, setup.device, dtype)
    errors = {(name, needles): 0.0 for name in names for needles in (False, True)}
    for needles, seed in product((False, True), range(SEEDS)):
        inputs = make_inputs(case, setup.device, dtype, seed, needles)
        tokens, exact = exact_rows(_as_stored(inputs), most=64)
        for name, attend in candidates(inputs).items():
            # The result most likely gets this memory: a row that is not written is NaN.
            poison = torch.full_like(inputs.q, torch.nan)
            del poison
            error = largest_error(attend()[tokens], exact)
            errors[name, needles] = max(error, errors[name, needles])
    for name in names:
        row = _row(case.name, case.heads, case.num_seqs, case.lengths, dtype, name)
        found = {"error": errors[name, False], "needle_error": errors[name, True]}
        yield replace(row, kv_dtype=case.kv_dtype, **found).checked()


def _as_stored(inputs: Inputs) -> Inputs:
    """Contiguous keys and values once more, from the elements in the pool."""
    tables = inputs.batch.block_tables.long()
    # [seqs, blocks, kv_heads, slots, head_dim], then [seqs, kv_heads, length, head_dim]
    keys, values = (
        pool[tables].transpose(1, 2).flatten(2, 3) for pool in (inputs.k_cache, inputs.v_cache)
    )
    return replace(inputs, keys=keys, values=values)


def _check_mixed(setup: Setup, head_dim: int, free_blocks: int) -> Iterator[Row]:
    """Compare a batch of decodes and prefills, in a pool that is NaN elsewhere."""
    sizes, heads = TINY_MIXED if setup.is_dry else MIXED, Heads(f"4/2 x {head_dim}", 4, 2, head_dim)
    here = paged_setup(sizes, heads=4, head_dim=head_dim, block_size=16, dtype=setup.dtype)
    exact = dense_attention(here)
    there = here.to(setup.device).after(free_blocks)
    pools = there.k_cache, there.v_cache
    what = "mixed, far offsets" if free_blocks else "mixed"
    longest = f"up to {there.batch.longest:,}"
    for name in ("triton", "triton-naive"):
        backend = choose_backend(name, setup.device, head_dim)
        out = backend.paged_attention(there.q, *pools, there.batch, there.scale)
        row = _row(what, heads, len(sizes), longest, setup.dtype, name)
        yield replace(row, error=largest_error(out.cpu(), exact)).checked()


def _check_graphs(setup: Setup) -> Iterator[Row]:
    """Compare the tokens of a small model in float32, with and without graphs."""
    heads = TINY if setup.is_dry else GRAPH_HEADS
    config = replace(
        decode_step.TINY,
        num_layers=1 if setup.is_dry else 4,
        num_heads=heads.heads,
        num_kv_heads=heads.kv_heads,
        head_dim=heads.head_dim,
        vocab_size=512,
    )
    num_seqs, length = (2, 17) if setup.is_dry else (12, 300)
    # In float32 it raises if the tokens differ.
    for _ in decode_step.measure(
        config, ["triton"], num_seqs, length, setup.device, F32, graphs=(False, True)
    ):
        pass
    yield _row("tokens with graphs", heads, num_seqs, str(length), F32, "triton")


def _row(
    what: str, heads: Heads, num_seqs: int, lengths: str, dtype: torch.dtype, backend: str
) -> Row:
    name = str(dtype).removeprefix("torch.")
    return Row(what, heads.name, num_seqs, lengths, name, "auto", backend, MOST_ERROR[name], 0.0)
