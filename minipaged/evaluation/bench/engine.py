"""The whole engine compared with transformers: tokens per second, memory, and equal tokens.

Both run the same checkpoint in this process, in turn, round after round: A B C A B C ... Only
ratios within a round are compared, since a machine's speed changes from minute to minute. CPU time
is reported as well, because other processes do not affect it.

The tokens of each run are checked, because a run with wrong tokens is worthless. Float32 must agree
with transformers. The two likeliest tokens may be so close that rounding decides: from there on,
every token must be very close to the likeliest in its own context. In bfloat16 rounding decides
often, so each token is compared with this library's specification of attention.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from minipaged.errors import MinipagedError
from minipaged.evaluation.bench.engine_report import MIXED, READ, Row
from minipaged.evaluation.bench.engine_sides import (
    OURS,
    CannotRun,
    Clock,
    Minipaged,
    Run,
    Transformers,
    Work,
    peak_bytes,
)
from minipaged.evaluation.bench.engine_workload import Request, Workload, make_model
from minipaged.models.loader import DTYPES
from minipaged.utils.progress import progress_bar

# Tolerated distance of a token's logit from the largest: the rounding error of this model's logits.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}


class WrongTokens(MinipagedError):
    """A timed run generated wrong tokens, so its time is meaningless."""


@dataclass(frozen=True)
class Case:
    """The runs that are made in turn, on the same requests."""

    name: str
    requests: list[Request]
    works: dict[str, Work]


def measure(
    workload: Workload, dtype: str, rounds: int, against: str | None, threads: int | None
) -> Iterator[Row]:
    """Measure all cases. Raises WrongTokens if this library generated wrong tokens."""
    if threads is not None:
        torch.set_num_threads(threads)
    with TemporaryDirectory() as name:
        folder = Path(name)
        weight_bytes = make_model(workload, folder) * DTYPES[dtype].itemsize
        ours = Minipaged(folder, dtype, workload)
        theirs = None if against is None else Transformers(folder, dtype)
        referee = _choose_referee(folder, dtype, workload, theirs)
        cases = [_decode_case(n, workload, ours, theirs, weight_bytes) for n in workload.batches]
        works = ours.mixed(workload) | ({} if theirs is None else theirs.mixed(workload))
        cases.append(Case(MIXED, workload.mixed_requests(), works))
        num_runs = sum(len(case.works) for case in cases) * rounds + len(works)
        with progress_bar(total=num_runs, desc="runs") as bar:
            for case in cases:
                for row in _measure_case(case, rounds, referee, bar.update):
                    if case.name == MIXED and row.failure is None:
                        peak = peak_bytes(row.by, folder, dtype, workload)
                        row = replace(row, peak_bytes=peak)
                        bar.update()
                    yield row


def _decode_case(
    batch: int,
    workload: Workload,
    ours: Minipaged,
    theirs: Transformers | None,
    weight_bytes: int,
) -> Case:
    requests = workload.decode_requests(batch)
    sides = {OURS: ours} | ({} if theirs is None else {"transformers": theirs})
    works: dict[str, Work] = {name: partial(side.decode, requests) for name, side in sides.items()}
    if batch == 1:
        works[READ] = _read_work(weight_bytes)
    return Case(f"decode, batch {batch}", requests, works)


def _read_work(num_bytes: int) -> Work:
    """Reads this many bytes with minimal computation: the lower bound of a token's time."""
    weights = torch.ones(num_bytes // 4)
    repeats = 5

    def read() -> Run:
        clock = Clock()
        for _ in range(repeats):
            weights.max()
        return clock.stop(repeats, [])

    return read


def _measure_case(
    case: Case, rounds: int, referee: "Referee", done: Callable[[], object]
) -> Iterator[Row]:
    runs: dict[str, list[Run]] = {name: [] for name in case.works}
    failures: dict[str, str] = {}
    for work in case.works.values() if case.name != MIXED else ():
        work()  # warm
    for _ in range(rounds):
        for name, work in case.works.items():
            try:
                runs[name] += [] if name in failures else [work()]
            except CannotRun as error:
                failures[name] = str(error)
            done()
    baselines = [name for name in runs if name not in (OURS, READ)]
    expected = runs[baselines[0]][0].tokens if baselines else None
    base = runs[OURS]
    for name, all_of_it in runs.items():
        if name in failures:
            yield Row(case.name, name, failure=failures[name])
            continue
        row = _summarize(case, name, all_of_it)
        if name == OURS:
            row = replace(row, num_close=max(referee.check(case, r, expected) for r in base))
        elif name != READ:
            found = [len(tokens) for run in all_of_it for tokens in run.tokens]
            assert found == rounds * [output for _, output in case.requests], f"{name} ended early"
            row = replace(row, **_ratios(all_of_it, base))
        if expected is not None and name != READ and name != baselines[0]:
            row = replace(row, num_alike=min(_num_alike(run, expected) for run in all_of_it))
        if READ in runs:
            fastest = 1 / _summarize(case, READ, runs[READ]).tokens_per_second
            row = replace(row, percent_of_read=100 * row.tokens_per_second * fastest)
        yield row


def _summarize(case: Case, name: str, runs: list[Run]) -> Row:
    seconds = statistics.median(run.seconds for run in runs)
    cpu_seconds = statistics.median(run.cpu_seconds for run in runs)
    num_tokens = runs[0].num_tokens
    return Row(
        case.name,
        name,
        num_tokens,
        seconds,
        cpu_seconds,
        num_tokens / seconds,
        num_tokens / max(cpu_seconds, 1e-9),
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


def _num_alike(run: Run, expected: list[list[int]]) -> int:
    return sum(a == b for a, b in zip(run.tokens, expected, strict=True))


# --------------------------------------------------------------------------------- the same tokens


@dataclass(frozen=True)
class Referee:
    """Compares the tokens of this library with a model that computes them in another way.

    Where `trusts` is true, tokens that the baseline also generated need no further check.
    """

    name: str
    shortfalls: Callable[[list[int], list[int]], list[float]]
    tolerance: float
    trusts: bool
    seen: dict[tuple[int, ...], list[float]] = field(default_factory=dict)

    def check(self, case: Case, run: Run, expected: list[list[int]] | None) -> int:
        """Count requests in which rounding decided. Raises WrongTokens for other differences."""
        num_close = 0
        for number, ((prompt, output), tokens) in enumerate(
            zip(case.requests, run.tokens, strict=True)
        ):
            if len(tokens) != output:
                raise WrongTokens(
                    f"{case.name}, request {number}: minipaged generated {len(tokens)} tokens "
                    f"instead of {output}, so its time is meaningless: report this as a bug."
                )
            if self.trusts and expected is not None and tokens == expected[number]:
                continue
            whole = (*prompt, *tokens)
            if whole not in self.seen:
                self.seen[whole] = self.shortfalls(prompt, tokens)
            short = self.seen[whole]
            for place, below in enumerate(short):
                if not below <= self.tolerance:  # written so that NaN is wrong too
                    raise WrongTokens(
                        f"{case.name}, request {number}: minipaged's token {place} is "
                        f"{tokens[place]}, which has a logit {below:.2g} below the likeliest by "
                        f"{self.name} (rounding explains {self.tolerance}), so its time is "
                        "meaningless: report this as a bug."
                    )
            num_close += self.trusts or max(short) > 0
        return num_close


def _choose_referee(
    folder: Path, dtype: str, workload: Workload, theirs: Transformers | None
) -> Referee:
    if dtype == "float32" and theirs is not None:
        return Referee("transformers", theirs.shortfalls, TOLERANCE[dtype], trusts=True)
    slow = Minipaged(folder, dtype, workload, backend="reference")
    return Referee("the reference backend", slow.shortfalls, TOLERANCE[dtype], trusts=False)
