"""One model on several ranks against one process with all threads: speed, memory, where time goes.

`minipaged bench ranks`. Each side is a process of its own that stays loaded; rounds alternate, and
only ratios within a round are compared. Both must generate the same tokens. This module, run as a
program, is one side.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

from minipaged.errors import MinipagedError

PARTS = ("message", "compute", "all-reduce", "gather")


class WrongTokens(MinipagedError):
    """The ranks generated other tokens than one process does: their time would mean nothing."""


@dataclass(frozen=True)
class Row:
    """Decoding of one batch size, on both sides."""

    batch: int
    one: float  # tokens per second of one process
    several: float  # of all ranks
    ratio: float  # several over one, median of the rounds
    split: list[dict[str, float]]  # by rank: milliseconds per step


@dataclass(frozen=True)
class Memory:
    """One rank's memory beyond that of an idle interpreter, in bytes."""

    rank: int
    peak: int
    share: int  # of weights and blocks

    @property
    def ratio(self) -> float:
        """Peak over share."""
        return self.peak / self.share


@dataclass(frozen=True)
class Found:
    """All that was measured."""

    rows: list[Row]
    memory: list[Memory]


def measure(size: int, rounds: int, quick: bool, note_run: Callable[[], object]) -> Found:
    """Both sides in turn. Raises WrongTokens."""
    from minipaged.evaluation.bench.engine_workload import FULL, QUICK, make_model

    # As many heads as can be divided: the same size as in `minipaged bench engine`.
    heads = {} if quick else {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 72}
    workload = QUICK if quick else FULL
    workload = replace(workload, hf={**workload.hf, **heads})
    tokens = workload.prompt_len + workload.new_tokens + 1
    options: dict[str, Any] = {
        "num_blocks": max(workload.batches) * ceil(tokens / 16) + 8,
        "num_swap_blocks": 0,
        "enable_prefix_caching": False,
    }
    with TemporaryDirectory() as name, ExitStack() as stack:
        make_model(workload, Path(name))
        sides = [
            stack.enter_context(Side({"model": name, "tensor_parallel_size": each, **options}))
            for each in (1, size)
        ]
        rows = [
            _compare(sides, workload.decode_requests(batch), rounds, note_run)
            for batch in workload.batches
        ]
        return Found(rows, [Memory(**each) for each in sides[1].ask("memory")])


def _compare(
    sides: list["Side"],
    requests: list[tuple[list[int], int]],
    rounds: int,
    note_run: Callable[[], object],
) -> Row:
    speeds: list[list[float]] = []
    split: list[list[list[float]]] = []
    for number in range(rounds + 1):  # round 0 warms both
        order = sides if number % 2 else sides[::-1]
        answers = {id(side): side.ask("decode", requests=requests) for side in order}
        one, several = (answers[id(side)] for side in sides)
        if one["tokens"] != several["tokens"]:
            raise WrongTokens(f"of {len(requests)} sequences, some got other tokens than alone.")
        if number:
            speeds.append([each["num_tokens"] / each["seconds"] for each in (one, several)])
            split.append([[rank[part] for part in PARTS] for rank in several["split"]])
        note_run()
    by_rank: list[dict[str, float]] = [
        dict(zip(PARTS, map(statistics.median, zip(*rank, strict=True)), strict=True))
        for rank in zip(*split, strict=True)
    ]
    return Row(
        len(requests),
        statistics.median(each[0] for each in speeds),
        statistics.median(each[1] for each in speeds),
        statistics.median(several / one for one, several in speeds),
        by_rank,
    )


def as_tables(found: Found) -> list[Table]:
    """Speed with the parts of a step, and memory, for a person."""
    speed = Table(box=None, padding=(0, 1), pad_edge=False)
    for title in ("sequences", "one process", "ranks", "ratio", "rank", *PARTS):
        speed.add_column(title, justify="right")
    for row in found.rows:
        for rank, parts in enumerate(row.split):
            totals = (str(row.batch), f"{row.one:.1f}", f"{row.several:.1f}", f"{row.ratio:.3f}")
            times = (f"{parts[part]:.2f}" for part in PARTS)
            speed.add_row(*(totals if rank == 0 else ("",) * 4), str(rank), *times)
    memory = Table(box=None, padding=(0, 1), pad_edge=False)
    for title in ("rank", "peak, MB", "share of weights and blocks, MB", "ratio"):
        memory.add_column(title, justify="right")
    for each in found.memory:
        sizes = (f"{each.peak / 1e6:.0f}", f"{each.share / 1e6:.0f}", f"{each.ratio:.3f}")
        memory.add_row(str(each.rank), *sizes)
    return [speed, memory]


# ---- one side, in a process of its own -----------------------------------------------------------


class Side:
    """A process with one engine, which does one thing at a time."""

    def __init__(self, options: dict[str, Any]) -> None:
        command = [sys.executable, "-m", __name__, json.dumps(options)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:  # closes the pipes, and waits
            assert self._process.stdin is not None
            self._process.stdin.close()  # it ends its engine, and itself
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def ask(self, do: str, **given: Any) -> Any:
        """What the process answers. Raises MinipagedError if it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **given}) + "\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise MinipagedError("a process has ended: see what it printed above.")
        return json.loads(line)


class _Engine:
    def __init__(self, options: dict[str, Any]) -> None:
        from minipaged.evaluation.bench.load import resident_bytes
        from minipaged.llm import LLM

        self._idle_bytes = resident_bytes("VmRSS")
        self._llm = LLM(**options)

    def decode(self, requests: list[tuple[list[int], int]]) -> dict[str, Any]:
        """Time from the moment when every sequence has its first token."""
        from minipaged.sampling import SamplingParams
        from minipaged.worker.executor import MultiExecutor

        prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        params = [
            SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True)
            for _, most in requests
        ]
        executor, engine = self._llm.engine.executor, self._llm.engine
        tokens: list[list[int]] = [[] for _ in requests]
        begin, untimed, first_step = None, 0, 0
        for index, output in self._llm.stream(prompts, params):
            tokens[index] = output.outputs[0].token_ids
            if begin is None and all(tokens):
                if isinstance(executor, MultiExecutor):
                    executor.report()
                begin, untimed = time.perf_counter(), sum(map(len, tokens))
                first_step = engine.last_step[0]
        assert begin is not None
        seconds = time.perf_counter() - begin
        num_steps = engine.last_step[0] - first_step
        split = executor.report() if isinstance(executor, MultiExecutor) else []
        for rank in split:
            rank["compute"] = rank["step"] - rank["all-reduce"] - rank["gather"]
        return {
            "seconds": seconds,
            "num_tokens": sum(map(len, tokens)) - untimed,
            "tokens": tokens,
            "split": [{part: 1000 * r[part] / num_steps for part in PARTS} for r in split],
        }

    def memory(self) -> list[dict[str, int]]:
        """By rank."""
        from minipaged.worker.executor import MultiExecutor

        executor = self._llm.engine.executor
        assert isinstance(executor, MultiExecutor)
        runner, config = executor.runner, self._llm.engine.config
        model = runner.model
        numbers = sum(each.numel() for each in model.parameters()) + sum(_packed_sizes(model))
        block = config.block_size * model.config.kv_bytes_per_token(model.dtype.itemsize)
        share = numbers * model.dtype.itemsize + config.num_blocks * block
        pids = ["self", *map(str, executor.worker_pids)]
        return [
            {"rank": rank, "peak": _peak(pid) - self._idle_bytes, "share": share}
            for rank, pid in enumerate(pids)
        ]


def _packed_sizes(model: Any) -> Iterator[int]:
    from minipaged.models.linear import Linear

    for module in model.modules():
        if isinstance(module, Linear) and module.packed_weight is not None:
            yield module.in_features * module.out_features


def _peak(pid: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    [kib] = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return 1024 * int(kib)


def _answer(options: dict[str, Any]) -> None:
    engine = _Engine(options)
    for line in sys.stdin:
        given: dict[str, Any] = json.loads(line)
        print(json.dumps(getattr(engine, given.pop("do"))(**given)), flush=True)


if __name__ == "__main__":
    _answer(json.loads(sys.argv[1]))
