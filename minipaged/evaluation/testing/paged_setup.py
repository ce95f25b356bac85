"""Random keys and values scattered over a pool, to test all code that reads the pool.

The pool is as adversarial as the contract allows: blocks in shuffled order, NaN in every free
block, large finite values in the empty slots of owned blocks, and invalid table entries after a
sequence's end.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from minipaged.attention.batch import Batch, BatchBuilder
from minipaged.memory import BlockTable
from minipaged.scheduler.output import SequenceInput

NO_BLOCKS = (2**31 - 1, -(2**31), -1, 10**6)  # possible values of padded table entries


@dataclass(frozen=True)
class PagedSetup:
    """A batch over a filled pool, and the same keys and values unpaged, one tensor per sequence."""

    q: Tensor  # [tokens, heads, head_dim]
    k_cache: Tensor  # [num_blocks, kv_heads, block_size, head_dim]
    v_cache: Tensor  # [num_blocks, kv_heads, block_size, head_dim]
    batch: Batch
    scale: float
    keys: list[Tensor]  # of each sequence: [seq_len, kv_heads, head_dim]
    values: list[Tensor]  # of each sequence: [seq_len, kv_heads, head_dim]
    tables: list[BlockTable]

    def new(self, tensors: list[Tensor]) -> Tensor:
        """The keys (or values) of this step's tokens: [tokens, kv_heads, head_dim]."""
        spans = self.batch.spans
        return torch.cat([t[s.context_len :] for t, s in zip(tensors, spans, strict=True)])

    def to(self, device: torch.device) -> "PagedSetup":
        """The same with queries, pool and batch on this device."""
        fields = {
            field.name: getattr(self.batch, field.name) for field in dataclasses.fields(Batch)
        }
        moved = {name: f.to(device) for name, f in fields.items() if isinstance(f, Tensor)}
        return dataclasses.replace(
            self,
            q=self.q.to(device),
            k_cache=self.k_cache.to(device),
            v_cache=self.v_cache.to(device),
            batch=dataclasses.replace(self.batch, **moved),
        )

    def after(self, num_blocks: int) -> "PagedSetup":
        """The same in a larger pool, after so many blocks that are free."""
        free = (num_blocks, *self.k_cache.shape[1:])
        k_cache, v_cache = (
            torch.cat([torch.full(free, torch.nan, dtype=pool.dtype, device=pool.device), pool])
            for pool in (self.k_cache, self.v_cache)
        )
        slots = num_blocks * self.k_cache.shape[2]
        batch = dataclasses.replace(
            self.batch,
            slot_mapping=self.batch.slot_mapping + slots,
            block_tables=(self.batch.block_tables.long() + num_blocks).int(),
        )
        return dataclasses.replace(self, k_cache=k_cache, v_cache=v_cache, batch=batch)


def paged_setup(
    sizes: list[tuple[int, int]],  # (query_len, context_len) of each sequence
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    shared_blocks: int = 0,
    forks: dict[int, tuple[int, int]] | None = None,
    magnitude: float = 1.0,
    seed: int = 0,
) -> PagedSetup:
    """The first `shared_blocks` blocks are shared by all sequences, as far as all fill them.

    `forks` maps a sequence to an earlier one and to the number of blocks that it has of that one,
    as far as both fill them.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    lengths = [query_len + context_len for query_len, context_len in sizes]
    shared_blocks = min([shared_blocks, *(length // block_size for length in lengths)])
    prefix = shared_blocks * block_size
    tables = _scattered_tables(lengths, block_size, shared_blocks, generator)
    num_blocks = 3 + sum(len(table) for table in tables)
    for child, (parent, count) in (forks or {}).items():
        count = min(count, lengths[child] // block_size, lengths[parent] // block_size)
        tables[child].blocks[:count] = tables[parent].blocks[:count]

    keys = [random(length, kv_heads, head_dim) for length in lengths]
    values = [random(length, kv_heads, head_dim) for length in lengths]
    pool = (num_blocks, kv_heads, block_size, head_dim)
    k_cache, v_cache = (
        torch.full(pool, torch.nan, dtype=dtype),
        torch.full(pool, torch.nan, dtype=dtype),
    )
    for table in tables:
        for block in table.blocks:
            k_cache[block] = 30 * random(*pool[1:])
            v_cache[block] = 30 * random(*pool[1:])
    for i, table in enumerate(tables):
        keys[i][:prefix], values[i][:prefix] = keys[0][:prefix], values[0][:prefix]
        parent, count = (forks or {}).get(i, (i, 0))
        same = block_size * min(count, lengths[i] // block_size, lengths[parent] // block_size)
        keys[i][:same], values[i][:same] = keys[parent][:same], values[parent][:same]
        for position in range(lengths[i]):
            block, offset = divmod(table.slot(position), block_size)
            k_cache[block, :, offset] = keys[i][position]
            v_cache[block, :, offset] = values[i][position]
    return PagedSetup(
        q=magnitude * random(sum(query_len for query_len, _ in sizes), heads, head_dim),
        k_cache=k_cache,
        v_cache=v_cache,
        batch=_batch(sizes, tables, block_size),
        scale=head_dim**-0.5,
        keys=keys,
        values=values,
        tables=tables,
    )


def _scattered_tables(
    lengths: list[int], block_size: int, shared_blocks: int, generator: torch.Generator
) -> list[BlockTable]:
    counts = [-(-length // block_size) for length in lengths]
    # The first and the last block are free: a stray 0 or -1 must not pass for a block.
    ids: list[int] = (1 + torch.randperm(1 + sum(counts), generator=generator)).tolist()
    shared = [ids.pop() for _ in range(shared_blocks)]
    return [
        BlockTable(block_size, shared + [ids.pop() for _ in range(count - shared_blocks)], length)
        for count, length in zip(counts, lengths, strict=True)
    ]


def _batch(sizes: list[tuple[int, int]], tables: list[BlockTable], block_size: int) -> Batch:
    queries = [
        SequenceInput(i, [0] * query_len, context_len, table.blocks)
        for i, ((query_len, context_len), table) in enumerate(zip(sizes, tables, strict=True))
    ]
    longest = max(len(table) for table in tables)
    batch = BatchBuilder(len(tables), longest, block_size).build(queries)
    padded = torch.tensor(NO_BLOCKS, dtype=torch.int32).repeat(len(tables), longest + 1)
    padded = padded[:, : longest + 2]  # two columns more than any sequence needs
    for i, table in enumerate(tables):
        padded[i, : len(table)] = batch.block_tables[i, : len(table)]
    return dataclasses.replace(batch, block_tables=padded)


def dense_attention(setup: PagedSetup) -> Tensor:
    """The expected result in float64, from the unpaged keys, without pool, mask or batch."""
    out: list[Tensor] = []
    for span, keys, values in zip(setup.batch.spans, setup.keys, setup.values, strict=True):
        keys, values = keys.double(), values.double()  # [seq_len, kv_heads, head_dim]
        group_size = setup.q.shape[1] // keys.shape[1]
        for i in range(span.query_len):
            end = span.context_len + i + 1  # positions up to the query's own are visible
            for head, query in enumerate(setup.q[span.start + i].double()):
                scores = setup.scale * keys[:end, head // group_size] @ query  # [end]
                out.append(scores.softmax(dim=0) @ values[:end, head // group_size])
    return torch.stack(out).view(setup.q.shape)  # [tokens, heads, head_dim]
