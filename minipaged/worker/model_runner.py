"""The device side of a step: carries out its block operations, then runs the model."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minipaged.attention.backend import AttentionBackend
from minipaged.attention.batch import BatchBuilder
from minipaged.attention.device_batch import fill_pending
from minipaged.attention.kv_cache import Cache
from minipaged.models.base import Model
from minipaged.scheduler.output import StepInput
from minipaged.utils.shapes import Float, Int
from minipaged.worker.cuda_graphs import DecodeGraphs


class ModelRunner:
    """One model and its cache. Its only input for a step is the `StepInput` (and see `run`).

    Args:
        model: its layers call `backend`.
        backend: prepares, once per step, the data that the attention of all layers shares.
        kv_cache: the tensors that block numbers refer to.
        batches: builds the tensors of a step.
        graphs: if given, decode steps are replayed from them.
        gather: concatenates the logits of several ranks, on rank 0.
    """

    def __init__(
        self,
        model: Model,
        backend: AttentionBackend,
        kv_cache: Cache,
        batches: BatchBuilder,
        graphs: DecodeGraphs | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.backend = backend
        self.kv_cache = kv_cache
        self.batches = batches
        self.graphs = graphs
        self._gather = gather
        self._dtype = model.dtype

    def record_graphs(self, shows_progress: bool = True) -> None:
        """Record the decode steps that are replayed later, if any: on all ranks together."""
        if self.graphs is not None:
            with _as_current(self.kv_cache.device):
                self.graphs.record_all(shows_progress)

    @torch.inference_mode()
    def run(
        self, step: StepInput, sampled: Int[Tensor, " rows_before"] | None = None
    ) -> Float[Tensor, "rows vocab"]:
        """Carry out the step's block operations, then compute the logits that it requests.

        `sampled` are the tokens of the step before, still on the device, if this step has pending
        tokens (see `SequenceInput`).

        The order matters: a block that is swapped out may be reused (and cleared) in the same step,
        and a block that was just swapped in may be the source of a copy-on-write.
        """
        with _as_current(self.kv_cache.device):
            if step.swap_out:
                self.kv_cache.swap_out(step.swap_out)
            if step.swap_in:
                self.kv_cache.swap_in(step.swap_in)
            if step.copies:
                self.kv_cache.copy(step.copies)
            if not step.sequences:  # a step that only ended a group has no tokens
                return torch.empty(0, self.model.config.vocab_size)
            host_batch = self.batches.lay_out(step.sequences)
            if host_batch.begun_blocks:
                self.kv_cache.clear(host_batch.begun_blocks)
            if self.graphs is not None and self.graphs.can_run(host_batch):
                logits = self.graphs.run(host_batch, sampled)
            else:
                batch = self.batches.send(host_batch)
                if sampled is not None:
                    batch = replace(batch, token_ids=fill_pending(batch.token_ids, sampled))
                k_cache, _ = self.kv_cache.layers[0]
                num_heads = self.model.config.num_heads
                batch = self.backend.prepare(batch, k_cache, num_heads, self._dtype)
                hidden = self.model(batch.token_ids, batch.positions, self.kv_cache, batch)
                logits = self.model.logits(hidden[batch.logit_rows])  # [rows, vocab]
            if self._gather is None:
                return logits
            return self._gather(logits)[:, : self.model.config.vocab_size]  # without the padding


def _as_current(device: torch.device) -> AbstractContextManager[Any]:
    """Make the model's GPU current: Triton launches there, not on its arguments' GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
