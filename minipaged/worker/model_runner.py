"""The device side: carries out a step's block operations, then runs the model."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from minipaged.attention.batch import Batch
from minipaged.attention.kv_cache import Cache
from minipaged.models.base import Model
from minipaged.scheduler.output import SchedulerOutput
from minipaged.utils.shapes import Float
from minipaged.worker.cuda_graphs import DecodeGraphs


class ModelRunner:
    """One model and its cache; where there are graphs, decode steps are replayed from them."""

    def __init__(self, model: Model, kv_cache: Cache, graphs: DecodeGraphs | None = None) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.graphs = graphs

    @torch.inference_mode()
    def run(self, plan: SchedulerOutput, batch: Batch) -> Float[Tensor, "rows vocab"]:
        """Move the blocks that the plan moves, then compute the logits of `batch.logit_rows`.

        The order matters: a block that is swapped out may be handed to somebody else in the same
        step, and a block that was just swapped in may be the source of a copy-on-write.
        """
        with _as_current(self.kv_cache.device):
            return self._run(plan, batch)

    def _run(self, plan: SchedulerOutput, batch: Batch) -> Float[Tensor, "rows vocab"]:
        self.kv_cache.swap_out(plan.swap_out)
        self.kv_cache.swap_in(plan.swap_in)
        self.kv_cache.copy(plan.copies)
        if not batch.spans:  # a step that only ended a group has no tokens
            return torch.empty(0, self.model.config.vocab_size)
        if self.graphs is not None and self.graphs.can_run(batch):
            return self.graphs.run(batch)
        hidden = self.model(batch.token_ids, batch.positions, self.kv_cache, batch)
        return self.model.logits(hidden[batch.logit_rows])  # [rows, vocab]


def _as_current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU, whichever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
