"""Tensors from the parameters of all rows of a step."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from minipaged.sampling.params import SamplingParams
from minipaged.sampling.rows import SamplingRow
from minipaged.utils.device import to_device
from minipaged.utils.shapes import Float, Int


def asking(rows: Sequence[SamplingRow], wants: Callable[[SamplingParams], bool]) -> list[int]:
    """Return the indices of the rows whose parameters satisfy `wants`."""
    return [i for i, row in enumerate(rows) if wants(row.params)]


def column(
    values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "rows 1"]:
    """Return a column with one number per row."""
    return to_device(values, device, dtype)[:, None]


def places(
    token_ids: Sequence[Iterable[int]], device: torch.device
) -> tuple[Int[Tensor, " places"], Int[Tensor, " places"]]:
    """Return row and column indices of each row's tokens in the logits."""
    pairs = [(row, token_id) for row, ids in enumerate(token_ids) for token_id in ids]
    both = to_device(pairs, device, torch.long).view(-1, 2)
    return both[:, 0], both[:, 1]
