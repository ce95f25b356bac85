"""Results that wait for a reader, and the queue of requests that wait to be scheduled."""

import asyncio
from collections.abc import AsyncIterator, Callable
from enum import Enum

from minipaged.engine.arrivals import CheckedRequest
from minipaged.engine.outputs import Progress, RequestOutput
from minipaged.errors import InvalidRequest, QueueFull
from minipaged.utils.counts import counted


class Stage(Enum):
    """The state of a request that has no tokens yet."""

    ACCEPTED = 1
    SCHEDULED = 2


class ClientLeft(Exception):
    """The client has closed the connection before its response was complete."""


Result = Progress | Exception | Stage


class Stream:
    """Yields the progress of one caller's requests, until all have finished.

        async for news in stream:
            for index, progress in news: ...

    Closing it aborts the requests that have not finished.

    Args:
        requests: by their ids in the engine.
        queue: counts them until they are scheduled.
        abort: ends the request with this id, unless it has ended.
    """

    def __init__(
        self, requests: dict[str, CheckedRequest], queue: "Queue", abort: Callable[[str], None]
    ) -> None:
        self.request_ids = list(requests)
        self.requests = list(requests.values())
        self._queue = queue
        self._abort = abort
        self._not_accepted = set(range(len(requests)))
        self._not_scheduled = set(range(len(requests)))
        self._not_finished = set(range(len(requests)))
        self._unread: dict[int, list[Progress]] = {}
        self._error: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()  # set by a result or an error

    async def accepted(self) -> None:
        """Wait until the engine has accepted all requests. Raises the error of a refused one."""
        while self._not_accepted and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Progress]]]:
        """Yield new progress. Raises the error that ended a request: RequestFailed, EngineDead."""
        while True:
            while not self._unread and self._error is None and self._not_finished:
                await self._wait()
            if self._error is not None:
                raise self._error
            if not self._unread:
                return
            news, self._unread = self._unread, {}
            yield [(index, Progress.joined(steps)) for index, steps in news.items()]

    async def results(self) -> list[RequestOutput]:
        """Wait until all have finished. Raises the error that ended one of them."""
        outputs: dict[int, RequestOutput] = {}
        async for news in self:
            outputs.update((index, each.build_output()) for index, each in news if each.finished)
        return [output for _, output in sorted(outputs.items())]

    def put(self, index: int, result: Result) -> None:
        """Store a result of the engine for the reader."""
        if isinstance(result, Exception):
            return self.fail(result)
        self._not_accepted.discard(index)
        if result is not Stage.ACCEPTED:
            self._leave_queue(index)
        if isinstance(result, Progress):
            self._unread.setdefault(index, []).append(result)
            if result.finished:
                self._not_finished.discard(index)
                if not self._not_finished:
                    self._stop_timer()  # finished in time, even if its reader is slow
        return self._news.set()

    def fail(self, error: Exception) -> None:
        """End the stream with this error, unless it has ended."""
        self._error = self._error or error
        self.close()
        self._news.set()

    def fail_after(self, seconds: float, passed: float = 0.0) -> None:
        """Abort unfinished requests after this time, of which `passed` seconds are over."""
        error = TimeoutError(f"the request took longer than {seconds} seconds and was aborted.")
        self._timer = asyncio.get_running_loop().call_later(seconds - passed, self.fail, error)

    def close(self) -> None:
        """Abort the requests that have not finished."""
        self._stop_timer()
        for index, request_id in enumerate(self.request_ids):
            self._abort(request_id)
            self._leave_queue(index)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _leave_queue(self, index: int) -> None:
        if index in self._not_scheduled:
            self._not_scheduled.remove(index)
            request = self.requests[index]
            self._queue.leave(request.width, len(request.prompt.token_ids))

    async def _wait(self) -> None:
        self._news.clear()
        await self._news.wait()


class Queue:
    """Counts the requests that wait to be scheduled for the first time, and their tokens."""

    def __init__(self, max_requests: int, max_tokens: int | None) -> None:
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.num_requests = self.num_tokens = 0

    def enter(self, num_requests: int) -> None:
        """Count new requests. Raises QueueFull, or InvalidRequest for more than can ever wait."""
        most = self.max_requests
        _refuse_excess(num_requests, self.num_requests, most, "sequence", "max_queued")
        self.num_requests += num_requests

    def add_tokens(self, num_tokens: int) -> None:
        """Count the prompt tokens of new requests. Raises QueueFull or InvalidRequest."""
        most = self.max_tokens
        if most is not None:
            _refuse_excess(num_tokens, self.num_tokens, most, "prompt token", "max_queued_tokens")
        self.num_tokens += num_tokens

    def leave(self, num_requests: int, num_tokens: int) -> None:
        """Remove requests from the counts, once they are scheduled or have ended."""
        self.num_requests -= num_requests
        self.num_tokens -= num_tokens


def _refuse_excess(num_new: int, num_waiting: int, most: int, noun: str, option: str) -> None:
    new = counted(num_new, noun)
    if num_new > most:
        raise InvalidRequest(
            f"the request has {new}, but at most {most} may wait ({option}): ask for fewer."
        )
    if num_waiting + num_new > most:
        raise QueueFull(
            f"{num_waiting} of at most {most} {noun}s are waiting ({option}), and this request has "
            f"{new}: send it again later."
        )
