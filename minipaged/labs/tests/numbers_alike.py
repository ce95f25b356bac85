"""Compares results within a tolerance, and reports the place where they differ most."""

import pytest
import torch
from torch import Tensor


def closely(yours: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Fails with the worst place, your number there and the expected one.

    Args:
        yours, expected: [queries, heads, head_dim]
        what: which of a batch's sequences these are the results of.
    """
    error = (yours.double() - expected.double()).abs()
    if error.max().item() < tolerance:
        return
    query, head, element = (int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    place = query, head, element
    pytest.fail(
        f"{what}: at query {query}, head {head}, element {element} yours {yours[place]:.4g}, "
        f"expected {expected[place]:.4g}"
    )
