"""The whole engine compared with its peers: tokens per second, memory, and equal tokens.

All run the same checkpoint, each in its own process that stays loaded, in turn, round after round:
A B C A B C ... Only ratios within a round are compared, since a machine's speed changes from minute
to minute. CPU time is reported as well, because other processes do not affect it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from minipaged.config import EngineArgs
from minipaged.evaluation.bench.engine_peer import Clock
from minipaged.evaluation.bench.engine_process import (
    SECONDS_TO_RUN,
    TRANSFORMERS,
    CannotRun,
    Engine,
    Entry,
    Peer,
    Run,
    start_engine,
)
from minipaged.evaluation.bench.engine_referee import Referee
from minipaged.evaluation.bench.engine_report import READ, Row
from minipaged.evaluation.bench.engine_rows import Results
from minipaged.evaluation.bench.engine_sides import CONTINUOUS, OURS, Minipaged
from minipaged.evaluation.bench.engine_workload import Case, Workload, make_model
from minipaged.models.loader import DTYPES
from minipaged.utils.progress import progress_bar


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
                yield from Results(case, entries, runs, failures, dtype, referee).rows()


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
