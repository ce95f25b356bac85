"""`minipaged bench overlap`: decode steps with and without overlap, on a simulated device.

The engine is the real one, with a stub for the model: what remains is the host's part of a step.
The device is a clock. It begins a step when it is launched and the step before has ended, and needs
a fixed time for it; only then can the host read the results.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from minipaged.engine.llm_engine import LLMEngine
from minipaged.evaluation.bench.decode_step import TINY, build_engine
from minipaged.sampling import SamplingParams
from minipaged.sampling.rows import SampledToken
from minipaged.sampling.sampler import Draws

STEPS = 24  # few, so that the pool has a free block for each sequence until the end
WARM_UP = 4  # steps that are not timed: the prompts, and what is done a first time
SHOWN = 3  # steps in the picture
DEVICE_SECONDS = (0.0005, 0.001, 0.002, 0.004)
COLORS = {"launch": "#4477aa", "commit": "#ccbb44", "device": "#228833"}


@dataclass(frozen=True)
class Row:
    """Steps on a device that needs a fixed time for each."""

    device_seconds: float
    alone_seconds: float  # a step without overlap, the median
    overlapped_seconds: float


@dataclass(frozen=True)
class Bar:
    """What host or device did in a while."""

    what: str  # one of COLORS
    begin: float  # in seconds
    end: float
    step: int


class _StubModel:
    """Returns the same logits for every token."""

    def __init__(self, model: Any, num_rows: int) -> None:
        self.config, self.dtype = model.config, torch.float32
        self._answer = torch.zeros(num_rows, 512)
        self._answer[:, 65] = 1

    def __call__(self, token_ids: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.zeros(len(token_ids), 1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._answer[: len(hidden)]


def measure(num_seqs: int, context_len: int, rounds: int) -> Iterator[Row]:
    """Measure steps on devices of several speeds, with and without overlap in turn."""
    for seconds in DEVICE_SECONDS:
        medians: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for overlaps in medians:
                bars = run(num_seqs, context_len, seconds, overlaps)
                ends = [bar.end for bar in bars if bar.what == "commit"][WARM_UP:]
                gaps = [after - before for before, after in pairwise(ends)]
                medians[overlaps].append(statistics.median(gaps))
        yield Row(seconds, *(statistics.median(medians[overlaps]) for overlaps in (False, True)))


def run(num_seqs: int, context_len: int, seconds: float, overlaps: bool) -> list[Bar]:
    """Decode with all sequences, and return what host and device did."""
    cpu = torch.device("cpu")
    engine = build_engine(TINY, "torch", num_seqs, context_len, cpu, torch.float32, False)
    engine.config = replace(engine.config, async_scheduling=overlaps)
    runner = engine.executor.runner
    runner.model = _StubModel(runner.model, num_seqs)  # type: ignore[assignment]
    device = _Device(engine, seconds)
    params = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True)
    for i in range(num_seqs):
        engine.add_request(str(i), {"prompt_token_ids": [65 + i % 9] * context_len}, params)
    num_tokens = 0
    while engine.has_unfinished_requests():
        num_tokens += sum(len(new.token_ids) for each in engine.step() for new in each.new)
    assert num_tokens == num_seqs * STEPS, f"{num_tokens} tokens were generated"
    return device.bars


class _Device:
    """The clock of a device, and what it and the host did. It times the engine from outside."""

    def __init__(self, engine: LLMEngine, seconds: float) -> None:
        self.bars: list[Bar] = []
        self._seconds = seconds
        self._free_at = 0.0
        self._num_launched = 0
        self._sample = engine.sampler.sample
        self._launch, self._commit = engine._launch, engine._commit  # pyright: ignore[reportPrivateUsage]
        engine.sampler.sample = self._enqueue  # type: ignore[method-assign]
        engine._launch = self._timed_launch  # type: ignore[method-assign]
        engine._commit = self._timed_commit  # type: ignore[method-assign]

    def _enqueue(self, logits: Any, rows: Any) -> Any:
        draws = self._sample(logits, rows)
        self._num_launched += 1
        begin = max(time.perf_counter(), self._free_at)
        self._free_at = begin + self._seconds
        self.bars.append(Bar("device", begin, self._free_at, self._num_launched))
        return _LateDraws(draws, self._free_at, self._num_launched)

    def _timed_launch(self, *arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        step = self._launch(*arguments, **options)
        self.bars.append(Bar("launch", begin, time.perf_counter(), self._num_launched))
        return step

    def _timed_commit(self, step: Any) -> None:
        self._commit(step)
        draws = step.draws
        self.bars.append(Bar("commit", draws.read_at, time.perf_counter(), draws.number))


class _LateDraws:
    """Tokens that can be read when the device has ended the step."""

    def __init__(self, draws: Draws, ready_at: float, number: int) -> None:
        self.token_ids = draws.token_ids
        self.number = number
        self.read_at = ready_at
        self._draws = draws
        self._ready_at = ready_at

    def read(self) -> list[SampledToken]:
        time.sleep(max(0.0, self._ready_at - time.perf_counter()))
        self.read_at = time.perf_counter()
        return self._draws.read()


def as_table(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(box=None, padding=(0, 2))
    for title in ("device per step", "without overlap", "with overlap", "ratio"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            f"{1e3 * row.device_seconds:.1f} ms",
            f"{1e3 * row.alone_seconds:.2f} ms",
            f"{1e3 * row.overlapped_seconds:.2f} ms",
            f"{row.overlapped_seconds / row.alone_seconds:.2f}",
        )
    return table


def plot(num_seqs: int, context_len: int, seconds: float, path: Path) -> None:
    """Draw the time lines of some steps, without and with overlap, to an image file."""
    import_module("matplotlib").use("Agg")  # draws to files without a screen
    pyplot: Any = import_module("matplotlib.pyplot")
    runs = [run(num_seqs, context_len, seconds, overlaps) for overlaps in (False, True)]
    figure, panels = pyplot.subplots(2, 1, figsize=(8, 3.6), sharex=True, layout="constrained")
    width = 0.0
    for panel, bars, title in zip(panels, runs, ("without overlap", "with overlap"), strict=True):
        first = WARM_UP + 2
        start = next(b.begin for b in bars if b.what == "launch" and b.step == first)
        for bar in bars:
            if not first <= bar.step < first + SHOWN:
                continue
            begin, length = 1e3 * (bar.begin - start), 1e3 * (bar.end - bar.begin)
            width = max(width, begin + length)
            line = 0 if bar.what == "device" else 1
            panel.barh(line, length, left=begin, color=COLORS[bar.what], edgecolor="white")
            if length > 0.25:
                panel.text(
                    begin + length / 2,
                    line,
                    str(bar.step - first + 1),
                    ha="center",
                    va="center",
                    color="black" if bar.what == "commit" else "white",
                )
        panel.set_yticks([0, 1], ["device", "host"])
        panel.set_title(title, loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].set_xlabel("milliseconds; the numbers are those of the steps")
    panels[0].set_xlim(-0.05, width + 0.05)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    figure.legend(handles, COLORS, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
