"""Builds a step's tensors from plain numbers: all index arithmetic of a step is in this file.

It is done on the host, for all tokens at once, with NumPy: for the few numbers of a decode step,
NumPy is faster than PyTorch and much faster than a loop.

The tokens that a step computes, its query tokens, are laid out flat, one sequence after another.
An example with blocks of 4 slots and two sequences: the first decodes one token after 5 others,
the second starts a prompt of 3:

    token_ids     [ t5 | p0 p1 p2 ]
    positions     [  5 |  0  1  2 ]      position of each token in its sequence
    slot_mapping  [ 29 |  8  9 10 ]      where its keys and values go: block * block_size + offset
    cu_seqlens_q  [  0    1       4 ]    sequence s owns tokens cu_seqlens_q[s] to cu_seqlens_q[s+1]
    context_lens  [  5    0 ]            tokens of the sequence that are in the cache already
    block_tables  [[3 7], [2 .]]         only the first ceil(length / block_size) entries of a row
                                         are valid; never use the others as block numbers
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minipaged.scheduler.output import SequenceInput
from minipaged.utils.shapes import Int


class Span(NamedTuple):
    """One sequence of a batch, as plain numbers, for code that loops on the CPU."""

    start: int  # its query tokens are rows [start, start + query_len) of the batch
    query_len: int
    context_len: int

    @property
    def stop(self) -> int:
        return self.start + self.query_len

    @property
    def seq_len(self) -> int:
        """Number of keys visible to its last query: the context and the queries themselves."""
        return self.context_len + self.query_len


@dataclass(frozen=True)
class Batch:
    """The input of a model and its attention for one step.

    A backend whose layers share more derives its own class: see `AttentionBackend.prepare`.
    """

    token_ids: Int[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]
    slot_mapping: Int[Tensor, " tokens"]
    cu_seqlens_q: Int[Tensor, " seqs_and_one"]
    context_lens: Int[Tensor, " seqs"]
    block_tables: Int[Tensor, "seqs max_blocks"]
    logit_rows: Int[Tensor, " rows"]  # the tokens whose logits are wanted
    query_lens: Int[np.ndarray, " seqs"]  # these two are on the host
    seq_lens: Int[np.ndarray, " seqs"]  # context and queries

    @property
    def num_seqs(self) -> int:
        return len(self.query_lens)

    @property
    def longest(self) -> int:
        """Number of keys of the longest sequence."""
        return int(self.seq_lens.max(initial=0))

    @property
    def has_decodes(self) -> bool:
        """Whether some sequence has one query."""
        return bool((self.query_lens == 1).any())

    @property
    def has_prefills(self) -> bool:
        """Whether some sequence has several queries."""
        return bool((self.query_lens > 1).any())

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The sequences as Python numbers."""
        starts = (self.query_lens.cumsum() - self.query_lens).tolist()
        context_lens = (self.seq_lens - self.query_lens).tolist()
        return tuple(map(Span, starts, self.query_lens.tolist(), context_lens))


class HostBatch(NamedTuple):
    """All numbers of a batch in arrays on the host, from which its tensors are made."""

    token_ids: Int[np.ndarray, " tokens"]
    positions: Int[np.ndarray, " tokens"]
    slot_mapping: Int[np.ndarray, " tokens"]
    logit_rows: Int[np.ndarray, " rows"]
    cu_seqlens_q: Int[np.ndarray, " seqs_and_one"]
    context_lens: Int[np.ndarray, " seqs"]
    table_rows: Int[np.ndarray, " seqs"]  # each sequence's row in the table of all block tables
    query_lens: Int[np.ndarray, " seqs"]
    seq_lens: Int[np.ndarray, " seqs"]
    # Blocks whose first slot this step writes and whose last slot it does not write. Only such a
    # block can contain data of an earlier owner after the end of its sequence.
    begun_blocks: list[int]


class BatchBuilder:
    """Builds one `Batch` per step.

    Block tables are rows of one persistent array. A decoding sequence's table changes once in
    `block_size` steps, so rows are kept from step to step and only changed entries are written.
    """

    device = torch.device("cpu")  # `DeviceBatchBuilder` is for others

    def __init__(self, max_num_seqs: int, max_blocks_per_seq: int, block_size: int) -> None:
        self.block_size = block_size
        # No sequence has row 0: it is for the padding of CUDA graphs.
        self._tables = np.zeros((1 + max_num_seqs, max_blocks_per_seq), np.int32)
        self._written: list[list[int]] = [
            [] for _ in range(1 + max_num_seqs)
        ]  # what each row holds
        self._num_blocks = np.zeros(len(self._tables), np.int64)  # how many entries of each row
        self._rows: dict[int, int] = {}  # by sequence id, in the order of the last batch

    def build(self, sequences: Many[SequenceInput]) -> Batch:
        """Build the batch of these sequences, in this order; at most `max_num_seqs` of them."""
        return self.send(self.lay_out(sequences))

    def lay_out(self, sequences: Many[SequenceInput]) -> HostBatch:
        """Compute all numbers of a step. Each line does so for all sequences or tokens at once."""
        seq_ids, new_token_ids, contexts, block_tables, num_logits = zip(*sequences, strict=True)
        size = self.block_size
        query_lens = np.fromiter(map(len, new_token_ids), np.int64)  # [seqs]
        context_lens = np.fromiter(contexts, np.int64)  # [seqs]
        seq_lens = context_lens + query_lens  # [seqs]
        cu_seqlens_q = np.zeros(len(seq_ids) + 1, np.int64)
        starts, stops = cu_seqlens_q[:-1], cu_seqlens_q[1:]  # [seqs]
        query_lens.cumsum(out=stops)
        rows = self._write_tables(seq_ids, block_tables)  # [seqs]
        has_room = self._num_blocks[rows] * size >= seq_lens  # [seqs]
        assert all(has_room.tolist()), "a block table is too short for the tokens of its sequence"

        tokens = np.arange(stops[-1])  # [tokens]; `repeat` gives each the value of its sequence
        positions = tokens + (context_lens - starts).repeat(query_lens)  # [tokens]
        offsets = positions % size  # [tokens]
        blocks = self._tables[rows.repeat(query_lens), positions // size]  # [tokens]
        is_begun = (offsets == 0) & (positions + size > seq_lens.repeat(query_lens))  # [tokens]
        has_logits = tokens >= (stops - num_logits).repeat(query_lens)  # [tokens]
        return HostBatch(
            token_ids=np.fromiter(chain.from_iterable(new_token_ids), np.int64, len(tokens)),
            positions=positions,
            slot_mapping=blocks.astype(np.int64) * size + offsets,
            logit_rows=has_logits.nonzero()[0],
            cu_seqlens_q=cu_seqlens_q.astype(np.int32),
            context_lens=context_lens.astype(np.int32),
            table_rows=rows,
            query_lens=query_lens,
            seq_lens=seq_lens,
            begun_blocks=blocks[is_begun].tolist(),
        )

    def send(self, host: HostBatch) -> Batch:
        """Make the tensors of a batch."""
        columns = -(-int(host.seq_lens.max()) // self.block_size)
        return Batch(
            token_ids=torch.from_numpy(host.token_ids),
            positions=torch.from_numpy(host.positions),
            slot_mapping=torch.from_numpy(host.slot_mapping),
            cu_seqlens_q=torch.from_numpy(host.cu_seqlens_q),
            context_lens=torch.from_numpy(host.context_lens),
            block_tables=torch.from_numpy(self._tables[host.table_rows, :columns]),
            logit_rows=torch.from_numpy(host.logit_rows),
            query_lens=host.query_lens,
            seq_lens=host.seq_lens,
        )

    def _write_tables(
        self, seq_ids: tuple[int, ...], block_tables: tuple[list[int], ...]
    ) -> Int[np.ndarray, " seqs"]:
        """Write what has changed in the block tables, and return the row of each sequence."""
        if tuple(self._rows) != seq_ids:
            assert len({*seq_ids}) == len(seq_ids), "a sequence is in the step twice"
            assert len(seq_ids) < len(self._tables), "the step has more than max_num_seqs sequences"
            # A sequence that skips a step loses its row and gets one later, so rows never run out.
            kept = {self._rows.get(seq_id) for seq_id in seq_ids}
            free = (row for row in range(1, len(self._tables)) if row not in kept)
            self._rows = {seq_id: self._rows.get(seq_id) or next(free) for seq_id in seq_ids}
        for row, blocks in zip(self._rows.values(), block_tables, strict=True):
            if self._written[row] != blocks:  # takes 1 ns per block
                self._write(row, blocks)
        return np.fromiter(self._rows.values(), np.int64)

    def _write(self, row: int, blocks: list[int]) -> None:
        """Write a block table: only its new end if it has grown, all of it if it has changed."""
        same = self._num_same(row, blocks)
        self._tables[row, same : len(blocks)] = blocks[same:]
        self._num_blocks[row] = len(blocks)
        self._written[row] = blocks.copy()

    def _num_same(self, row: int, blocks: list[int]) -> int:
        """The number of leading entries of a row that are already those of this block table."""
        written = self._written[row]
        return len(written) if blocks[: len(written)] == written else 0
