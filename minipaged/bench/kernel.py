"""The attention kernels against what bounds them, and against attention without blocks.

    decode    must read the keys and values once: the floor is their bytes over the bandwidth of a
              large copy, measured in the same rounds. The rival is PyTorch's attention (SDPA) over
              the same keys side by side: what paging costs. The paper's kernel lost 20 to 26 %
              (section 7.1, Figure 18a).
    prefill   must multiply: the rival is SDPA over keys side by side.

What is timed is checked first: paged attention must give what SDPA gives.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minipaged.attention import AttentionBackend, choose_backend
from minipaged.batch import Batch, Span
from minipaged.bench.timing import Work, copy_work, median_seconds
from minipaged.kv_cache import KV_DTYPES
from minipaged.quantized import LARGEST, KVPool, QuantizedPool, quantize

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Heads:
    """The attention of a model."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int


LLAMA_3_8B = Heads("Llama 3 8B, 32/8 x 128", 32, 8, 128)
OPT_13B = Heads("OPT 13B, 40/40 x 128", 40, 40, 128)
SMALL = Heads("small, 6/2 x 64", 6, 2, 64)


@dataclass(frozen=True)
class Case:
    """So many sequences of this length, with so many new tokens each."""

    heads: Heads
    num_seqs: int
    length: int  # of each sequence, new tokens included
    queries: int = 1
    kv_dtype: str = "auto"

    @property
    def name(self) -> str:
        return "decode" if self.queries == 1 else "prefill"


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
]
CPU_CASES = [
    Case(SMALL, 8, 512),
    Case(SMALL, 1, 2048),
    Case(SMALL, 8, 512, kv_dtype="int8"),
    Case(SMALL, 1, 512, queries=512),
]


@dataclass(frozen=True)
class Row:
    """One kernel in one case."""

    what: str
    heads: str
    num_seqs: int
    length: int
    kv_dtype: str
    backend: str
    seconds: float
    percent_of_floor: float | None  # what bytes over bandwidth would take, over what it took
    times_rival: float | None  # over the time of the rival, below 1 is faster


def measure(
    cases: list[Case], backends: list[str], device: torch.device, dtype: torch.dtype
) -> Iterator[Row]:
    """All backends in all cases; cases that the memory has no room for are left out."""
    for case in cases:
        if has_room(case, device, dtype):
            yield from _measure_attention(case, backends, device, dtype)


# ---- attention -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """The same keys and values twice: side by side, and scattered over a pool."""

    q: Tensor  # [tokens, heads, head_dim]
    keys: Tensor  # [seqs, kv_heads, length, head_dim]
    values: Tensor
    k_cache: KVPool
    v_cache: KVPool
    batch: Batch
    scale: float


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random numbers, and block tables in which no two blocks of a sequence are neighbours."""
    generator = torch.Generator(device).manual_seed(seed)
    heads, num_seqs, length, queries = case.heads, case.num_seqs, case.length, case.queries
    assert length % BLOCK_SIZE == 0, f"{length} tokens are not whole blocks of {BLOCK_SIZE}"

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    num_blocks = num_seqs * length // BLOCK_SIZE
    order = torch.randperm(num_blocks, generator=generator, device=device)
    keys = random(num_seqs, heads.kv_heads, length, heads.head_dim)
    values = random(num_seqs, heads.kv_heads, length, heads.head_dim)
    kv_dtype = KV_DTYPES.get(case.kv_dtype, dtype)
    context_len = length - queries
    rows = torch.arange(num_seqs * queries, device=device)
    positions = context_len + rows % queries  # [tokens]
    tables = order.view(num_seqs, -1).int()  # [seqs, max_blocks]
    blocks = tables[rows // queries, positions // BLOCK_SIZE].long()  # [tokens]
    return Inputs(
        q=random(num_seqs * queries, heads.heads, heads.head_dim),
        keys=keys,
        values=values,
        k_cache=_scatter(keys, order, kv_dtype),
        v_cache=_scatter(values, order, kv_dtype),
        batch=Batch(
            token_ids=torch.zeros_like(rows),
            positions=positions,
            slots=blocks * BLOCK_SIZE + positions % BLOCK_SIZE,
            query_starts=torch.arange(num_seqs + 1, device=device, dtype=torch.int32) * queries,
            context_lens=torch.full((num_seqs,), context_len, device=device, dtype=torch.int32),
            block_tables=tables,
            logit_rows=rows[queries - 1 :: queries],
            spans=tuple(Span(i * queries, queries, context_len) for i in range(num_seqs)),
        ),
        scale=heads.head_dim**-0.5,
    )


def _scatter(keys: Tensor, order: Tensor, kv_dtype: torch.dtype) -> KVPool:
    """A pool with these keys in it: block i of all sequences, end to end, is in `order[i]`."""
    seqs, kv_heads, length, head_dim = keys.shape
    in_blocks = keys.view(seqs, kv_heads, length // BLOCK_SIZE, BLOCK_SIZE, head_dim)
    # [blocks, kv_heads, slots, head_dim]
    in_blocks = in_blocks.transpose(1, 2).flatten(0, 1).contiguous()
    if kv_dtype not in LARGEST:
        pool = torch.empty_like(in_blocks, dtype=kv_dtype)
        pool[order] = in_blocks.to(kv_dtype)
        return pool
    numbers, scales = quantize(in_blocks, kv_dtype)
    pool = QuantizedPool(torch.empty_like(numbers), torch.empty_like(scales))
    pool.numbers.view(torch.int8)[order] = numbers.view(torch.int8)
    pool.scales[order] = scales
    return pool


def contiguous_attention(inputs: Inputs, case: Case) -> dict[str, Callable[[], Tensor]]:
    """SDPA over keys side by side, in the ways that it can be asked: [tokens, heads, head_dim]."""
    num_seqs, queries = case.num_seqs, case.queries
    q = inputs.q.view(num_seqs, queries, case.heads.heads, case.heads.head_dim).transpose(1, 2)
    attend = partial(F.scaled_dot_product_attention, scale=inputs.scale)
    if queries == case.length:
        ask = partial(attend, q, inputs.keys, inputs.values, is_causal=True, enable_gqa=True)
        return _also_with_flash("SDPA", lambda: ask().transpose(1, 2).flatten(0, 1), q)
    if queries > 1:  # a chunk behind a context
        positions = torch.arange(case.length, device=q.device)
        visible = positions <= positions[-queries:, None]  # [queries, length]
        ask = partial(attend, q, inputs.keys, inputs.values, visible, enable_gqa=True)
        return {"SDPA": lambda: ask().transpose(1, 2).flatten(0, 1)}
    # Heads that share a key head may stand where several queries of one head would.
    grouped = inputs.q.unflatten(1, (case.heads.kv_heads, -1))  # [seqs, kv_heads, group, head_dim]
    by_group = partial(attend, grouped, inputs.keys, inputs.values)
    ask = partial(attend, q, inputs.keys, inputs.values, enable_gqa=True)
    rivals = _also_with_flash("SDPA, grouped", lambda: by_group().flatten(1, 2), q)
    return rivals | {"SDPA, enable_gqa": lambda: ask()[:, :, 0]}


def _also_with_flash(
    name: str, ask: Callable[[], Tensor], q: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """PyTorch chooses among several kernels; on a GPU FlashAttention is asked for by name, too."""
    if q.device.type != "cuda" or q.dtype is torch.float32:
        return {name: ask}

    def with_flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return ask()

    return {f"{name}, FlashAttention": with_flash, name: ask}


def _measure_attention(
    case: Case, backends: list[str], device: torch.device, dtype: torch.dtype
) -> Iterator[Row]:
    inputs = make_inputs(case, device, dtype)
    rivals = contiguous_attention(inputs, case)
    expected = next(iter(rivals.values()))().float()
    works: dict[str, Work] = dict(rivals)
    for name in backends:
        backend = choose_backend(name, device, case.heads.head_dim, case.kv_dtype)
        works[name] = attend = partial(_attend, backend, inputs)
        tolerance = 0.1 if case.kv_dtype in ("int8", "fp8") else 0.02
        torch.testing.assert_close(attend().float(), expected, rtol=tolerance, atol=tolerance)
    copy, copy_bytes = copy_work(device)
    seconds = median_seconds({"copy": copy, **works}, device)
    bandwidth = copy_bytes / seconds["copy"]
    rival = min(seconds[name] for name in rivals)
    for name in works:
        floor = _bytes_read(inputs) / bandwidth if case.queries == 1 else None
        if name in rivals and case.kv_dtype != "auto":
            floor = None  # it reads other bytes
        yield Row(
            case.name,
            case.heads.name,
            case.num_seqs,
            case.length if case.queries in (1, case.length) else case.queries,
            case.kv_dtype,
            name,
            seconds[name],
            None if floor is None else 100 * floor / seconds[name],
            seconds[name] / rival,
        )


def _attend(backend: AttentionBackend, inputs: Inputs) -> Tensor:
    return backend.paged_attention(
        inputs.q, inputs.k_cache, inputs.v_cache, inputs.batch, inputs.scale
    )


def _bytes_read(inputs: Inputs) -> int:
    """Of all keys and values, scales included."""
    total = 0
    for pool in (inputs.k_cache, inputs.v_cache):
        tensors = (pool.numbers, pool.scales) if isinstance(pool, QuantizedPool) else (pool,)
        total += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    return total


def has_room(case: Case, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device's memory holds the case: side by side, in the pool, and in between."""
    if device.type != "cuda":
        return True
    heads = case.heads
    numbers = 2 * prod((case.num_seqs, case.length, heads.kv_heads, heads.head_dim))
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return 2.6 * numbers * dtype.itemsize < 0.9 * free


def as_table(rows: list[Row]) -> Table:
    """The rows for a person to read."""
    table = Table(box=None, padding=(0, 2))
    for title in ("", "heads", "batch", "length", "kv", "by"):
        table.add_column(title)
    for title in ("time", "of bandwidth", "x best SDPA"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row.what,
            row.heads,
            str(row.num_seqs),
            f"{row.length:,}",
            row.kv_dtype,
            row.backend,
            f"{1e6 * row.seconds:,.1f} us",
            "" if row.percent_of_floor is None else f"{row.percent_of_floor:.1f} %",
            "" if row.times_rival is None else f"{row.times_rival:.2f}",
        )
    return table
