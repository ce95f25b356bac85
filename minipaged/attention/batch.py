"""From what the scheduler decided to tensors: all index arithmetic of a step is in this file.

The tokens that a step computes, its query tokens, lie flat, sequence behind sequence. Two of them,
the first decoding one token behind 5 others, the second beginning a prompt of 3, with blocks of 4
slots:

    token_ids     [ t5 | p0 p1 p2 ]
    positions     [  5 |  0  1  2 ]      place of each token in its sequence
    slot_mapping  [ 29 |  8  9 10 ]      where its keys and values go: block * block_size + offset
    cu_seqlens_q  [  0    1       4 ]    sequence s owns tokens cu_seqlens_q[s] to cu_seqlens_q[s+1]
    context_lens  [  5    0 ]            tokens of the sequence that are in the cache already
    block_tables  [[3 7], [2 .]]         only the first ceil(length / block_size) entries of a row
                                         mean anything; never read the others as blocks
"""

from collections.abc import Hashable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from minipaged.memory import BlockTable
from minipaged.utils.device import to_device
from minipaged.utils.shapes import Int


@dataclass(frozen=True)
class Span:
    """One sequence of a batch, in plain numbers, for code that loops on the CPU."""

    start: int  # its query tokens are rows [start, start + query_len) of the batch
    query_len: int
    context_len: int

    @property
    def stop(self) -> int:
        return self.start + self.query_len

    @property
    def seq_len(self) -> int:
        """Keys that its last query sees: the context and the queries themselves."""
        return self.context_len + self.query_len


@dataclass(frozen=True)
class Batch:
    """Everything that a model and its attention need to know of one step."""

    token_ids: Int[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]
    slot_mapping: Int[Tensor, " tokens"]
    cu_seqlens_q: Int[Tensor, " seqs_and_one"]
    context_lens: Int[Tensor, " seqs"]
    block_tables: Int[Tensor, "seqs max_blocks"]
    logit_rows: Int[Tensor, " rows"]  # the tokens whose logits are wanted
    spans: tuple[Span, ...]  # cu_seqlens_q and context_lens once more, as Python numbers

    @property
    def num_seqs(self) -> int:
        return len(self.spans)

    @cached_property
    def longest(self) -> int:
        """Keys of the longest sequence."""
        return max((span.seq_len for span in self.spans), default=0)

    @cached_property
    def notes(self) -> dict[Hashable, Any]:
        """What attention has worked out of all this in one layer, for the others."""
        return {}

    @cached_property
    def has_decodes(self) -> bool:
        """Whether some sequence has one query."""
        return any(span.query_len == 1 for span in self.spans)

    @cached_property
    def has_prefills(self) -> bool:
        """Whether some sequence has several queries."""
        return any(span.query_len > 1 for span in self.spans)


@dataclass(frozen=True)
class Query:
    """One sequence's part in a step: which tokens to compute, where they belong, what to read."""

    seq_id: int
    token_ids: Many[int]  # the tokens to compute, at positions context_len and up
    context_len: int
    table: BlockTable
    num_logits: int = 1  # logits are wanted for the last so many of them


class BatchBuilder:
    """Builds a `Batch` a step. Block tables live in one persistent tensor, a row a sequence.

    A decoding sequence's table changes once in `block_size` steps, so rows are kept from step to
    step and only the entries that changed are written.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_blocks_per_seq: int,
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._block_size = block_size
        self._device = device
        self._tables = torch.zeros(max_num_seqs, max_blocks_per_seq, dtype=torch.int32)
        self._written: list[list[int]] = [[] for _ in range(max_num_seqs)]  # what each row holds
        self._rows: dict[int, int] = {}  # by sequence id
        self._free_rows = list(reversed(range(max_num_seqs)))

    def build(self, queries: Many[Query]) -> Batch:
        """One batch of these queries, in this order; at most `max_num_seqs` of them."""
        spans: list[Span] = []
        token_ids: list[int] = []
        logit_rows: list[int] = []
        for query in queries:
            spans.append(Span(len(token_ids), len(query.token_ids), query.context_len))
            token_ids.extend(query.token_ids)
            logit_rows.extend(range(len(token_ids) - query.num_logits, len(token_ids)))
        starts = torch.tensor([s.start for s in spans] + [len(token_ids)], dtype=torch.int32)
        context_lens = torch.tensor([s.context_len for s in spans], dtype=torch.int32)
        block_tables = self._block_tables(queries, max((s.seq_len for s in spans), default=0))

        owner = torch.repeat_interleave(torch.arange(len(spans)), starts.diff())  # [tokens]
        positions = torch.arange(len(token_ids)) + (context_lens - starts[:-1])[owner]  # [tokens]
        blocks = block_tables[owner, positions // self._block_size]  # [tokens]
        slot_mapping = blocks.long() * self._block_size + positions % self._block_size  # [tokens]
        return Batch(
            token_ids=to_device(token_ids, self._device, torch.long),
            positions=to_device(positions, self._device),
            slot_mapping=to_device(slot_mapping, self._device),
            cu_seqlens_q=to_device(starts, self._device),
            context_lens=to_device(context_lens, self._device),
            block_tables=to_device(block_tables, self._device),
            logit_rows=to_device(logit_rows, self._device, torch.long),
            spans=tuple(spans),
        )

    def _block_tables(self, queries: Many[Query], longest: int) -> Int[Tensor, "seqs max_blocks"]:
        self._release_rows_except({q.seq_id for q in queries})
        rows = [self._updated_row(q.seq_id, q.table.blocks) for q in queries]
        columns = -(-longest // self._block_size)
        return self._tables[torch.tensor(rows, dtype=torch.long), :columns]  # [seqs, max_blocks]

    def _release_rows_except(self, seq_ids: set[int]) -> None:
        # A sequence that sits a step out writes its row anew afterwards; so rows never run out.
        for seq_id in self._rows.keys() - seq_ids:
            self._free_rows.append(self._rows.pop(seq_id))

    def _updated_row(self, seq_id: int, blocks: list[int]) -> int:
        if seq_id not in self._rows:
            self._rows[seq_id] = self._free_rows.pop()
        row = self._rows[seq_id]
        written = self._written[row]
        if written != blocks:
            same = 0
            while same < min(len(written), len(blocks)) and written[same] == blocks[same]:
                same += 1
            self._tables[row, same : len(blocks)] = torch.tensor(blocks[same:], dtype=torch.int32)
            self._written[row] = blocks.copy()
        return row
