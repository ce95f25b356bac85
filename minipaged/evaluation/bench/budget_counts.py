"""What a step has to do on a CPU, counted and not timed: see `budget`.

bytes       from the model as it is in memory, and from the step's message (`StepInput`)
operations  from the same
operators   where PyTorch dispatches them
wake-ups    by Linux, which counts how often a thread has slept
"""

import os
import re
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minipaged.models.base import Model
from minipaged.models.linear import Linear
from minipaged.scheduler.output import StepInput

TASKS = Path("/proc/self/task")  # a folder for each thread of this process, on Linux


def count_bytes(model: Model, step: StepInput) -> int:
    """Bytes that a step must read: weights as they are kept, keys and values of all its tokens."""
    linears = [each for each in model.modules() if isinstance(each, Linear)]
    weights = sum(each.packed.num_bytes for each in linears if each.packed is not None)
    weights += sum(each.numel() * each.itemsize for each in model.parameters())
    num_tokens = sum(len(each.token_ids) for each in step.sequences)
    if model.head is not None:  # of the embedding, only the rows of these tokens are read
        vocab_size, hidden_size = model.embedding.weight.shape
        weights -= (vocab_size - num_tokens) * hidden_size * model.dtype.itemsize
    num_keys = num_tokens + sum(each.context_len for each in step.sequences)
    return weights + num_keys * model.config.kv_bytes_per_token(model.dtype.itemsize)


def count_operations(model: Model, step: StepInput) -> int:
    """Operations of all matrices and of attention: two for each multiplication with its sum."""
    config = model.config
    products = 0
    for each in model.modules():
        if isinstance(each, Linear) and each is not model.head:
            products += each.in_features * each.out_features
    products *= sum(len(each.token_ids) for each in step.sequences)
    products += model.embedding.weight.numel() * sum(each.num_logits for each in step.sequences)
    for each in step.sequences:
        num_tokens = len(each.token_ids)
        num_keys = num_tokens * each.context_len + num_tokens * (num_tokens + 1) // 2
        # A query is multiplied by each key that it sees, and the weight by the value.
        products += 2 * num_keys * config.num_layers * config.num_heads * config.head_dim
    return 2 * products


class OperatorCount(TorchDispatchMode):
    """Counts the operators that PyTorch dispatches; views apart, because they compute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.num_operators = self.num_views = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # In inference mode, an operator composed of others arrives whole: count those instead.
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if func.is_view or func.name().startswith(("aten::empty", "aten::_unsafe_view")):
            self.num_views += 1
        else:
            self.num_operators += 1
        return func(*args, **kwargs)


@contextmanager
def counted_operators(module: nn.Module) -> Generator[OperatorCount]:
    """Count the operators of the last call of this module within the block."""
    operators = OperatorCount()
    forward = module.forward

    def counted(*args: Any) -> Any:
        operators.num_operators = operators.num_views = 0
        with operators:
            return forward(*args)

    module.forward = counted  # an attribute of this object alone
    yield operators
    del module.forward


def count_sleeps() -> dict[int, int]:
    """How often each thread of this process but this one has slept so far."""
    sleeps: dict[int, int] = {}
    for task in TASKS.iterdir() if TASKS.exists() else ():
        with suppress(OSError):  # a thread may have ended
            status = (task / "status").read_text(encoding="utf-8")
            if found := re.search(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.M):
                sleeps[int(task.name)] = int(found[1])
    sleeps.pop(threading.get_native_id(), None)
    return sleeps


def why_no_wake_ups() -> str | None:
    """Why wake-ups cannot be counted here; None if they can."""
    if not TASKS.exists():
        return "only Linux counts wake-ups"
    if os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        return "without OMP_WAIT_POLICY=PASSIVE, threads spin and do not sleep"
    return None
