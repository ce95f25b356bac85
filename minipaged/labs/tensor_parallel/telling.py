"""Runs the storyteller on a student's ranks, and reports what they generate, store and exchange."""

from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from minipaged.engine.custom_parts import find_in_file
from minipaged.errors import InvalidOption
from minipaged.labs.tensor_parallel.model import Linear, share, storyteller
from minipaged.labs.tensor_parallel.processes import run_ranks

_SECONDS = 120.0


@dataclass(frozen=True)
class RankUse:
    """What one rank used: the number of weight elements it stores, and its collectives by name."""

    num_elements: int
    calls: dict[str, int]


def tell(
    file: Path, prompt: list[int], num_tokens: int, num_ranks: int
) -> tuple[list[int], list[RankUse]]:
    """The tokens that follow the prompt, and what each rank used to generate them.

    Raises:
        InvalidOption: the file does not exist, there are too many tokens, or the ranks cannot
            share the heads equally.
        RanksFailed: a rank fails, or the ranks deadlock.
    """
    if not file.is_file():
        raise InvalidOption(f"there is no {file}: begin with `minipaged lab start 11`.")
    config = storyteller().config
    share(config.num_heads, 0, num_ranks)
    longest = config.max_tokens
    if not 1 <= len(prompt) <= longest - num_tokens:
        raise InvalidOption(
            f"the prompt has {len(prompt)} tokens and {num_tokens} more are to be generated: give "
            f"a prompt of at least 1 token, and at most {longest} tokens together."
        )
    reports = run_ranks(
        _program, str(file), prompt, num_tokens,
        num_ranks=num_ranks, seconds=_SECONDS, file=str(file),
    )  # fmt: skip
    uses = [
        RankUse(report.value[1], dict(Counter(call.name for call in report.calls)))
        for report in reports
    ]
    return reports[0].value[0], uses


def _program(
    rank: int, num_ranks: int, file: str, prompt: list[int], num_tokens: int
) -> tuple[list[int], int]:
    one = find_in_file(Path(file), "Rank")(storyteller(), rank, num_ranks)
    generated: list[int] = []
    if rank == 0:
        generated = one.generate(prompt, num_tokens)
        one.stop()
    else:
        one.work()
    return generated, _num_elements(one)


def _num_elements(one: Any) -> int:
    values = [getattr(layer, each.name) for layer in one.layers for each in fields(layer)]
    tensors = [value.weight if isinstance(value, Linear) else value for value in values]
    return sum(tensor.numel() for tensor in [one.rows, one.norm, *tensors])
