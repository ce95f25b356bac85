"""The whole engine compared with its peers: tokens per second, memory, and equal tokens.

All run the same checkpoint, each in its own process that stays loaded, in turn, round after round:
A B C A B C ... Only ratios within a round are compared, since a machine's speed changes from minute
to minute. CPU time is reported as well, because other processes do not affect it.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from minipaged.config import EngineArgs
from minipaged.evaluation.bench.engine_peer import Clock, Request
from minipaged.evaluation.bench.engine_process import (
    SECONDS_TO_RUN,
    TRANSFORMERS,
    CannotRun,
    Engine,
    Peer,
    start_engine,
)
from minipaged.evaluation.bench.engine_referee import TOLERANCE, Referee, WrongTokens
from minipaged.evaluation.bench.engine_report import READ, Row
from minipaged.evaluation.bench.engine_sides import CONTINUOUS, OURS, Minipaged
from minipaged.evaluation.bench.engine_workload import Case, Workload, make_model
from minipaged.models.loader import DTYPES
from minipaged.utils.progress import progress_bar


@dataclass(frozen=True)
class Run:
    """One run: its time, and the generated tokens of every prompt."""

    num_tokens: int  # number of requested tokens generated in this time
    seconds: float
    cpu_seconds: float  # CPU seconds of all threads
    tokens: list[list[int]]


class Entry(NamedTuple):
    """A row of a case: an engine, and its way to serve requests."""

    engine: Engine
    way: str = ""

    @property
    def name(self) -> str:
        """Its name in the table."""
        return f"{self.engine.name}, {self.way}" if self.way else self.engine.name

    def run(self, case: Case, requests: list[Request]) -> Run:
        """Serve the requests. Raises CannotRun."""
        found = self.engine.ask(
            "serve",
            SECONDS_TO_RUN,
            requests=requests,
            after_first=case.kind == "decode",
            way=self.way,
        )
        run = Run(**found)
        if case.kind == "prefill":
            run = replace(run, num_tokens=sum(len(prompt) for prompt, _ in requests))
        return run


def measure(
    workload: Workload,
    dtype: str,
    rounds: int,
    peers: list[Peer],
    threads: int | None,
    environments: Path,
) -> Iterator[Row]:
    """Measure all cases. Raises WrongTokens or CannotRun if this library did not work."""
    if threads is not None:
        torch.set_num_threads(threads)
    with TemporaryDirectory() as name, ExitStack() as stack:
        num_weights = make_model(workload, Path(name))
        options = _options(workload, Path(name), dtype)
        engines: list[Engine] = []
        for peer in progress_bar((None, *peers), desc="loading"):
            engines.append(start_engine(stack, peer, options, environments))
        if engines[0].ended is not None:
            raise CannotRun(f"minipaged does not run: {engines[0].ended}")
        referee = _choose_referee(options, engines)
        read = _read_work(num_weights * DTYPES[dtype].itemsize)
        cases = [(case, _entries(case, workload, engines)) for case in workload.cases()]
        with progress_bar(total=rounds * sum(len(each) for _, each in cases), desc="runs") as bar:
            for case, entries in cases:
                runs, failures = _run_in_turn(case, entries, rounds, read, bar.update)
                yield from _Results(case, entries, runs, failures, dtype, referee).rows()


def _options(workload: Workload, folder: Path, dtype: str) -> dict[str, Any]:
    """What every engine is given: room for all requests of a case, so that none is preempted."""
    block_size = EngineArgs.block_size
    lengths = [[len(p) + output for p, output in case.requests(0)] for case in workload.cases()]
    most = max(sum(ceil(length / block_size) for length in each) for each in lengths)
    return {
        "folder": folder,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "num_blocks": most + most // 10 + 64,
        "num_tokens": max(map(sum, lengths)),
        "max_model_len": max(map(max, lengths)),
        "max_num_seqs": max(map(len, lengths)),
    }


def _entries(case: Case, workload: Workload, engines: list[Engine]) -> list[Entry]:
    entries: list[Entry] = []
    for engine in engines:
        ways = [""]
        if case.kind == "mixed" and engine.name.startswith(TRANSFORMERS):
            ways = [*(f"static {size}" for size in workload.static_batches), CONTINUOUS]
        entries += [Entry(engine, way) for way in ways]
    return entries


def _read_work(num_bytes: int) -> Callable[[], Run]:
    """Reads this many bytes with minimal computation: the lower bound of a token's time."""
    weights = torch.ones(num_bytes // 4)
    repeats = 5

    def read() -> Run:
        clock = Clock()
        for _ in range(repeats):
            weights.max()
        return Run(**clock.stop(repeats, []))

    return read


def _run_in_turn(
    case: Case,
    entries: list[Entry],
    rounds: int,
    read: Callable[[], Run],
    done: Callable[[], object],
) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """Return all runs, and why some could not run. Raises CannotRun if this library could not."""
    runs: dict[str, list[Run]] = {entry.name: [] for entry in entries}
    failures: dict[str, str] = {}
    for entry in entries:
        entry.engine.forget_peak()
    for number in range(rounds + 1):  # round 0 warms up
        if number == 0 and case.kind == "mixed":
            continue  # it is long, and all are warm from the other cases
        for entry in entries:
            if entry.name in failures:
                continue
            try:
                run = entry.run(case, case.requests(number))
            except CannotRun as error:
                if entry.name == OURS:
                    raise
                failures[entry.name] = str(error)
                continue
            if number:
                runs[entry.name].append(run)
                done()
        if number and case.reads_weights:
            runs.setdefault(READ, []).append(read())
    return runs, failures


@dataclass(frozen=True)
class _Results:
    """The runs of a case, which become rows."""

    case: Case
    entries: list[Entry]
    runs: dict[str, list[Run]]
    failures: dict[str, str]
    dtype: str
    referee: Referee

    def rows(self) -> Iterator[Row]:
        """One row per entry. Raises WrongTokens if this library's tokens are wrong."""
        for entry in self.entries:
            try:
                if entry.name in self.failures:
                    raise CannotRun(self.failures[entry.name])
                yield self._row(entry)
            except (CannotRun, WrongTokens) as error:
                if entry.name == OURS:
                    raise
                yield Row(self.case.name, entry.name, failure=str(error), **entry.engine.about)
        if READ in self.runs:
            yield replace(self._summary(READ), percent_of_read=100.0)

    def _row(self, entry: Entry) -> Row:
        runs, engine = self.runs[entry.name], entry.engine
        expected = self._expected(entry.name)
        trusts = expected is not None and (entry.name != OURS or self.dtype == "float32")
        tolerance = TOLERANCE["bfloat16" if engine.half else self.dtype]
        num_close, num_alike = 0, len(runs[0].tokens)
        for index, run in enumerate(runs):
            requests = self.case.requests(index + 1)
            others = None if expected is None else expected[index].tokens
            num_close = max(
                num_close,
                self.referee.check(
                    self.case.name,
                    entry.name,
                    requests,
                    run.tokens,
                    others if trusts else None,
                    tolerance,
                ),
            )
            if others is not None:
                equal = sum(a == b for a, b in zip(run.tokens, others, strict=True))
                num_alike = min(num_alike, equal)
        row = replace(
            self._summary(entry.name),
            num_alike=None if expected is None else num_alike,
            num_close=num_close,
            peak_bytes=engine.peak_bytes(),
            **engine.about,
        )
        if entry.name != OURS:
            row = replace(row, **_ratios(runs, self.runs[OURS]))
        if READ in self.runs:
            share = row.tokens_per_second / self._summary(READ).tokens_per_second
            is_smaller = engine.half and self.dtype == "float32"
            row = replace(row, percent_of_read=(50 if is_smaller else 100) * share)
        return row

    def _expected(self, name: str) -> list[Run] | None:
        """The runs of another engine: of the first peer for this library, of this for a peer."""
        if name != OURS:
            return self.runs[OURS]
        for entry in self.entries:
            if entry.name not in (OURS, *self.failures):
                return self.runs[entry.name]
        return None

    def _summary(self, name: str) -> Row:
        runs = self.runs[name]
        seconds = statistics.median(run.seconds for run in runs)
        cpu_seconds = statistics.median(run.cpu_seconds for run in runs)
        num_tokens = runs[0].num_tokens
        return Row(
            self.case.name,
            name,
            num_tokens,
            seconds,
            cpu_seconds,
            num_tokens / seconds,
            num_tokens / max(cpu_seconds, 1e-9),
            cores=statistics.median(run.cpu_seconds / run.seconds for run in runs),
            num_requests=len(runs[0].tokens),
            rounds=[(run.seconds, run.cpu_seconds) for run in runs],
        )


def _ratios(theirs: list[Run], ours: list[Run]) -> dict[str, float]:
    """Divide round by round, and return the median."""
    pairs = list(zip(theirs, ours, strict=True))
    return {
        "times_seconds": statistics.median(a.seconds / b.seconds for a, b in pairs),
        "times_cpu_seconds": statistics.median(
            a.cpu_seconds / max(b.cpu_seconds, 1e-9) for a, b in pairs
        ),
    }


def _choose_referee(options: dict[str, Any], engines: list[Engine]) -> Referee:
    """transformers in float32, or this library's specification of attention, once it is needed."""
    for engine in engines:
        if engine.name == TRANSFORMERS and options["dtype"] == "float32" and not engine.ended:

            def ask(prompt: list[int], tokens: list[int], engine: Engine = engine) -> list[float]:
                return engine.ask("shortfalls", SECONDS_TO_RUN, prompt=prompt, tokens=tokens)

            return Referee(TRANSFORMERS, ask)
    made: list[Minipaged] = []

    def compute(prompt: list[int], tokens: list[int]) -> list[float]:
        if not made:
            made.append(Minipaged(options, backend="reference"))
        return made[0].shortfalls(prompt, tokens)

    return Referee("the reference backend", compute)
