"""One model on several ranks, compared with one process with all threads: speed and memory.

`minipaged bench ranks`. Rounds alternate, and only ratios within a round are compared. Both sides
must generate the same tokens. Run as a program, this module is one side. For the parts of a step,
run `minipaged bench step --tensor-parallel-size 2`.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

from minipaged.errors import MinipagedError
from minipaged.evaluation.bench.asked_process import AskedProcess, answer


class WrongTokens(MinipagedError):
    """The ranks and one process generated different tokens, so times cannot be compared."""


@dataclass(frozen=True)
class Row:
    """Decoding of one batch size, on both sides."""

    batch: int
    one: float  # tokens per second of one process
    several: float  # of all ranks
    ratio: float  # several over one, median of the rounds


@dataclass(frozen=True)
class Memory:
    """A process's memory beyond that of an idle interpreter, in bytes."""

    process: str
    peak: int
    share: int  # of weights and blocks

    @property
    def rest(self) -> int:
        """Memory that is not divided: PyTorch's code and buffers, activations."""
        return self.peak - self.share

    @property
    def ratio(self) -> float:
        """Peak over share."""
        return self.peak / self.share


@dataclass(frozen=True)
class Found:
    """All measurements."""

    rows: list[Row]
    memory: list[Memory]


def measure(size: int, rounds: int, quick: bool, note_run: Callable[[], object]) -> Found:
    """Measure both sides in turn. Raises WrongTokens."""
    from minipaged.evaluation.bench.engine_workload import DIVISIBLE, QUICK, make_model

    workload = QUICK if quick else DIVISIBLE
    tokens = workload.prompt_len + workload.new_tokens + 1
    options: dict[str, Any] = {
        "num_blocks": max(workload.batches) * ceil(tokens / 16) + 8,
        "num_swap_blocks": 0,
        "enable_prefix_caching": False,
    }
    with TemporaryDirectory() as name, ExitStack() as stack:
        make_model(workload, Path(name))
        one, several = (
            stack.enter_context(
                AskedProcess(__name__, {"model": name, "tensor_parallel_size": each, **options})
            )
            for each in (1, size)
        )
        rows = [
            _compare(one, several, workload.decode_requests(batch), rounds, note_run)
            for batch in workload.batches
        ]
        answers = [*one.ask("memory"), *several.ask("memory")]
        names = ["one", *(f"rank {rank}" for rank in range(size))]
        memory = [Memory(name, **each) for name, each in zip(names, answers, strict=True)]
        return Found(rows, memory)


def _compare(
    one: AskedProcess,
    several: AskedProcess,
    requests: list[tuple[list[int], int]],
    rounds: int,
    note_run: Callable[[], object],
) -> Row:
    speeds: list[tuple[float, float]] = []
    for number in range(rounds + 1):  # round 0 warms up both
        order = (one, several) if number % 2 else (several, one)
        answers = {id(side): side.ask("decode", requests=requests) for side in order}
        a, b = answers[id(one)], answers[id(several)]
        if a["tokens"] != b["tokens"]:
            raise WrongTokens(
                f"some of {len(requests)} sequences got different tokens from those of one process."
            )
        if number:
            speeds.append((a["num_tokens"] / a["seconds"], b["num_tokens"] / b["seconds"]))
        note_run()
    return Row(
        len(requests),
        statistics.median(alone for alone, _ in speeds),
        statistics.median(together for _, together in speeds),
        statistics.median(together / alone for alone, together in speeds),
    )


def as_tables(found: Found) -> list[Table]:
    """Speed and memory as tables."""
    speed = Table(box=None, padding=(0, 1), pad_edge=False)
    for title in ("sequences", "one process, tokens/s", "ranks, tokens/s", "ratio"):
        speed.add_column(title, justify="right")
    for row in found.rows:
        speed.add_row(str(row.batch), f"{row.one:.1f}", f"{row.several:.1f}", f"{row.ratio:.3f}")
    memory = Table(box=None, padding=(0, 1), pad_edge=False)
    for title in ("process", "peak, MB", "weights and blocks, MB", "rest, MB", "ratio"):
        memory.add_column(title, justify="right")
    for each in found.memory:
        sizes = (f"{size / 1e6:.0f}" for size in (each.peak, each.share, each.rest))
        memory.add_row(each.process, *sizes, f"{each.ratio:.3f}")
    return [speed, memory]


# ---- one side, in a process of its own -----------------------------------------------------------


class _Engine:
    def __init__(self, options: dict[str, Any]) -> None:
        from minipaged.evaluation.bench.load import resident_bytes
        from minipaged.llm import LLM

        self._idle_bytes = resident_bytes("VmRSS")
        self._llm = LLM(**options)

    def decode(self, requests: list[tuple[list[int], int]]) -> dict[str, Any]:
        """Time from when every sequence has its first token."""
        from minipaged.sampling import SamplingParams

        prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        params = [
            SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True)
            for _, most in requests
        ]
        tokens: list[list[int]] = [[] for _ in requests]
        begin, untimed = None, 0
        for index, output in self._llm.stream(prompts, params):
            tokens[index] = output.outputs[0].token_ids
            if begin is None and all(tokens):
                begin, untimed = time.perf_counter(), sum(map(len, tokens))
        assert begin is not None
        seconds = time.perf_counter() - begin
        return {
            "seconds": seconds,
            "num_tokens": sum(map(len, tokens)) - untimed,
            "tokens": tokens,
        }

    def memory(self) -> list[dict[str, int]]:
        """The memory of each process of the engine, in bytes by kind."""
        from minipaged.evaluation.bench.load import resident_bytes
        from minipaged.worker.executor import MultiExecutor

        executor = self._llm.engine.executor
        others = executor.worker_pids if isinstance(executor, MultiExecutor) else []
        model, config = executor.runner.model, self._llm.engine.config
        weights = sum(each.nbytes for each in model.parameters()) + sum(_packed_bytes(model))
        block = config.block_size * model.config.kv_bytes_per_token(model.dtype.itemsize)
        share = weights + config.num_blocks * block
        return [
            {"peak": resident_bytes("VmHWM", pid) - self._idle_bytes, "share": share}
            for pid in ("self", *others)
        ]


def _packed_bytes(model: Any) -> Iterator[int]:
    from minipaged.models.linear import Linear

    for module in model.modules():
        if isinstance(module, Linear) and module.packed is not None:
            yield module.packed.num_bytes


if __name__ == "__main__":
    engine = _Engine(json.loads(sys.argv[1]))
    answer({"decode": engine.decode, "memory": engine.memory})
