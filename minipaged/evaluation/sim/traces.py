"""Arrivals and lengths of requests: traces like the paper's (section 6.1), or one from a file.

The paper draws lengths from ShareGPT (conversations with ChatGPT) and Alpaca (short instructions),
and arrivals from a Poisson process. It states only the means of the lengths. Here lengths are
lognormal and independent of each other, which its Figure 2 implies: see `fitted`. As in the paper,
requests longer than the context are left out; the means are those of the remaining requests.
"""

import csv
import re
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from math import log, nan, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from minipaged.errors import InvalidOption
from minipaged.evaluation.sim.fitted import ALPACA_OUTPUT_CV, SHAREGPT_OUTPUT_CV

CHAT_LIMIT = 1024  # tokens of a prompt and of an answer
CHAT_ROUNDS = 8
STRATA = 256
MOST_TOKENS = 10**9  # tokens of a request in a file
MOST_SECONDS = 1e11  # latest arrival in a file; as seconds since 1970, it is in the year 5138
SHORTEST = 4  # tokens; the normalised latency of a single token would be mostly waiting


@dataclass(frozen=True)
class TraceRequest:
    """One request of a trace: its arrival, prompt length and exact output length."""

    arrival: float  # seconds
    input_len: int  # tokens
    output_len: int
    prefix_len: int = 0  # leading tokens of the prompt that all requests of the trace share


@dataclass(frozen=True)
class Lengths:
    """Lognormal prompt and output lengths; means are those after requests too long are left out."""

    input_mean: float
    output_mean: float
    input_cv: float  # standard deviation over mean, before any is left out
    output_cv: float
    longest: int = 2048  # upper bound of prompt and output together

    def draw(self, num_requests: int, seed: int) -> list[tuple[int, int]]:
        """Return (prompt tokens, output tokens) of `num_requests` requests."""
        return self.draw_some(np.random.default_rng(seed), num_requests)

    def draw_some(self, random: np.random.Generator, num_requests: int) -> list[tuple[int, int]]:
        """The same, from a stream of random numbers.

        Sampling is stratified: every 256 lengths have one in each 256th part of the distribution,
        in random order. A few very long requests matter much, and so even a short trace contains
        its share of them. The first lengths are the same however many are drawn.
        """
        mu_in, mu_out = _calibrated(self)
        lengths: list[tuple[int, int]] = []
        while len(lengths) < num_requests:
            places = random.permuted(np.tile(np.arange(STRATA), (2, 1)), axis=1)
            shares = (places + random.random((2, STRATA))) / STRATA
            normal = np.vectorize(NormalDist().inv_cdf)(shares)
            lengths += zip(*_cut(self, mu_in, mu_out, normal).tolist(), strict=True)
        return lengths[:num_requests]


# The means are the paper's (Figure 11); the spread of inputs is assumed and has little effect.
WORKLOADS = {
    "sharegpt": Lengths(161.31, 337.99, 2.0, SHAREGPT_OUTPUT_CV),
    "alpaca": Lengths(19.31, 58.45, 0.6, ALPACA_OUTPUT_CV),
}


@cache
def _calibrated(lengths: Lengths) -> tuple[float, float]:
    """Find the means of the logarithms for which the remaining lengths have the wanted means."""
    normal = np.random.default_rng(0).standard_normal((2, 100_000))
    wanted = np.array([lengths.input_mean, lengths.output_mean])
    spread = np.array([_sigma(lengths.input_cv), _sigma(lengths.output_cv)])
    mu = np.log(wanted) - spread**2 / 2
    for _ in range(30):  # each cut lowers the mean a little: correct it, and repeat
        mu += np.log(wanted / _cut(lengths, mu[0], mu[1], normal).mean(1))
    return float(mu[0]), float(mu[1])


def _cut(
    lengths: Lengths, mu_in: float, mu_out: float, normal: "np.ndarray"
) -> "np.ndarray":  # [2, requests]
    inputs = np.exp(mu_in + _sigma(lengths.input_cv) * normal[0])
    outputs = np.exp(mu_out + _sigma(lengths.output_cv) * normal[1])
    both = np.maximum(SHORTEST, np.stack([inputs, outputs]).round()).astype(int)
    return both[:, both.sum(0) < lengths.longest]


def _sigma(cv: float) -> float:
    return sqrt(log(1 + cv * cv))


def poisson_trace(
    lengths: Lengths, rate: float, duration: float, seed: int = 0
) -> list[TraceRequest]:
    """Requests that arrive independently (Poisson), `rate` per second, for `duration` seconds."""
    random = np.random.default_rng(seed + 1000)
    gaps = random.exponential(1 / rate, int(rate * duration * 1.5) + 100)
    times = gaps.cumsum()
    times = times[times < duration]
    drawn = lengths.draw(len(times), seed)
    return [TraceRequest(t, *both) for t, both in zip(times.tolist(), drawn, strict=True)]


_DATE = re.compile(r"(\d+-\d+-\d+[ T]\d+:\d+:\d+)(\.\d+)?(Z|[+-]\d+:\d+)?")

# ---- real traces ---------------------------------------------------------------------------------

# Column names of arrival, input and output: ours, BurstGPT's, Azure's, and Vidur's copies of these.
COLUMNS = (
    ("arrival", "input", "output"),
    ("Timestamp", "Request tokens", "Response tokens"),
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    ("arrived_at", "num_prefill_tokens", "num_decode_tokens"),
)


def chat_trace(rate: float, duration: float, seed: int = 0) -> list[TraceRequest]:
    """Rounds of ShareGPT conversations, each prompt with all earlier rounds (section 6.4).

    Prompts are cut to their last 1,024 tokens, answers to their first 1,024. A request is any of
    the first eight rounds of its conversation with equal probability. That is a guess: the paper
    states only that most prompts have 1,024 tokens.
    """
    random = np.random.default_rng(seed + 2000)
    requests: list[TraceRequest] = []
    for first in poisson_trace(WORKLOADS["sharegpt"], rate, duration, seed):
        said = WORKLOADS["sharegpt"].draw_some(random, int(random.integers(0, CHAT_ROUNDS)))
        history = sum(question + answer for question, answer in said)
        prompt = min(CHAT_LIMIT, history + first.input_len)
        output = min(CHAT_LIMIT - 1, first.output_len)
        requests.append(TraceRequest(first.arrival, prompt, output))
    return requests


def read_trace(file: Path, longest: int | None = None) -> list[TraceRequest]:
    """Read the requests in a CSV file, in order of arrival, the first at time 0.

    Args:
        file: its first line names the columns (see COLUMNS, in any case). Times are seconds or
            dates; token counts are whole numbers.
        longest: requests with this many tokens or more are left out, as are those without a prompt
            or output.

    Raises:
        InvalidOption: columns are missing, a row is invalid, or no request is left.
    """
    try:
        requests = _read_rows(file)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidOption(f"{file} is not CSV in UTF-8: {error}.") from error
    kept = [
        r
        for r in sorted(requests, key=lambda r: r.arrival)
        if r.output_len > 0
        and r.input_len > 0
        and (longest is None or r.input_len + r.output_len < longest)
    ]
    if not kept:
        short = "" if longest is None else f", and fewer than {longest} tokens"
        raise InvalidOption(
            f"none of the {len(requests)} requests in {file} has a prompt and an output{short}."
        )
    start = kept[0].arrival
    return [TraceRequest(r.arrival - start, r.input_len, r.output_len) for r in kept]


def _read_rows(file: Path) -> list[TraceRequest]:
    with file.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines)
        header = list(reader.fieldnames or ())
        names = {name.strip().lower(): name for name in header}
        known = next((c for c in COLUMNS if all(name.lower() in names for name in c)), None)
        if known is None:
            wanted = "; or ".join(", ".join(c) for c in COLUMNS)
            raise InvalidOption(
                f"{file} has the columns {', '.join(header) or '(none)'}: give {wanted}."
            )
        if len(names) < len(header):
            raise InvalidOption(f"{file} names a column twice: rename or remove one of them.")
        columns = [names[name.lower()] for name in known]
        return [_read_row(file, reader.line_num, row, columns) for row in reader]


def _read_row(
    file: Path, line: int, row: dict[str | None, Any], columns: list[str]
) -> TraceRequest:
    """Parse one request. Raises InvalidOption with the line and column of an invalid value."""
    here = f"{file}, line {line}"
    if any(row.get(None) or ()):
        raise InvalidOption(f"{here} has more values than the header has columns: correct it.")
    arrival, *lengths = ((name.strip(), (row[name] or "").strip()) for name in columns)
    return TraceRequest(_read_time(here, *arrival), *(_read_count(here, *n) for n in lengths))


def _read_count(here: str, column: str, text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = nan
    if not (0 <= number <= MOST_TOKENS and number == int(number)):
        raise InvalidOption(
            f"{here}: {column} is {text!r}, but must be a whole number of tokens, from 0 to "
            f"{MOST_TOKENS:,}."
        )
    return int(number)


def _read_time(here: str, column: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        return _read_date(here, column, text)
    if seconds > MOST_SECONDS:
        raise InvalidOption(
            f"{here}: {column} is {text}, which in seconds is thousands of years: if these are "
            "milliseconds since 1970 or less, divide them to give seconds."
        )
    if not seconds >= 0:
        raise InvalidOption(f"{here}: {column} is {text}: give seconds from 0 up, or a date.")
    return seconds


def _read_date(here: str, column: str, text: str) -> float:
    """Convert a date to seconds since 1970, with or without a zone, with any number of decimals."""
    found = _DATE.fullmatch(text)
    try:
        if found is None:
            raise ValueError("of another form")
        whole, fraction, zone = found.groups()
        zone = "+00:00" if zone in (None, "Z") else zone
        return datetime.fromisoformat(whole + zone).timestamp() + float(fraction or 0)
    except (ValueError, OverflowError) as error:
        raise InvalidOption(
            f"{here}: {column} is {text!r}: give seconds, or a date such as 2024-01-31 13:45:00.5."
        ) from error


def mean_lengths(trace: list[TraceRequest]) -> tuple[float, float]:
    """Mean prompt and output lengths of a trace, in tokens."""
    n = max(1, len(trace))
    return sum(r.input_len for r in trace) / n, sum(r.output_len for r in trace) / n
