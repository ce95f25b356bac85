"""Load on a server: streaming completions, each timed and checked as its tokens arrive.

There are two kinds of load. Open: each request is sent when it is due, as by users. Closed: a fixed
number of requests is open at any time, and the next is sent when one has ended. In an open load,
latency is measured from the moment when a request was due, so a late client cannot hide a slow
server.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import h11

from minipaged.evaluation.bench.serve_http import Connection, Target
from minipaged.evaluation.bench.serve_load import LoadRequest
from minipaged.utils.counts import counted

TOO_MANY = 429
UNFINISHED = "not finished when the run was ended"


@dataclass
class Served:
    """The client's record of one request. Times are of `time.perf_counter`."""

    request: LoadRequest
    due: float  # when it should be sent
    sent: float | None = None
    chunk_times: list[float] = field(default_factory=list[float])  # of chunks with tokens
    token_ids: list[int] = field(default_factory=list[int])  # empty where they are not reported
    finished: float | None = None  # the last token's time, if the response was complete
    status: int | None = None
    error: str | None = None  # why it was not served
    fault: str | None = None  # the fault of a response that looked complete
    usage: dict[str, Any] | None = None

    @property
    def is_good(self) -> bool:
        """Whether it was served with the requested number of tokens."""
        return self.error is None and self.fault is None

    @property
    def num_cached(self) -> int:
        """Tokens of the prompt that the server found in its prefix cache."""
        details = (self.usage or {}).get("prompt_tokens_details") or {}
        return details.get("cached_tokens") or 0

    @property
    def ttft(self) -> float:
        """Time to first token, in seconds."""
        return self.chunk_times[0] - self.due

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, in seconds; None for a single token."""
        after_first = self.request.output_len - 1
        return (self.chunk_times[-1] - self.chunk_times[0]) / after_first if after_first else None

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies, in seconds: the gaps between chunks with tokens."""
        times = self.chunk_times
        return [later - earlier for earlier, later in pairwise(times)]

    def normalized_latency(self, now: float) -> float:
        """Seconds from arrival to the end, per output token (section 6.1).

        Args:
            now: the assumed end of an unfinished request, which gives a lower bound.
        """
        return ((self.finished or now) - self.due) / self.request.output_len


def find_fault(served: Served, ends: list[str]) -> str | None:
    """The fault of a response whose stream has ended.

    Args:
        ends: the finish reasons, [DONE], and anything after it, in order of arrival.
    """
    asked, received = served.request.output_len, len(served.token_ids)
    if ends[-1:] != ["[DONE]"] or ends.count("[DONE]") != 1:
        return "the stream does not end with [DONE]"
    if ends[:-1] != ["length"]:
        return f"the finish reasons are {ends[:-1]}, not a single 'length'"
    if served.usage is None:
        return "the stream has no usage"
    prompt, output = (served.usage.get(f"{kind}_tokens") for kind in ("prompt", "completion"))
    if received and received != output:
        return f"{counted(received, 'token')} received, but the usage reports {output}"
    if output != asked:
        return f"{counted(asked, 'token')} requested, but the usage reports {output}"
    if prompt != len(served.request.prompt):
        return f"a prompt of {len(served.request.prompt)} tokens, but the usage reports {prompt}"
    return None if served.chunk_times else "no chunk contains a token"


class Client:
    """Sends requests to one server.

    Args:
        keep_alive: reuse connections; otherwise, one connection per request.
    """

    def __init__(self, target: Target, keep_alive: bool = False) -> None:
        self._target = target
        self._keep_alive = keep_alive
        self._idle: list[Connection] = []
        end = [] if keep_alive else [("Connection", "close")]
        self._headers = [*target.headers(), ("Content-Type", "application/json"), *end]

    async def serve(self, served: Served) -> None:
        """Send a request and read its response; record the result in `served`, including errors."""
        body = self._body(served.request)
        connection = None
        try:
            connection = self._take_idle() or await Connection.open(self._target)
            served.sent = time.perf_counter()
            path = f"{self._target.path}/v1/completions"
            served.status = await connection.send("POST", path, self._headers, body)
            if served.status == 200:
                await self._read(connection, served)
            else:
                text = b"".join([data async for data in connection.body()])
                served.error = f"{served.status}: {text[:200].decode(errors='replace')}"
            if self._keep_alive and connection.can_be_reused():
                self._idle.append(connection)
                connection = None
        except (OSError, h11.RemoteProtocolError) as error:
            served.error = f"{type(error).__name__}: {error}"
        except asyncio.CancelledError:
            served.error = UNFINISHED
            raise
        finally:
            if connection is not None:
                connection.close()

    def _take_idle(self) -> Connection | None:
        """A kept connection that the server has not closed, if any."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed_by_peer():
                return connection
            connection.close()
        return None

    def _body(self, request: LoadRequest) -> bytes:
        body = {
            "model": self._target.model,
            "prompt": request.prompt,
            "max_tokens": request.output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,  # vLLM's extension; where it is unknown, the usage counts
        }
        return json.dumps(body).encode()

    async def _read(self, connection: Connection, served: Served) -> None:
        ends: list[str] = []
        async for data in connection.events():
            now = time.perf_counter()
            if "[DONE]" in ends:
                ends.append("more")
            if data == b"[DONE]":
                ends.append("[DONE]")
                continue
            try:
                chunk: dict[str, Any] = json.loads(data)
                _note_chunk(served, chunk, ends, now)
            except (ValueError, TypeError, AttributeError, KeyError):
                served.fault = f"an invalid chunk: {data[:100]!r}"
                return
        if served.error is None:
            served.fault = find_fault(served, ends)
        if served.is_good:
            served.finished = served.chunk_times[-1]

    def close(self) -> None:
        """Close the connections that are kept."""
        for connection in self._idle:
            connection.close()


def _note_chunk(served: Served, chunk: dict[str, Any], ends: list[str], now: float) -> None:
    if "error" in chunk:
        served.error = str(chunk["error"].get("message"))[:200]
        return
    served.usage = chunk.get("usage") or served.usage
    for choice in chunk["choices"]:
        ids: list[int] = choice.get("token_ids") or []
        served.token_ids += ids
        if ids or choice.get("text"):
            served.chunk_times.append(now)
        if choice.get("finish_reason") is not None:
            ends.append(choice["finish_reason"])


async def run_load(
    client: Client,
    requests: list[LoadRequest],
    concurrency: int | None = None,
    give_up: float | None = None,
    note_end: Callable[[], object] = lambda: None,
) -> list[Served]:
    """Send all requests, wait for their responses, and return their records in order.

    Args:
        concurrency: the number of open requests in a closed load, which ignores arrivals; None: an
            open load.
        give_up: abort unfinished requests this many seconds after the last arrival.
        note_end: called as each request ends.
    """
    start = time.perf_counter()
    results = [Served(request, start + request.arrival) for request in requests]

    async def send(served: Served) -> None:
        await client.serve(served)
        note_end()

    async def send_next(waiting: Iterator[Served]) -> None:
        for served in waiting:
            served.due = time.perf_counter()
            await send(served)

    async def send_when_due() -> None:
        async with _Tasks() as tasks:
            for served in results:
                if (wait := served.due - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                tasks.start(send(served))

    async def send_so_many_at_a_time(number: int) -> None:
        waiting = iter(results)
        async with _Tasks() as tasks:
            for _ in range(number):
                tasks.start(send_next(waiting))

    load = send_when_due() if concurrency is None else send_so_many_at_a_time(concurrency)
    last = max((request.arrival for request in requests), default=0.0)
    try:
        await asyncio.wait_for(load, None if give_up is None else last + give_up)
    except asyncio.TimeoutError:
        for served in results:
            if served.finished is None and served.error is None:
                served.error = UNFINISHED
    return results


class _Tasks:
    """Waits for its tasks, and cancels them if it is left early."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, work: Any) -> None:
        self._tasks.append(asyncio.ensure_future(work))

    async def __aenter__(self) -> "_Tasks":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                await asyncio.gather(*self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
