"""Sends batches to a device with memory of its own, a GPU: one copy per step.

Small copies take as long as large ones, so all numbers of a step travel in one buffer. Block tables
stay on the device, and only changed entries are sent:

    host      table of all block tables ---> which entries have changed, and their new values
                                                     | in the same buffer as token_ids and others
    device    table of all block tables <--- written in one operation
                 | the rows of this step's sequences, in its order
              block_tables
"""

from collections.abc import Sequence as Many

import numpy as np
import torch
from torch import Tensor

from minipaged.attention.batch import Batch, BatchBuilder, HostBatch
from minipaged.utils.device import to_device_together
from minipaged.utils.shapes import Int


class DeviceBatchBuilder(BatchBuilder):
    """Builds one `Batch` per step on a device other than the CPU."""

    def __init__(
        self,
        max_num_seqs: int,
        max_blocks_per_seq: int,
        block_size: int,
        device: torch.device | str,
    ) -> None:
        super().__init__(max_num_seqs, max_blocks_per_seq, block_size)
        self.max_num_seqs = max_num_seqs
        self.max_seq_len = max_blocks_per_seq * block_size
        self.device = torch.device(device)
        self._device_tables = torch.zeros(self._tables.shape, dtype=torch.int32, device=device)
        self._changed: list[int] = []  # entries that were not sent, as if the table were flat

    def send(self, host: HostBatch) -> Batch:
        """Make the tensors of a batch on the device."""
        tensors = to_device_together(self.arrays(host), self.device)
        batch = self.batch_of(tensors, host.query_lens, host.seq_lens)
        self.note_sent()
        return batch

    def arrays(self, host: HostBatch) -> list[np.ndarray]:
        """All that is sent for a batch: first 64 bits per number, then 32."""
        changed, new_blocks = self._changes()
        tokens = [host.token_ids, host.positions, host.slot_mapping, host.logit_rows]
        lengths = [host.cu_seqlens_q, host.context_lens]
        return [*tokens, host.table_rows, changed, *lengths, new_blocks]

    def batch_of(
        self,
        tensors: Many[Tensor],
        query_lens: Int[np.ndarray, " seqs"],
        seq_lens: Int[np.ndarray, " seqs"],
    ) -> Batch:
        """Write the changed entries of block tables, and return the batch.

        Args:
            tensors: those of `arrays`, on the device.
            query_lens: of each sequence.
            seq_lens: of each sequence, or an upper bound.
        """
        token_ids, positions, slot_mapping, logit_rows, rows, changed, *others = tensors
        cu_seqlens_q, context_lens, new_blocks = others
        if len(changed):
            self._write_on_device(changed, new_blocks)
        columns = -(-int(seq_lens.max()) // self.block_size)
        return Batch(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slot_mapping,
            cu_seqlens_q=cu_seqlens_q,
            context_lens=context_lens,
            block_tables=self._device_tables[:, :columns].index_select(0, rows),
            logit_rows=logit_rows,
            query_lens=query_lens,
            seq_lens=seq_lens,
        )

    @property
    def num_changed(self) -> int:
        """The number of entries of block tables that are still to be sent."""
        return len(self._changed)

    def send_changes(self) -> None:
        """Send changed entries of block tables in a copy of their own."""
        self._write_on_device(*to_device_together(self._changes(), self.device))
        self.note_sent()

    def note_sent(self) -> None:
        """Note that all changed entries have been sent."""
        self._changed.clear()

    def _changes(self) -> tuple[np.ndarray, np.ndarray]:
        changed = np.array(self._changed, np.int64)
        return changed, self._tables.ravel()[changed]

    def _write_on_device(self, changed: Tensor, new_blocks: Tensor) -> None:
        self._device_tables.view(-1).index_copy_(0, changed, new_blocks)

    def _write(self, row: int, blocks: list[int]) -> None:
        # Noted first: if the step is interrupted, an entry may be sent twice, but is never missed.
        first = row * self._tables.shape[1]
        self._changed += range(first + self._num_same(row, blocks), first + len(blocks))
        super()._write(row, blocks)


def fill_pending(
    token_ids: Int[Tensor, " tokens"], sampled: Int[Tensor, " rows"]
) -> Int[Tensor, " tokens"]:
    """Replace each pending token, -1 - r, by `sampled[r]`, without waiting for its value."""
    rows = (-1 - token_ids).clamp(min=0)  # any row for a token that is not pending
    return torch.where(token_ids < 0, sampled[rows], token_ids)


def choose_builder(
    max_num_seqs: int, max_blocks_per_seq: int, block_size: int, device: torch.device
) -> BatchBuilder:
    """The builder for a device."""
    sizes = (max_num_seqs, max_blocks_per_seq, block_size)
    return BatchBuilder(*sizes) if device.type == "cpu" else DeviceBatchBuilder(*sizes, device)
