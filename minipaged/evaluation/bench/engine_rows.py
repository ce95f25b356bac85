"""The runs of `minipaged bench engine` become rows: medians, ratios, and checked tokens."""

import statistics
from dataclasses import dataclass, replace

from minipaged.evaluation.bench.engine_process import Entry, Run
from minipaged.evaluation.bench.engine_referee import TOLERANCE, Referee, WrongTokens
from minipaged.evaluation.bench.engine_report import READ, Row
from minipaged.evaluation.bench.engine_sides import OURS
from minipaged.evaluation.bench.engine_workload import Case


@dataclass(frozen=True)
class Results:
    """The runs of a case, which become rows."""

    case: Case
    entries: list[Entry]
    runs: dict[str, list[Run]]
    failures: dict[str, str]
    dtype: str
    referee: Referee

    def rows(self) -> list[Row]:
        """One row per entry. Raises WrongTokens if this library's tokens are wrong."""
        ours, *theirs = self.entries
        peers = [self._peer_row(entry) for entry in theirs]  # first: the wrong ones are not trusted
        rows = [self._row(ours), *peers]
        if READ in self.runs:
            rows.append(replace(self._summary(READ), percent_of_read=100.0))
        return rows

    def _peer_row(self, entry: Entry) -> Row:
        if entry.name not in self.failures:
            try:
                return self._row(entry)
            except WrongTokens as error:
                self.failures[entry.name] = str(error)
        failure = self.failures[entry.name]
        return Row(self.case.name, entry.name, failure=failure, **entry.engine.about)

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
