"""The device side: carries out a step's block operations, then runs the model."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from minipaged.available_memory import GIB, physical_memory
from minipaged.batch import Batch
from minipaged.errors import InvalidOption
from minipaged.graphs import DecodeGraphs
from minipaged.kv_cache import Cache
from minipaged.models import Model
from minipaged.plan import ScheduledBatch
from minipaged.shapes import Float

SWAP_BYTES = 2 * GIB  # a swap pool takes no more host memory than this unless asked to


class ModelRunner:
    """One model and its cache; where there are graphs, decode steps are replayed from them."""

    def __init__(self, model: Model, kv_cache: Cache, graphs: DecodeGraphs | None = None) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.graphs = graphs

    @torch.inference_mode()
    def run(self, plan: ScheduledBatch, batch: Batch) -> Float[Tensor, "rows vocab"]:
        """Move the blocks that the plan moves, then compute the logits of `batch.logit_rows`.

        The order matters: a block that is swapped out may be handed to somebody else in the same
        step, and a block that was just swapped in may be the source of a copy-on-write.
        """
        with _as_current(self.kv_cache.device):
            return self._run(plan, batch)

    def _run(self, plan: ScheduledBatch, batch: Batch) -> Float[Tensor, "rows vocab"]:
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


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" is a CUDA GPU if there is one. Raises InvalidOption."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InvalidOption(f"there is no device {name!r} here: choose auto, cpu or cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidOption('device="cuda" needs a CUDA GPU, and none is found: choose "cpu".')
    return device


def blocks_that_fit(block_bytes: int, device: torch.device, gpu_memory_utilization: float) -> int:
    """How many blocks of keys and values the memory has room for, weights already loaded.

    On a GPU: what `gpu_memory_utilization` of its memory leaves beside all that is in use. On a
    CPU: an eighth of the machine's memory, 2 GiB at the most, for the swap pool takes as much
    again, and others need some too. Raises InvalidOption if not even one block fits.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = int(total * gpu_memory_utilization) - (total - free)
    else:
        budget = min(physical_memory() // 8, SWAP_BYTES)
    if budget < block_bytes:
        raise InvalidOption(
            f"a block of keys and values takes {block_bytes} bytes, and {max(budget, 0)} are left "
            "for them: raise gpu_memory_utilization, lower block_size, or take a smaller model."
        )
    return budget // block_bytes


def refuse_more_than_memory(
    num_blocks: int, num_swap_blocks: int, block_bytes: int, device: torch.device
) -> None:
    """Raise InvalidOption for pools that the machine could never hold.

    Without this, it would run out of memory in the middle of a run, when the blocks are first used.
    """
    in_host = num_swap_blocks if device.type == "cuda" else num_blocks + num_swap_blocks
    has = physical_memory()
    if in_host * block_bytes > has:
        raise InvalidOption(
            f"num_blocks is {num_blocks} and num_swap_blocks {num_swap_blocks}: at {block_bytes} "
            f"bytes a block, {in_host} of them need {in_host * block_bytes / GIB:.1f} GiB, and the "
            f"machine has {has / GIB:.1f} GiB. Give at most {has // block_bytes} in all."
        )
