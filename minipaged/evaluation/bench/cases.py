"""Input for kernel benchmarks: random keys and values, in a pool and contiguous.

The baseline is PyTorch's attention (SDPA) over the same contiguous keys; the ratio is the cost of
paging.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minipaged.attention.batch import Batch
from minipaged.attention.kv_cache import KV_DTYPES
from minipaged.attention.quantized_cache import LARGEST, KVPool, QuantizedPool, quantize

BLOCK_SIZE = 16
SDPA_KERNELS = {
    "FlashAttention": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class Heads:
    """The attention heads of a model."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Case:
    """A batch of sequences of one length, with the same number of new tokens each."""

    heads: Heads
    num_seqs: int
    length: int  # of each sequence, new tokens included
    queries: int = 1
    kv_dtype: str = "auto"
    short: int | None = None  # if given, the length of all sequences but the first (decode only)

    @property
    def name(self) -> str:
        return "decode" if self.queries == 1 else "prefill"

    @property
    def lengths(self) -> str:
        """A description: tokens of the sequences, and how many of them are new."""
        if self.short is not None:
            return f"{self.length:,} and {self.short:,}"
        new = f"{self.queries:,} of " if 1 < self.queries < self.length else ""
        return f"{new}{self.length:,}"


@dataclass(frozen=True)
class Inputs:
    """The same keys and values twice: contiguous, and scattered over a pool."""

    q: Tensor  # [tokens, heads, head_dim]
    keys: Tensor  # [seqs, kv_heads, length, head_dim]
    values: Tensor
    k_cache: KVPool
    v_cache: KVPool
    batch: Batch
    scale: float


def make_inputs(
    case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0, needles: bool = False
) -> Inputs:
    """Random numbers, and the blocks of all sequences in one random order.

    Args:
        needles: of the keys of each sequence, one outweighs all others for each head of its last
            query (`_hide_needles`).
    """
    generator = torch.Generator(device).manual_seed(seed)
    heads, num_seqs, length, queries = case.heads, case.num_seqs, case.length, case.queries
    assert length % BLOCK_SIZE == 0, f"{length} tokens do not fill whole blocks of {BLOCK_SIZE}"

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    num_blocks = num_seqs * length // BLOCK_SIZE
    order = torch.randperm(num_blocks, generator=generator, device=device)
    keys = random(num_seqs, heads.kv_heads, length, heads.head_dim)
    values = random(num_seqs, heads.kv_heads, length, heads.head_dim)
    q = random(num_seqs * queries, heads.heads, heads.head_dim)
    kv_dtype = KV_DTYPES.get(case.kv_dtype, dtype)
    seq_lens = np.array([length] + [case.short or length] * (num_seqs - 1))
    if needles:
        _hide_needles(keys, q[queries - 1 :: queries], seq_lens.tolist(), seed)
    context_lens = torch.from_numpy(seq_lens - queries).to(device)  # [seqs]
    rows = torch.arange(num_seqs * queries, device=device)
    positions = context_lens[rows // queries] + rows % queries  # [tokens]
    tables = order.view(num_seqs, -1).int()  # [seqs, max_blocks]
    blocks = tables[rows // queries, positions // BLOCK_SIZE].long()  # [tokens]
    return Inputs(
        q=q,
        keys=keys,
        values=values,
        k_cache=_scatter(keys, order, kv_dtype),
        v_cache=_scatter(values, order, kv_dtype),
        batch=Batch(
            token_ids=torch.zeros_like(rows),
            positions=positions,
            slot_mapping=blocks * BLOCK_SIZE + positions % BLOCK_SIZE,
            cu_seqlens_q=torch.arange(num_seqs + 1, device=device, dtype=torch.int32) * queries,
            context_lens=context_lens.int(),
            block_tables=tables,
            logit_rows=rows[queries - 1 :: queries],
            query_lens=np.full(num_seqs, queries),
            seq_lens=seq_lens,
        ),
        scale=heads.head_dim**-0.5,
    )


def _hide_needles(keys: Tensor, q: Tensor, lengths: list[int], seed: int) -> None:
    """For each query and head, one key that gets nearly all of its weight.

    A kernel that skips that key returns something else altogether. The needles of all heads are
    spread over the whole sequence; another seed moves them.

    Args:
        keys: [seqs, kv_heads, length, head_dim], changed in place.
        q: [seqs, heads, head_dim], of the last token of each sequence.
    """
    seqs, heads, head_dim = q.shape
    device, group_size = q.device, heads // keys.shape[1]
    in_each = torch.tensor(lengths, device=device)[:, None]  # [seqs, 1]
    numbers = torch.arange(seqs * heads, device=device).view(seqs, heads) + seed * seqs * heads
    places = (
        numbers.double() * 0.6180339887498949 % 1 * in_each
    ).long()  # [seqs, heads], evenly spread
    # The score is ln(length) + 6: the weight is e^6 times that of all other keys together.
    scores = (in_each.log() + 6) * head_dim**0.5  # [seqs, 1], before they are scaled
    needles = q * (scores[:, :, None] / q.float().norm(dim=-1, keepdim=True) ** 2)
    rows = torch.arange(seqs, device=device)[:, None]  # [seqs, 1]
    kv_heads = torch.arange(heads, device=device) // group_size  # [heads]
    keys[rows, kv_heads, places] = needles.to(keys.dtype)


def _scatter(keys: Tensor, order: Tensor, kv_dtype: torch.dtype) -> KVPool:
    """Make a pool with these keys: block i of all sequences, concatenated, is in `order[i]`."""
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


def contiguous_attention(
    inputs: Inputs, case: Case, by_name: bool | None = None
) -> dict[str, Callable[[], Tensor]]:
    """SDPA over contiguous keys, called in all possible ways: [tokens, heads, head_dim].

    PyTorch chooses among several kernels. `by_name` also calls those that have a name and support
    this case; None: on a GPU.
    """
    num_seqs, queries = case.num_seqs, case.queries
    q = inputs.q.view(num_seqs, queries, case.heads.heads, case.heads.head_dim).transpose(1, 2)
    attend = partial(F.scaled_dot_product_attention, scale=inputs.scale)
    kernels = SDPA_KERNELS if (q.is_cuda if by_name is None else by_name) else {}
    if queries == case.length:
        ask = partial(attend, q, inputs.keys, inputs.values, is_causal=True, enable_gqa=True)
        return _by_name("SDPA", lambda: ask().transpose(1, 2).flatten(0, 1), kernels)
    if queries > 1:  # a chunk after a context
        positions = torch.arange(case.length, device=q.device)
        visible = positions <= positions[-queries:, None]  # [queries, length]
        ask = partial(attend, q, inputs.keys, inputs.values, visible, enable_gqa=True)
        return {"SDPA": lambda: ask().transpose(1, 2).flatten(0, 1)}
    if case.short is not None:  # padded to the longest, as before paging
        lengths = inputs.batch.context_lens[:, None] + 1  # [seqs, 1]
        visible = torch.arange(case.length, device=q.device) < lengths  # [seqs, length]
        visible = visible[:, None, None]  # [seqs, 1, 1, length]
        ask = partial(attend, q, inputs.keys, inputs.values, visible, enable_gqa=True)
        return {"SDPA, padded": lambda: ask()[:, :, 0]}
    # Query heads that share a KV head can be passed as several queries of one head.
    grouped = inputs.q.unflatten(1, (case.heads.kv_heads, -1))  # [seqs, kv_heads, group, head_dim]
    by_group = partial(attend, grouped, inputs.keys, inputs.values)
    ask = partial(attend, q, inputs.keys, inputs.values, enable_gqa=True)
    baselines = _by_name("SDPA, grouped", lambda: by_group().flatten(1, 2), kernels)
    return baselines | {"SDPA, enable_gqa": lambda: ask()[:, :, 0]}


def _by_name(
    name: str, ask: Callable[[], Tensor], kernels: dict[str, SDPBackend]
) -> dict[str, Callable[[], Tensor]]:
    """PyTorch's choice, and each of these kernels that supports the case."""

    def ask_for(kernel: SDPBackend) -> Tensor:
        with sdpa_kernel(kernel):
            return ask()

    named: dict[str, Callable[[], Tensor]] = {}
    for title, kernel in kernels.items():
        with suppress(RuntimeError), catch_warnings():  # it warns, for each kernel, why not
            simplefilter("ignore")
            ask_for(kernel)
            named[f"{name}, {title}"] = partial(ask_for, kernel)
    return {**named, name: ask}


def exact_rows(inputs: Inputs, most: int = 16) -> tuple[list[int], Tensor]:
    """Evenly spaced tokens, the first and the last among them, and their attention in float64.

    Returns:
        Token indices, and [their number, heads, head_dim].
    """
    num_tokens, heads, _ = inputs.q.shape
    kv_heads = inputs.keys.shape[1]
    count = min(most, num_tokens)
    tokens = [i * (num_tokens - 1) // max(1, count - 1) for i in range(count)]
    rows: list[Tensor] = []
    for token in tokens:
        seq = next(i for i, span in enumerate(inputs.batch.spans) if token < span.stop)
        span = inputs.batch.spans[seq]
        visible = span.context_len + token - span.start + 1
        keys, values = (each[seq, :, :visible].double() for each in (inputs.keys, inputs.values))
        q = inputs.q[token].double().view(kv_heads, heads // kv_heads, -1)
        weights = (inputs.scale * q @ keys.transpose(1, 2)).softmax(dim=-1)
        rows.append((weights @ values).flatten(0, 1))
    return tokens, torch.stack(rows)


def largest_error(found: Tensor, exact: Tensor) -> float:
    """The largest relative error of a head's result, |found - exact| / |exact|; infinite for NaN.

    Averages over L random values are of the order of 1 / sqrt(L). An absolute tolerance would
    therefore accept a kernel that skips hundreds of keys. Skipping e of L keys is a relative error
    of about sqrt(e / L): 4 % for a tile of 64 among 32,768.
    """
    error = (found.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    return error.nan_to_num(nan=torch.inf).max().item()


def has_room(case: Case, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the case fits in the device's memory: contiguous, in the pool, and temporaries."""
    if device.type != "cuda":
        return True
    heads = case.heads
    numbers = 2 * prod((case.num_seqs, case.length, heads.kv_heads, heads.head_dim))
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return 2.6 * numbers * dtype.itemsize < 0.9 * free
