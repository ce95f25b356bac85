"""The budget of a step on a CPU: what it must read and compute, and where its time goes.

    floor   the longer of two times: to read the step's bytes as fast as a plain read, and to do its
            operations as fast as a large matrix product
    gap     the step's time over its floor, divided among the parts of the step

Bytes and operations are counted from the model as it is in memory and from the step's message
(`StepInput`), operators where PyTorch dispatches them, and wake-ups by Linux.
"""

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from rich.table import Table
from torch import Tensor

from minipaged.config import WeightDType
from minipaged.engine.llm_engine import LLMEngine
from minipaged.errors import InvalidOption
from minipaged.evaluation.bench.budget_counts import (
    count_bytes,
    count_operations,
    count_sleeps,
    counted_operators,
    why_no_wake_ups,
)
from minipaged.evaluation.bench.decode_step import build_engine
from minipaged.evaluation.bench.timing import CPUSpeed
from minipaged.models.linear import Linear
from minipaged.models.llama import Llama, LlamaConfig
from minipaged.models.packed import InFloat16, works
from minipaged.sampling import SamplingParams
from minipaged.scheduler.output import StepInput
from minipaged.utils.threads import describe_waiting

PARTS = ("matrices", "attention", "other", "host")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Workload:
    """A step in which each sequence computes equally many tokens, after equally many others."""

    num_seqs: int
    num_tokens: int  # of each sequence; 1: it decodes
    context_len: int  # of each sequence; a multiple of `num_tokens`
    num_steps: int  # to time

    @property
    def decodes(self) -> bool:
        return self.num_tokens == 1

    @property
    def prompt_len(self) -> int:
        """Tokens of each prompt: a decode step comes after it, a prefill step is its end."""
        return self.context_len + (0 if self.decodes else self.num_tokens)

    def is_done_by(self, step: StepInput) -> bool:
        """Whether a step is of this kind. Each decode step has one token more of context."""
        return len(step.sequences) == self.num_seqs and all(
            len(each.token_ids) == self.num_tokens and each.context_len >= self.context_len
            for each in step.sequences
        )


WORKLOADS = [
    *(Workload(num_seqs, 1, 128, num_steps=16) for num_seqs in (1, 8, 32)),
    *(Workload(1, 512, context_len, num_steps=3) for context_len in (0, 1536)),
]
QUICK_WORKLOADS = [
    *(Workload(num_seqs, 1, 9, num_steps=3) for num_seqs in (1, 3)),
    *(Workload(1, 16, context_len, num_steps=2) for context_len in (0, 32)),
]


@dataclass(frozen=True)
class Row:
    """One workload. All figures are of the step with the median time, so that they add up."""

    num_seqs: int
    num_tokens: int
    context_len: int
    num_bytes: int
    num_operations: int
    read_seconds: float  # reading the bytes as fast as a plain read
    compute_seconds: float  # doing the operations as fast as a large matrix product
    floor_seconds: float
    seconds: float
    parts: dict[str, float]  # seconds of each of PARTS
    operators_per_layer: int
    views_per_layer: int
    wake_ups_per_layer: float | None  # of other threads; None: see `why_no_wake_ups`


def measure(
    config: LlamaConfig,
    workloads: list[Workload],
    dtype: torch.dtype,
    weight_dtype: WeightDType,
) -> Iterator[Row]:
    """Measure each workload. Raises InvalidOption if float16 weights do not work here."""
    if weight_dtype == "float16" and not works(InFloat16, dtype):
        raise InvalidOption(
            "this processor, or this torch, cannot multiply weights in float16 with inputs in "
            f"{dtype}: choose others."
        )
    for workload in workloads:
        chunk = None if workload.decodes else workload.num_tokens  # None: all prompts in one step
        sizes = workload.num_seqs, workload.prompt_len, CPU, dtype, False, weight_dtype, chunk
        yield measure_workload(build_engine(config, "torch", *sizes), workload)
        gc.collect()  # wrapped calls refer to the engine in cycles: free it before the next one


def measure_workload(engine: LLMEngine, workload: Workload) -> Row:
    """Measure one workload, and the machine's speed after each step, since it changes."""
    model = engine.executor.runner.model
    assert isinstance(model, Llama), "the benchmark's model is a Llama"
    watch = _Stopwatch(engine)
    with counted_operators(model.layers[-1]) as operators:
        list(_serve(engine, watch, replace(workload, num_steps=1)))  # also warms up
    speed, steps = CPUSpeed(model.dtype), list[_Step]()
    for step in _serve(engine, watch, workload):
        steps.append(step)
        speed.measure()
    steps.sort(key=lambda step: step.seconds)
    median = steps[len(steps) // 2]
    num_bytes, num_operations = (f(model, median.step) for f in (count_bytes, count_operations))
    bandwidth, rate = speed.medians()
    return Row(
        workload.num_seqs,
        workload.num_tokens,
        workload.context_len,
        num_bytes,
        num_operations,
        num_bytes / bandwidth,
        num_operations / rate,
        max(num_bytes / bandwidth, num_operations / rate),
        median.seconds,
        median.parts,
        operators.num_operators,
        operators.num_views,
        None if why_no_wake_ups() else median.wake_ups / model.config.num_layers,
    )


# ------------------------------------------------------------------------------------- the steps


class _Step(NamedTuple):
    step: StepInput
    seconds: float
    parts: dict[str, float]
    wake_ups: int


class _Stopwatch:
    """Sums the time of each part by wrapping its calls, on the objects of this engine alone."""

    def __init__(self, engine: LLMEngine) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.step = StepInput(())  # the last one
        executor, runner = engine.executor, engine.executor.runner
        run = executor.run

        def noted_run(step: StepInput, *rest: Any) -> Tensor:
            self.step = step
            return run(step, *rest)

        executor.run = self._timed("run", noted_run)
        engine.sampler.sample = self._timed("sample", engine.sampler.sample)
        runner.batches.lay_out = self._timed("batch", runner.batches.lay_out)
        runner.batches.send = self._timed("batch", runner.batches.send)
        calls = ("prepare", "store_kv", "paged_attention")
        attention = {
            name: self._timed("attention", getattr(runner.backend, name)) for name in calls
        }
        runner.backend = replace(runner.backend, **attention)
        for module in runner.model.modules():
            if hasattr(module, "backend"):
                cast(Any, module).backend = runner.backend
            if isinstance(module, Linear) and module is not runner.model.head:
                module.forward = self._timed("matrices", module.forward)
        runner.model.logits = self._timed("matrices", runner.model.logits)

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            result = call(*args)
            self.seconds[part] += time.perf_counter() - begin
            return result

        return timed

    def parts(self, seconds: float) -> dict[str, float]:
        """The seconds of each of PARTS, in a step of so many seconds."""
        spent = self.seconds
        on_device = spent["run"] - spent["batch"] + spent["sample"]
        other = on_device - spent["matrices"] - spent["attention"]
        return dict(
            zip(
                PARTS,
                (spent["matrices"], spent["attention"], other, seconds - on_device),
                strict=True,
            )
        )


def _serve(engine: LLMEngine, watch: _Stopwatch, workload: Workload) -> Iterator[_Step]:
    """Serve requests until all steps of the workload are done; yield these steps."""
    vocab_size = engine.executor.runner.model.config.vocab_size
    # The step that computes the prompts samples the first tokens.
    max_tokens, rounds = (
        (workload.num_steps + 1, 1) if workload.decodes else (1, workload.num_steps)
    )
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    for _ in range(rounds):
        for i in range(workload.num_seqs):
            prompt = [(i * 7919 + 31 * n) % vocab_size for n in range(workload.prompt_len)]
            engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            watch.seconds.clear()
            before = count_sleeps()
            begin = time.perf_counter()
            engine.step()
            seconds = time.perf_counter() - begin
            after = count_sleeps()
            if workload.is_done_by(watch.step):
                wake_ups = sum(sleeps - before.get(task, 0) for task, sleeps in after.items())
                yield _Step(watch.step, seconds, watch.parts(seconds), wake_ups)


# ------------------------------------------------------------------------------------- the table


def describe(
    config: LlamaConfig, dtype: torch.dtype, weight_dtype: WeightDType, rows: list[Row]
) -> str:
    """The caption of the table."""
    reads = sorted(1e-9 * row.num_bytes / row.read_seconds for row in rows)
    computes = sorted(1e-9 * row.num_operations / row.compute_seconds for row in rows)
    name = str(dtype).removeprefix("torch.")
    kept = name if weight_dtype == "auto" else weight_dtype
    reason = why_no_wake_ups()
    return (
        f"{config.num_layers} layers, hidden size {config.hidden_size}, {name}, weights in {kept}. "
        f"Between the steps: a plain read, {reads[0]:.1f} to {reads[-1]:.1f} GB/s, "
        f"and a large matrix product, {computes[0]:.0f} to {computes[-1]:.0f} GFLOP/s. The floor "
        "is the longer of the times to read the bytes and to do the operations at these rates.\n"
        '"gap": the step over its floor, and the sum of its four parts: linear layers and logits; '
        "attention, with storing keys and values; all other operators, with the Python code of "
        "the layers; scheduling, building the batch, outputs.\n"
        "Per layer: operators that compute, views, and how often other threads of this process "
        f"were woken{f' (not counted: {reason})' if reason else ''}. Waiting threads: "
        f"{describe_waiting()}."
    )


def as_table(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("step", no_wrap=True)
    titles = ("reads", "GFLOP", "floor", "by", "step", "gap", *PARTS)
    for title in (*titles, "operators", "views", "wake-ups"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        what = f"decode, {row.num_seqs}" if row.num_tokens == 1 else f"prefill, {row.num_tokens}"
        wake_ups = row.wake_ups_per_layer
        table.add_row(
            f"{what} after {row.context_len:,}",
            f"{1e-6 * row.num_bytes:,.0f} MB",
            f"{1e-9 * row.num_operations:,.2f}",
            f"{1e3 * row.floor_seconds:,.1f} ms",
            "bytes" if row.read_seconds > row.compute_seconds else "GFLOP",
            f"{1e3 * row.seconds:,.1f} ms",
            f"{row.seconds / row.floor_seconds:.2f} x",
            *(f"{row.parts[part] / row.floor_seconds:.2f}" for part in PARTS),
            str(row.operators_per_layer),
            str(row.views_per_layer),
            "-" if wake_ups is None else f"{wake_ups:.1f}",
        )
    return table
