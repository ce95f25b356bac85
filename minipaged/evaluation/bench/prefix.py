"""Decode on a CPU with shared prefixes, read once per owner or once per block (`shared_prefix`).

Both are compared with sequences of the same lengths that share nothing. Of attention, several
layers are used in turn, so that keys are read from memory. A step is the whole forward pass of a
model with random weights, from block tables to logits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice

import torch
from rich.table import Table
from torch import Tensor

from minipaged.attention.backend import BACKENDS, AttentionBackend
from minipaged.attention.batch import Batch, BatchBuilder
from minipaged.attention.kv_cache import KVCache
from minipaged.attention.quantized_cache import KVPool
from minipaged.attention.reference import reference_paged_attention
from minipaged.attention.shared_prefix import SharedDecodes, prepare_decodes
from minipaged.attention.torch_decode import Decodes
from minipaged.attention.torch_paged import prepare_torch
from minipaged.config import EngineConfig
from minipaged.evaluation.bench.decode_step import SMALL
from minipaged.evaluation.bench.timing import Work, median_seconds
from minipaged.models.linear import pack_weights
from minipaged.models.llama import Llama, LlamaConfig
from minipaged.models.rope import rope_frequencies
from minipaged.scheduler.output import SequenceInput, StepInput
from minipaged.worker.model_runner import ModelRunner

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 9, 3, 64, 16
BYTES_IN_TURN = 64 * 1024**2
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """Several prefixes, each shared by several sequences, and what each sequence has of its own."""

    num_prefixes: int
    num_owners: int  # of each prefix
    prefix_len: int  # tokens, in full blocks
    own_len: int

    @property
    def num_seqs(self) -> int:
        return self.num_prefixes * self.num_owners

    def sequences(self, shared: bool) -> tuple[tuple[SequenceInput, ...], int]:
        """Decoding sequences, and the number of blocks that they need."""
        new_block = count()
        num_shared, num_own = self.prefix_len // BLOCK_SIZE, -(-self.own_len // BLOCK_SIZE)
        sequences: list[SequenceInput] = []
        prefix: list[int] = []
        for seq_id in range(self.num_seqs):
            if not shared or seq_id % self.num_owners == 0:
                prefix = list(islice(new_block, num_shared))
            blocks = prefix + list(islice(new_block, num_own))
            context_len = self.prefix_len + self.own_len - 1
            sequences.append(SequenceInput(seq_id, [seq_id], context_len, blocks))
        return tuple(sequences), next(new_block)


CASES = [
    Case(*numbers)
    for numbers in (
        *((1, 2, 512, 64), (1, 4, 512, 64), (1, 16, 512, 64), (1, 32, 1024, 128)),
        *((1, 16, 64, 64), (1, 16, 128, 64), (1, 16, 16, 1024), (1, 32, 16, 256)),
        *((8, 2, 128, 64), (8, 4, 128, 64), (8, 4, 512, 64)),
    )
]
STEPS = [Case(1, 4, 512, 64), Case(1, 16, 512, 64)]


@dataclass(frozen=True)
class Row:
    """One case: attention in a layer, or a step."""

    part: str
    case: Case
    unshared_seconds: float
    per_owner_seconds: float
    per_block_seconds: float
    chosen: str


@torch.inference_mode()
def measure_attention(dtype: torch.dtype, cases: list[Case] = CASES) -> Iterator[Row]:
    """Measure attention in a layer; every result is checked against the reference."""
    for case in cases:
        torch.manual_seed(0)
        q = torch.randn(case.num_seqs, HEADS, HEAD_DIM).to(dtype)
        shared, blocks_if_shared = _batch(case, True)
        unshared, blocks_if_unshared = _batch(case, False)
        pool = _pool(blocks_if_shared, dtype)
        prepared = {
            "per owner": Decodes.prepare(shared, pool[0, 0], HEADS, dtype),
            "per block": prepare_decodes(shared, pool[0, 0], HEADS, dtype, 0),
        }
        works: dict[str, Work] = {}
        for name, decodes in prepared.items():
            _check(decodes, q, pool[0], shared)
            works[name] = _all_layers(decodes, q, pool)
        pool_if_unshared = _pool(blocks_if_unshared, dtype)
        without = Decodes.prepare(unshared, pool_if_unshared[0, 0], HEADS, dtype)
        works["unshared"] = _all_layers(without, q, pool_if_unshared)
        seconds = median_seconds(works, CPU, rounds=9)
        chosen = prepare_decodes(shared, pool[0, 0], HEADS, dtype)
        yield Row(
            "attention",
            case,
            seconds["unshared"] / len(pool_if_unshared),
            seconds["per owner"] / len(pool),
            seconds["per block"] / len(pool),
            _name(chosen),
        )


@torch.inference_mode()
def measure_steps(
    dtype: torch.dtype, config: LlamaConfig = SMALL, cases: list[Case] = STEPS
) -> Iterator[Row]:
    """Measure forward passes; logits of the ways to read a prefix are compared."""
    torch.manual_seed(0)
    per_block = BACKENDS["torch"]
    per_owner = replace(per_block, prepare=_prepare_per_owner)
    model = Llama(config, per_block).to(dtype).eval().requires_grad_(False)
    pack_weights(model)
    model.rotary.frequencies = rope_frequencies(config.rope, config.head_dim)
    for case in cases:
        unshared, num_blocks = case.sequences(shared=False)
        shared, _ = case.sequences(shared=True)
        length = case.prefix_len + case.own_len
        engine = EngineConfig(
            num_blocks=num_blocks,
            num_swap_blocks=0,
            max_num_seqs=case.num_seqs,
            max_model_len=length,
            max_num_batched_tokens=length,
            enable_prefix_caching=False,
        )
        cache = KVCache.build(config, engine, dtype, CPU, per_block.copy_blocks)
        for keys_and_values in cache.layers:
            for pool in keys_and_values:
                assert isinstance(pool, Tensor), "the pool of a float type is a tensor"
                pool.normal_()

        works = {
            "unshared": _step(model, per_block, cache, unshared),
            "per owner": _step(model, per_owner, cache, shared),
            "per block": _step(model, per_block, cache, shared),
        }
        tolerance = 0.1 if dtype is torch.bfloat16 else 1e-3
        torch.testing.assert_close(
            works["per owner"](), works["per block"](), rtol=tolerance, atol=tolerance
        )
        seconds = median_seconds(works, CPU, rounds=9)
        batch = BatchBuilder(len(shared), len(shared[0].block_table), BLOCK_SIZE).build(shared)
        chosen = prepare_decodes(batch, cache.layers[0][0], config.num_heads, dtype)
        yield Row(
            "step",
            case,
            seconds["unshared"],
            seconds["per owner"],
            seconds["per block"],
            _name(chosen),
        )


def _step(
    model: Llama, backend: AttentionBackend, cache: KVCache, sequences: tuple[SequenceInput, ...]
) -> Callable[[], Tensor]:
    batches = BatchBuilder(len(sequences), len(sequences[0].block_table), BLOCK_SIZE)
    runner = ModelRunner(model, backend, cache, batches)
    return lambda: runner.run(StepInput(sequences))


def _prepare_per_owner(batch: Batch, k_cache: KVPool, num_heads: int, dtype: torch.dtype) -> Batch:
    prepared = prepare_torch(batch, k_cache, num_heads, dtype)
    return replace(prepared, decodes=Decodes.prepare(batch, k_cache, num_heads, dtype))


def _batch(case: Case, shared: bool) -> tuple[Batch, int]:
    sequences, num_blocks = case.sequences(shared)
    return BatchBuilder(len(sequences), num_blocks, BLOCK_SIZE).build(sequences), num_blocks


def _pool(num_blocks: int, dtype: torch.dtype) -> Tensor:
    block_bytes = KV_HEADS * BLOCK_SIZE * HEAD_DIM * dtype.itemsize
    num_layers = max(1, BYTES_IN_TURN // (2 * num_blocks * block_bytes))
    return torch.randn(num_layers, 2, num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM).to(dtype)


def _check(decodes: Decodes | SharedDecodes | None, q: Tensor, layer: Tensor, batch: Batch) -> None:
    k_cache, v_cache = layer
    expected = reference_paged_attention(q, k_cache, v_cache, batch, HEAD_DIM**-0.5)
    assert decodes is not None, "all sequences decode"
    queries, expected = _rows(q, decodes), _rows(expected, decodes)
    tolerance = 0.03 if q.dtype is torch.bfloat16 else 1e-4
    found = decodes.attend(queries, k_cache, v_cache, HEAD_DIM**-0.5)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def _all_layers(decodes: Decodes | SharedDecodes | None, q: Tensor, pool: Tensor) -> Work:
    assert decodes is not None, "all sequences decode"

    def attend() -> None:
        for k_cache, v_cache in pool:
            decodes.attend(_rows(q, decodes), k_cache, v_cache, HEAD_DIM**-0.5)

    return attend


def _rows(q: Tensor, decodes: Decodes | SharedDecodes) -> Tensor:
    return q if decodes.tokens is None else q.index_select(0, decodes.tokens)


def _name(decodes: Decodes | SharedDecodes | None) -> str:
    return "per block" if isinstance(decodes, SharedDecodes) else "per owner"


def describe(dtype: torch.dtype) -> str:
    """The caption of the table."""
    return (
        f"{dtype}, {HEADS} heads over {KV_HEADS} KV heads of {HEAD_DIM}, blocks of {BLOCK_SIZE}. "
        "Attention: one layer, several in turn. Step: the forward pass of 135 million random "
        "weights. x: how many times as fast as sequences that share nothing. Median of rounds"
    )


def as_table(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(box=None, padding=(0, 2))
    table.add_column("")
    titles = ("prefixes", "owners of each", "prefix", "own", "nothing shared")
    for title in (*titles, "once per owner", "once per block"):
        table.add_column(title, justify="right")
    table.add_column("chosen")
    for row in rows:
        case = row.case
        table.add_row(
            row.part,
            *(f"{n:,}" for n in (case.num_prefixes, case.num_owners)),
            *(f"{n:,}" for n in (case.prefix_len, case.own_len)),
            f"{1e3 * row.unshared_seconds:.2f} ms",
            *(
                f"{1e3 * seconds:.2f} ms, {row.unshared_seconds / seconds:.2f} x"
                for seconds in (row.per_owner_seconds, row.per_block_seconds)
            ),
            row.chosen,
        )
    return table
