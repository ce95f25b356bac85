"""Schedulers and attention with deliberate faults, which random engines must show."""

from dataclasses import replace

from minipaged.attention.reference import reference_paged_attention
from minipaged.scheduler.fcfs import FCFSScheduler


class ForgetsTheSwapIn(FCFSScheduler):
    """Swapped groups come back, and their blocks hold something else."""

    def schedule(self):
        return replace(super().schedule(), swap_in=())


class ForgetsTheCopies(FCFSScheduler):
    """Copy-on-write without the copy."""

    def schedule(self):
        return replace(super().schedule(), copies=())


class NeverFrees(FCFSScheduler):
    """Finished sequences keep their blocks."""

    def finish(self, group, seq):
        memory, self.memory = self.memory, _HasNoTables
        try:
            super().finish(group, seq)
        finally:
            self.memory = memory


class _HasNoTables:
    tables = ()


class EndsTooEarly(FCFSScheduler):
    """Ends a group that lacks blocks, although others could be preempted."""

    def _make_room(self, group, younger, draft):
        if not self.memory.can_append(group):
            self._end(group, draft)
            return False
        return True


def halves_the_last_row(q, k_cache, v_cache, batch, scale):
    """In a batch of several sequences, the last query gets half of its result."""
    out = reference_paged_attention(q, k_cache, v_cache, batch, scale)
    if len(batch.spans) > 1:
        out[-1] /= 2
    return out
