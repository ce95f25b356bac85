"""The latency of /health while a server works on something large.

The event loop answers /health. Anything that blocks the loop (parsing a huge body, tokenizing a
long text, outputs of many streams) shows in the slowest of many responses.
"""

import json
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from statistics import quantiles
from typing import Any

from rich.table import Table

from minipaged.evaluation.bench.serve_http import Target

BODY_BYTES = 2**20
PAUSE_SECONDS = 0.005  # seconds between two requests
BOUND_MS = 100.0
TEXT = "Once upon a time there was a frog who lived by the river. "


def large_bodies() -> dict[str, tuple[str, dict[str, Any]] | None]:
    """Maps descriptions to an endpoint and a body of about 1 MB; None: only the streams."""
    text = (TEXT * (BODY_BYTES // len(TEXT) + 1))[:BODY_BYTES]
    turns = [{"role": "user", "content": TEXT}] * (BODY_BYTES // 90)
    return {
        "only the streams": None,
        "/tokenize a text": ("/tokenize", {"prompt": text}),
        "/tokenize one letter": ("/tokenize", {"prompt": "a" * BODY_BYTES}),
        "completion of a text": ("/v1/completions", {"prompt": text, "max_tokens": 1}),
        "completion of its end": (
            "/v1/completions",
            {"prompt": text, "max_tokens": 1, "truncate_prompt_tokens": 100},
        ),
        "completion of token ids": (
            "/v1/completions",
            {"prompt": [300] * (BODY_BYTES // 5), "max_tokens": 1},
        ),
        "chat with many turns": ("/v1/chat/completions", {"messages": turns, "max_tokens": 1}),
        "/detokenize": ("/detokenize", {"tokens": [300] * (BODY_BYTES // 5)}),
    }


@dataclass(frozen=True)
class Row:
    """One kind of body."""

    handles: str
    num_bodies: int
    num_answers: int
    median_ms: float
    p99_ms: float
    largest_ms: float


def measure(target: Target, num_streams: int, num_bodies: int) -> list[Row]:
    """Request /health repeatedly, while streams run and large bodies arrive."""
    stop = threading.Event()
    streams = [
        threading.Thread(target=_stream, args=[target, stop], daemon=True)
        for _ in range(num_streams)
    ]
    for each in streams:
        each.start()
    time.sleep(1.0)
    try:
        return [
            _measure_while(target, name, sent, num_bodies) for name, sent in large_bodies().items()
        ]
    finally:
        stop.set()
        for each in streams:
            each.join()


def _measure_while(
    target: Target, name: str, sent: tuple[str, dict[str, Any]] | None, num_bodies: int
) -> Row:
    done = threading.Event()

    def send() -> None:
        for _ in range(num_bodies):
            if sent is None:
                time.sleep(0.3)
            else:
                _post(target, *sent)
        done.set()

    threading.Thread(target=send, daemon=True).start()
    seconds: list[float] = []
    connection = HTTPConnection(target.host, target.port, timeout=60)
    while not done.is_set() or len(seconds) < 100:
        start = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        seconds.append(time.perf_counter() - start)
        time.sleep(PAUSE_SECONDS)
    connection.close()
    cuts = quantiles(seconds, n=100)
    return Row(name, num_bodies, len(seconds), 1e3 * cuts[49], 1e3 * cuts[98], 1e3 * max(seconds))


def _stream(target: Target, stop: threading.Event) -> None:
    """One reader of endless streams."""
    body = {"prompt": TEXT, "max_tokens": 500, "ignore_eos": True, "stream": True}
    while not stop.is_set():
        with suppress(OSError, HTTPException):
            _post(target, "/v1/completions", body, stop)


def _post(
    target: Target, path: str, body: Mapping[str, Any], stop: threading.Event | None = None
) -> None:
    connection = HTTPConnection(target.host, target.port, timeout=60)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", target.path + path, json.dumps(body), headers)
    response = connection.getresponse()
    while response.read(2**16) and not (stop is not None and stop.is_set()):
        pass
    connection.close()


def as_table(rows: list[Row]) -> Table:
    """The rows for a terminal."""
    table = Table(title="Milliseconds until /health answers")
    table.add_column("while the server handles")
    for column in ("bodies", "answers", "median", "p99", "largest"):
        table.add_column(column, justify="right")
    for row in rows:
        numbers = (f"{value:.1f}" for value in (row.median_ms, row.p99_ms, row.largest_ms))
        table.add_row(row.handles, str(row.num_bodies), str(row.num_answers), *numbers)
    return table
