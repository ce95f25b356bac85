"""The attention kernels, compared with their lower bounds and with attention without blocks.

    decode    must read the keys and values once: the floor is their bytes over the bandwidth of a
              large copy, measured in the same rounds. The baseline is PyTorch's attention (SDPA)
              over the same keys, contiguous: the cost of paging. The paper's kernel lost 20 to
              26 % (section 7.1, Figure 18a).
    prefill   must multiply: the baseline is SDPA over contiguous keys.

Results are checked before they are timed, against float64 and in memory that was full of NaN.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import ceil

import torch
from rich.table import Table
from torch import Tensor

from minipaged.attention.backend import AttentionBackend, choose_backend
from minipaged.attention.quantized_cache import QuantizedPool
from minipaged.errors import MinipagedError
from minipaged.evaluation.bench.cases import (
    Case,
    Heads,
    Inputs,
    contiguous_attention,
    exact_rows,
    has_room,
    largest_error,
    make_inputs,
)
from minipaged.evaluation.bench.timing import copy_work, in_turn, median_seconds

LLAMA_3_8B = Heads("Llama 3 8B, 32/8 x 128", 32, 8, 128)
OPT_13B = Heads("OPT 13B, 40/40 x 128", 40, 40, 128)
SMALL = Heads("small, 6/2 x 64", 6, 2, 64)


GPU_CASES = [
    *(
        Case(heads, num_seqs, length)
        for heads in (LLAMA_3_8B, OPT_13B)
        for num_seqs, length in [(64, 1024), (64, 8192), (128, 4096), (256, 1024), (256, 8192)]
    ),
    *(Case(LLAMA_3_8B, num_seqs, 32768) for num_seqs in (1, 4)),
    *(Case(OPT_13B, num_seqs, 32768) for num_seqs in (1, 4)),
    *(Case(LLAMA_3_8B, 64, 4096, kv_dtype=kv) for kv in ("auto", "int8", "fp8")),
    *(Case(heads, 1, 4096, queries=4096) for heads in (LLAMA_3_8B, OPT_13B)),
    Case(LLAMA_3_8B, 1, 4096, queries=512),
    Case(LLAMA_3_8B, 64, 32768, short=1024),
]
CPU_CASES = [
    Case(SMALL, 8, 512),
    Case(SMALL, 1, 2048),
    Case(SMALL, 8, 512, kv_dtype="int8"),
    Case(SMALL, 8, 1024, short=128),
    Case(SMALL, 1, 512, queries=512),
]

BYTES_IN_TURN = 2**31  # of keys and values on a GPU: many times its cache
MOST_POOLS = 20

# The largest relative error of a head's result, by the type that has the fewest digits.
MOST_ERROR = {"fp8": 0.06, "int8": 0.03, "bfloat16": 0.01, "float16": 0.004, "float32": 1e-4}


class WrongResult(MinipagedError):
    """An attention kernel computed something else, so its time means nothing."""


Attend = Callable[[], Tensor]
Candidates = Callable[[Inputs], dict[str, Attend]]
"""The ways to compute attention over these inputs, by name."""


@dataclass(frozen=True)
class Row:
    """One kernel in one case."""

    what: str
    heads: str
    num_seqs: int
    lengths: str
    kv_dtype: str
    backend: str
    seconds: float
    percent_of_floor: float | None  # the floor (bytes over bandwidth) over the measured time
    times_baseline: float | None  # time over the baseline's; below 1 is faster
    teraflops: float | None = None  # 10^12 operations per second, of a prefill
    error: float | None = None  # the largest relative error of a head's result
    num_bytes: int | None = None  # of the keys and values that a decode must read


def measure(
    cases: list[Case],
    backends: list[str],
    device: torch.device,
    dtype: torch.dtype,
    skipped: list[Case] | None = None,
) -> Iterator[Row]:
    """Measure all backends in all cases. Raises WrongResult.

    Args:
        skipped: gets the cases that do not fit in memory. SDPA's temporaries cannot be predicted,
            so a case may also run out of memory; its rows are lost, but not those of the others.
    """
    for case in cases:
        rows: list[Row] | None = None
        with suppress(torch.OutOfMemoryError):
            if has_room(case, device, dtype):
                candidates = backends_as_candidates(backends, case, device, dtype)
                rows = list(measure_case(case, candidates, device, dtype))
        if rows is not None:
            yield from rows
        elif skipped is not None:
            skipped.append(case)


def backends_as_candidates(
    names: list[str], case: Case, device: torch.device, dtype: torch.dtype
) -> Candidates:
    """The candidates of `measure_case` that are backends with these names."""
    chosen = [choose_backend(name, device, case.heads.head_dim, case.kv_dtype) for name in names]

    def prepare(backend: AttentionBackend, inputs: Inputs) -> Attend:
        pools = inputs.k_cache, inputs.v_cache
        # Once per step: it is not timed.
        batch = backend.prepare(inputs.batch, inputs.k_cache, inputs.q.shape[1], dtype)
        return lambda: backend.paged_attention(inputs.q, *pools, batch, inputs.scale)

    return lambda inputs: {backend.name: prepare(backend, inputs) for backend in chosen}


def measure_case(
    case: Case,
    candidates: Candidates,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int = 11,
    num_pools: int | None = None,
    by_name: bool | None = None,
) -> Iterator[Row]:
    """Measure the candidates of one case, and SDPA. Raises WrongResult.

    Args:
        num_pools: pools that are read in turn, so that keys are not in the GPU's cache when they
            are read again. None: as many as that takes, or one on a CPU.
        by_name: see `contiguous_attention`.
    """
    attends: dict[str, list[Attend]] = {}
    errors: dict[str, float] = {}
    inputs = make_inputs(case, device, dtype)
    if num_pools is None:
        enough = ceil(BYTES_IN_TURN / _bytes_read(inputs)) if device.type == "cuda" else 1
        num_pools = min(enough, MOST_POOLS)
    for seed in range(num_pools):
        inputs = make_inputs(case, device, dtype, seed) if seed > 0 else inputs
        baselines, measured = contiguous_attention(inputs, case, by_name), candidates(inputs)
        for name, attend in {**baselines, **measured}.items():
            attends.setdefault(name, []).append(attend)
        if seed == 0:
            errors = check(case, inputs, measured, dtype)
    works = {name: in_turn(calls, num_pools) for name, calls in attends.items()}
    copy, copy_bytes = copy_work(device)
    seconds = median_seconds({"copy": copy, **works}, device, rounds)
    floor = _bytes_read(inputs) / copy_bytes * seconds.pop("copy")
    each = {name: total / num_pools for name, total in seconds.items()}
    fastest = min(each[name] for name in attends if name not in errors)
    reads_the_same = case.kv_dtype == "auto" and case.short is None  # SDPA, as the kernels
    for name in attends:
        has_floor = case.queries == 1 and (name in errors or reads_the_same)
        yield Row(
            case.name,
            case.heads.name,
            case.num_seqs,
            case.lengths,
            case.kv_dtype,
            name,
            each[name],
            100 * floor / each[name] if has_floor else None,
            each[name] / fastest,
            None if case.queries == 1 else 1e-12 * _operations(inputs) / each[name],
            errors.get(name),
            _bytes_read(inputs) if has_floor else None,
        )


def check(
    case: Case, inputs: Inputs, attends: Mapping[str, Attend], dtype: torch.dtype
) -> dict[str, float]:
    """The error of each, compared with float64. Raises WrongResult."""
    tokens, exact = exact_rows(inputs)
    few_digits = case.kv_dtype if case.kv_dtype != "auto" else str(dtype).removeprefix("torch.")
    errors: dict[str, float] = {}
    for name, attend in attends.items():
        # The result most likely gets this memory: a row that is not written is NaN.
        poison = torch.full_like(inputs.q, torch.nan)
        del poison
        errors[name] = largest_error(attend()[tokens], exact)
        if errors[name] > MOST_ERROR[few_digits]:
            raise WrongResult(
                f"{name}, {case.name} of {case.num_seqs} x {case.lengths} tokens, {few_digits}: "
                f"a result differs by {errors[name]:.2%} from float64, and "
                f"{MOST_ERROR[few_digits]:.2%} is expected at most."
            )
    return errors


def _bytes_read(inputs: Inputs) -> int:
    """Bytes of the attended keys and values, scales included."""
    bytes_per_cell = 0
    for pool in (inputs.k_cache, inputs.v_cache):
        tensors = (pool.numbers, pool.scales) if isinstance(pool, QuantizedPool) else (pool,)
        bytes_per_cell += sum(tensor[0, 0, 0].numel() * tensor.itemsize for tensor in tensors)
    kv_heads = inputs.k_cache.shape[1]
    return bytes_per_cell * kv_heads * sum(span.seq_len for span in inputs.batch.spans)


def _operations(inputs: Inputs) -> int:
    """Operations of two products: an addition and a multiplication for each element."""
    _, heads, head_dim = inputs.q.shape
    keys_seen = 0
    for span in inputs.batch.spans:
        keys_seen += span.query_len * (span.context_len + span.seq_len + 1) // 2
    return 4 * heads * head_dim * keys_seen


def as_table(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(box=None, padding=(0, 2))
    for title in ("", "heads", "batch", "tokens", "kv", "by"):
        table.add_column(title)
    for title in ("time", "of bandwidth", "TFLOP/s", "x best SDPA"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row.what,
            row.heads,
            str(row.num_seqs),
            row.lengths,
            row.kv_dtype,
            row.backend,
            f"{1e6 * row.seconds:,.1f} us",
            "" if row.percent_of_floor is None else f"{row.percent_of_floor:.1f} %",
            "" if row.teraflops is None else f"{row.teraflops:,.2f}",
            "" if row.times_baseline is None else f"{row.times_baseline:.2f}",
        )
    return table
