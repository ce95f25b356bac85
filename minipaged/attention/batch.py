"""Builds a step's tensors from plain numbers: all index arithmetic of a step is in this file.

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
from typing import NamedTuple

import torch
from torch import Tensor

from minipaged.scheduler.output import SequenceInput
from minipaged.utils.device import to_device
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
    spans: tuple[Span, ...]  # cu_seqlens_q and context_lens once more, as Python numbers

    @property
    def num_seqs(self) -> int:
        return len(self.spans)

    @cached_property
    def longest(self) -> int:
        """Number of keys of the longest sequence."""
        return max((span.seq_len for span in self.spans), default=0)

    @cached_property
    def has_decodes(self) -> bool:
        """Whether some sequence has one query."""
        return any(span.query_len == 1 for span in self.spans)

    @cached_property
    def has_prefills(self) -> bool:
        """Whether some sequence has several queries."""
        return any(span.query_len > 1 for span in self.spans)


def begun_blocks(sequences: Many[SequenceInput], block_size: int) -> list[int]:
    """The blocks whose first slot this step writes and whose last slot it does not write.

    Only such a block can contain data of an earlier owner after the end of its sequence.
    """
    begun: list[int] = []
    for _, new_token_ids, context_len, block_table, _ in sequences:
        seq_len = context_len + len(new_token_ids)
        filled = seq_len % block_size  # slots of the last block; 0 if it is full
        if filled and seq_len - filled >= context_len:
            begun.append(block_table[seq_len // block_size])
    return begun


def fill_pending(
    token_ids: Int[Tensor, " tokens"], sampled: Int[Tensor, " rows"]
) -> Int[Tensor, " tokens"]:
    """Replace each pending token, -1 - r, by `sampled[r]`, without waiting for its value."""
    rows = (-1 - token_ids).clamp(min=0)  # any row for a token that is not pending
    return torch.where(token_ids < 0, sampled[rows], token_ids)


class BatchBuilder:
    """Builds one `Batch` per step. Block tables are rows of one persistent tensor.

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

    def build(self, sequences: Many[SequenceInput]) -> Batch:
        """Build the batch of these sequences, in this order; at most `max_num_seqs` of them."""
        spans: list[Span] = []
        token_ids: list[int] = []
        positions: list[int] = []
        slot_mapping: list[int] = []
        cu_seqlens_q, context_lens = [0], list[int]()
        logit_rows: list[int] = []
        size, longest = self._block_size, 0
        for _, new_token_ids, context_len, block_table, num_logits in sequences:
            span = Span(len(token_ids), len(new_token_ids), context_len)
            spans.append(span)
            stop, seq_len = span.start + span.query_len, span.seq_len
            token_ids += new_token_ids
            positions += range(context_len, seq_len)
            if span.query_len == 1:  # as in every decode
                block = block_table[context_len // size]
                slot_mapping.append(block * size + context_len % size)
            else:
                slot_mapping += self._slots(block_table, context_len, seq_len)
            cu_seqlens_q.append(stop)
            context_lens.append(context_len)
            logit_rows += range(stop - num_logits, stop)
            longest = max(longest, seq_len)
        block_tables = self._block_tables(sequences, longest)
        device = self._device
        return Batch(
            token_ids=to_device(token_ids, device, torch.long),
            positions=to_device(positions, device, torch.long),
            slot_mapping=to_device(slot_mapping, device, torch.long),
            cu_seqlens_q=to_device(cu_seqlens_q, device, torch.int32),
            context_lens=to_device(context_lens, device, torch.int32),
            block_tables=to_device(block_tables, device),
            logit_rows=to_device(logit_rows, device, torch.long),
            spans=tuple(spans),
        )

    def _slots(self, block_table: list[int], start: int, stop: int) -> list[int]:
        """Return the slots of positions [start, stop), block by block."""
        size = self._block_size
        slots: list[int] = []
        for position in range(start - start % size, stop, size):  # where a block begins
            first = block_table[position // size] * size
            slots += range(first + max(0, start - position), first + min(size, stop - position))
        return slots

    def _block_tables(
        self, sequences: Many[SequenceInput], longest: int
    ) -> Int[Tensor, "seqs max_blocks"]:
        self._release_rows_except({sequence.seq_id for sequence in sequences})
        rows: list[int] = []
        for sequence in sequences:
            if sequence.seq_id not in self._rows:
                self._rows[sequence.seq_id] = self._free_rows.pop()
            row = self._rows[sequence.seq_id]
            if self._written[row] != sequence.block_table:
                self._write(row, sequence.block_table)
            rows.append(row)
        columns = -(-longest // self._block_size)
        return self._tables[to_device(rows, "cpu", torch.long), :columns]  # [seqs, max_blocks]

    def _release_rows_except(self, seq_ids: set[int]) -> None:
        # A sequence that skips a step loses its row and rewrites one later, so rows never run out.
        for seq_id in self._rows.keys() - seq_ids:
            self._free_rows.append(self._rows.pop(seq_id))

    def _write(self, row: int, blocks: list[int]) -> None:
        """Write a block table: only its new end if it has grown, all of it if it has changed."""
        written = self._written[row]
        same = len(written) if blocks[: len(written)] == written else 0
        self._tables[row, same : len(blocks)] = torch.tensor(blocks[same:], dtype=torch.int32)
        self._written[row] = blocks.copy()
