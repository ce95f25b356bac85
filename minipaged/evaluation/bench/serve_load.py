"""The load of `minipaged bench serve`: requests and their arrivals.

Arrivals are a Poisson process, as in the paper (section 6.1). Prompts are random token ids, so that
their lengths are exact and no prompt is found in the prefix cache by accident.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

import numpy as np

from minipaged.errors import InvalidOption
from minipaged.evaluation.sim.traces import Lengths, read_trace
from minipaged.utils.counts import counted

FIRST_TOKEN = 10  # ids below this are control tokens in many vocabularies
SHORTEST = 8  # average tokens; shorter lengths cannot vary much


@dataclass(frozen=True)
class LoadRequest:
    """One request of the load."""

    arrival: float  # seconds after the start
    prompt: list[int]  # token ids
    output_len: int  # tokens, exactly


@dataclass(frozen=True)
class Workload:
    """The lengths of prompts and outputs, and their shared prefixes. Raises InvalidOption."""

    num_requests: int = 100
    input_len: float = 64  # tokens without the shared prefix; the mean if lengths vary
    output_len: float = 64
    spread: float = 0.0  # standard deviation over mean; 0: all are equally long
    prefix_groups: int = 0  # number of groups; requests of a group share a prefix ...
    prefix_len: int = 0  # ... of this many tokens
    vocab_size: int = 500
    max_model_len: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        whole = self.prefix_len + self.input_len + self.output_len
        if self.max_model_len is not None and whole > self.max_model_len:
            raise InvalidOption(
                f"a request has {whole:g} tokens, prompt and output together, but the model "
                f"supports {self.max_model_len}: lower --input-len, --output-len or the prefix."
            )
        if not self.spread:
            return
        if min(self.input_len, self.output_len) < SHORTEST:
            raise InvalidOption(f"--spread needs mean lengths of at least {SHORTEST} tokens.")
        if self.max_model_len is not None and 2 * whole > self.max_model_len + self.prefix_len:
            raise InvalidOption(
                f"with --spread, a request may have at most half of the model's "
                f"{self.max_model_len} tokens on average, but has {whole:g}: lower --input-len or "
                "--output-len."
            )

    def describe(self) -> str:
        """A phrase that describes the workload."""
        mean = " on average" if self.spread else ""
        phrase = f"{self.input_len:g} prompt tokens and {self.output_len:g} output tokens{mean}"
        if self.prefix_groups:
            groups = counted(self.prefix_groups, "group")
            phrase += f", after a prefix of {self.prefix_len} tokens shared within {groups}"
        return phrase

    def requests(self, rate: float, run: int = 0) -> list[LoadRequest]:
        """Make requests that arrive at this mean rate per second; inf: all at once.

        Args:
            run: number of the run. Each has its own prompts, so that none is in the prefix cache
                from another run. Lengths are the same in all runs, and so are the gaps between
                arrivals, scaled by the rate.
        """
        random = np.random.default_rng((self.seed, 0))
        gaps = random.exponential(1.0, self.num_requests)
        arrivals = gaps.cumsum() / rate if rate != inf else np.zeros(self.num_requests)
        return _with_prompts(arrivals.tolist(), self._lengths(), self, run)

    def _lengths(self) -> list[tuple[int, int]]:
        if not self.spread:
            return [(int(self.input_len), int(self.output_len))] * self.num_requests
        most = (self.max_model_len or 2**20) - self.prefix_len
        lengths = Lengths(self.input_len, self.output_len, self.spread, self.spread, most)
        return lengths.draw(self.num_requests, self.seed)


def requests_of_trace(
    file: Path, workload: Workload, num_requests: int | None, speed_up: float, run: int = 0
) -> list[LoadRequest]:
    """Make requests from the arrivals and lengths of a CSV file; see `read_trace` for errors.

    Args:
        workload: generates the prompts. Requests that are too long for it are left out.
        num_requests: only the first ones; None: all.
        speed_up: divides the times of arrival.
    """
    longest = None
    if workload.max_model_len is not None:
        longest = workload.max_model_len + 1 - workload.prefix_len
    kept = read_trace(file, longest)[:num_requests]
    arrivals = [each.arrival / speed_up for each in kept]
    return _with_prompts(arrivals, [(r.input_len, r.output_len) for r in kept], workload, run)


def _with_prompts(
    arrivals: Sequence[float], lengths: Sequence[tuple[int, int]], workload: Workload, run: int
) -> list[LoadRequest]:
    random = np.random.default_rng((workload.seed, 1, run))

    def draw(num_tokens: int) -> list[int]:
        return random.integers(FIRST_TOKEN, workload.vocab_size, num_tokens).tolist()

    prefixes = [draw(workload.prefix_len) for _ in range(workload.prefix_groups)] or [[]]
    return [
        LoadRequest(arrival, prefixes[i % len(prefixes)] + draw(input_len), output_len)
        for i, (arrival, (input_len, output_len)) in enumerate(zip(arrivals, lengths, strict=True))
    ]
