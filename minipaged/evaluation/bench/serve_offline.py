"""The cost of a server: the same requests over HTTP and by `LLM.generate`, in turn.

`minipaged bench serve --against-offline`. Each side is a separate process with the same options;
the client is a third. Rounds alternate, and only ratios within a round are compared. Run as a
program, this module is the offline process.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.table import Table

from minipaged.errors import MinipagedError
from minipaged.evaluation.bench.asked_process import AskedProcess, answer
from minipaged.evaluation.bench.serve import How, run_once
from minipaged.evaluation.bench.serve_client import Client, Served, run_load
from minipaged.evaluation.bench.serve_http import Target
from minipaged.evaluation.bench.serve_load import LoadRequest, Workload

if TYPE_CHECKING:
    from minipaged.llm import LLM

MOST_CPU_RATIO = 1.10  # server over offline
MOST_ADDED_MS = 3.0  # ms added to the time to first token, at idle
IDLE_REQUESTS = 30
IDLE_TOKENS = 2  # tokens of each request; only the first is timed
CLOSE = 1e-3  # log-probability; between tokens closer than this, rounding decides


class WrongTokens(MinipagedError):
    """A server and the library generated different tokens, so times cannot be compared."""


@dataclass(frozen=True)
class Round:
    """The same requests on both sides, in seconds."""

    server_cpu: float
    offline_cpu: float
    server: float
    offline: float

    @property
    def cpu_ratio(self) -> float:
        """The ratio of server to offline."""
        return self.server_cpu / max(self.offline_cpu, 1e-9)


@dataclass(frozen=True)
class Comparison:
    """The cost that serving over HTTP adds."""

    rounds: list[Round]
    cpu_ratio: float  # median of the rounds
    seconds_ratio: float
    idle_server_ms: float  # time to first token of one request alone, median
    idle_offline_ms: float
    idle_added_ms: float  # median of the differences, pair by pair
    num_requests: int  # number of compared requests
    num_close: int  # of these, those in which rounding decided between two tokens

    @property
    def is_within_bounds(self) -> bool:
        """Whether both bounds are met."""
        return self.cpu_ratio <= MOST_CPU_RATIO and self.idle_added_ms <= MOST_ADDED_MS

    def as_table(self) -> Table:
        """The figures as a table."""
        table = Table(box=None, padding=(0, 1), pad_edge=False)
        for title in ("", "server", "offline", "ratio", "bound"):
            table.add_column(title, justify="right" if title else "left", no_wrap=True)
        for number, each in enumerate(self.rounds, 1):
            table.add_row(
                f"round {number}, CPU seconds",
                f"{each.server_cpu:.2f}",
                f"{each.offline_cpu:.2f}",
                f"{each.cpu_ratio:.3f}",
            )
        bound = _bound(self.cpu_ratio, MOST_CPU_RATIO, "")
        table.add_row("CPU seconds, median ratio", "", "", f"{self.cpu_ratio:.3f}", bound)
        table.add_row("wall-clock, median ratio", "", "", f"{self.seconds_ratio:.3f}", "")
        table.add_row(
            "TTFT at idle, ms",
            f"{self.idle_server_ms:.2f}",
            f"{self.idle_offline_ms:.2f}",
            f"+{self.idle_added_ms:.2f}",
            _bound(self.idle_added_ms, MOST_ADDED_MS, " ms"),
        )
        return table


def _bound(value: float, most: float, unit: str) -> str:
    return f"{most:g}{unit}: {'met' if value <= most else 'MISSED'}"


async def compare(
    target: Target,
    offline: AskedProcess,
    workload: Workload,
    rounds: int,
    note_end: Callable[[], object] = lambda: None,
) -> Comparison:
    """Measure both sides in turn. Raises WrongTokens."""
    measured: list[Round] = []
    num_close = 0
    for number in range(rounds + 1):  # round 0 warms up both
        requests = workload.requests(float("inf"), number)
        asked = [(each.prompt, each.output_len) for each in requests]
        first = offline.ask("generate", requests=asked) if number % 2 else None
        row, results = await run_once(target, requests, How())
        answer = first or offline.ask("generate", requests=asked)
        num_close += check_tokens(offline, results, answer["tokens"])
        if number:
            assert row.server_cpu_seconds is not None, "/metrics has no process_cpu_seconds_total"
            times = (row.server_cpu_seconds, answer["cpu_seconds"], row.seconds, answer["seconds"])
            measured.append(Round(*times))
        note_end()
    idle = await _compare_at_idle(target, offline, workload, rounds + 1)
    return Comparison(
        measured,
        statistics.median(each.cpu_ratio for each in measured),
        statistics.median(each.server / each.offline for each in measured),
        statistics.median(server for server, _ in idle),
        statistics.median(alone for _, alone in idle),
        statistics.median(server - alone for server, alone in idle),
        workload.num_requests * (rounds + 1),
        num_close,
    )


async def _compare_at_idle(
    target: Target, offline: AskedProcess, workload: Workload, run: int
) -> list[tuple[float, float]]:
    """Milliseconds to the first token, server and offline, of one request alone at a time."""
    pairs: list[tuple[float, float]] = []
    client = Client(target)
    drawn = [each for i in range(IDLE_REQUESTS) for each in workload.requests(1.0, run + i)[:1]]
    for each in drawn:
        request = LoadRequest(0.0, each.prompt, IDLE_TOKENS)
        [served] = await run_load(client, [request], concurrency=1)
        answer = offline.ask("first", requests=[(request.prompt, request.output_len)])
        check_tokens(offline, [served], answer["tokens"])
        pairs.append((1000 * served.ttft, 1000 * answer["seconds"]))
    return pairs


def check_tokens(offline: AskedProcess, results: list[Served], expected: list[list[int]]) -> int:
    """Count the requests in which rounding decided between two tokens. Raises WrongTokens."""
    num_close = 0
    for number, (served, tokens) in enumerate(zip(results, expected, strict=True)):
        if not served.is_good:
            raise WrongTokens(f"request {number} was not served: {served.error or served.fault}")
        if served.token_ids == tokens:
            continue
        pairs = enumerate(zip(served.token_ids, tokens, strict=True))
        place = next((at for at, (a, b) in pairs if a != b), 0)
        context = served.request.prompt + tokens[:place]
        a, b = served.token_ids[place], tokens[place]
        gap = offline.ask("gap", prompt=context, tokens=[a, b])["gap"]
        if not gap <= CLOSE:
            raise WrongTokens(
                f"request {number}: token {place} is {a} from the server, but {b} offline, which "
                f"is likelier by a log-probability of {gap:.2g} (rounding explains {CLOSE})."
            )
        num_close += 1
    return num_close


# ---- the offline process -------------------------------------------------------------------------


def _generate(llm: "LLM", requests: list[tuple[list[int], int]]) -> dict[str, Any]:
    prompts, params = _as_ours(requests)
    begin, cpu_begin = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    times = {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu_begin,
    }
    return {**times, "tokens": [each.outputs[0].token_ids for each in outputs]}


def _first(llm: "LLM", requests: list[tuple[list[int], int]]) -> dict[str, Any]:
    begin = time.perf_counter()
    seconds, tokens = None, list[int]()
    for _, output in llm.stream(*_as_ours(requests)):
        seconds = seconds or time.perf_counter() - begin
        tokens = output.outputs[0].token_ids
    return {"seconds": seconds, "tokens": [tokens]}


def _gap(llm: "LLM", prompt: list[int], tokens: list[int]) -> dict[str, Any]:
    """The difference between the log-probabilities of two next tokens."""
    from minipaged.sampling import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=20)
    [output] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    [found] = output.outputs[0].logprobs or []
    a, b = (found[each].logprob if each in found else float("-inf") for each in tokens)
    return {"gap": abs(a - b)}


def _as_ours(requests: list[tuple[list[int], int]]) -> tuple[list[Any], list[Any]]:
    from minipaged.sampling import SamplingParams

    return [{"prompt_token_ids": prompt} for prompt, _ in requests], [
        SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        for _, output in requests
    ]


def main(options: dict[str, Any]) -> None:
    """The offline process."""
    from minipaged.llm import LLM

    llm = LLM(**options)
    ways = {"generate": _generate, "first": _first, "gap": _gap}
    answer({name: partial(way, llm) for name, way in ways.items()})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
