"""The async engine over an engine whose steps a test allows: what reaches which caller, when."""

import asyncio
import math
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from minipaged import SamplingParams
from minipaged.engine.arrivals import CheckedRequest
from minipaged.engine.outputs import NewTokens, Progress
from minipaged.errors import (
    EngineDead,
    InvalidRequest,
    QueueFull,
    RequestFailed,
    ServerClosing,
    WorkerLost,
)
from minipaged.serving import async_engine
from minipaged.serving.async_engine import AsyncEngine
from minipaged.tokenizer.prompts import TokenizedPrompt
from minipaged.worker.executor import UniExecutor


class Fault(Exception):
    """What a part of a test's engine raises."""


class OneTokenPerStep:
    """Gives each request one token per step, until it has as many as it may have.

    It has work only as long as the test allows more steps. `hooks` are called by its methods.
    """

    def __init__(self, **hooks: Callable) -> None:
        self.listeners = []
        self.executor = UniExecutor()
        self.open: dict[str, tuple[int, int]] = {}  # tokens so far, tokens in the end
        self.aborted: list[str] = []
        self.num_steps = self.num_allowed = 0
        self.calls: set[int] = set()  # the threads that called
        self.wake: Callable[[], None] = lambda: None
        self.hooks = hooks

    def has_unfinished_requests(self) -> bool:
        return bool(self.open) and self.num_steps < self.num_allowed

    def add_request(self, request_id: str, request: CheckedRequest) -> None:
        self.hooks.get("add", lambda _: None)(request_id)
        self.open[request_id] = 0, request.params.max_tokens

    def abort_request(self, request_id: str):
        found = self.open.pop(request_id, None)
        self.aborted.append(request_id)
        self.hooks.get("abort", lambda _: None)(request_id)
        return None if found is None else SimpleNamespace(request_id=request_id, outputs=[])

    def step(self) -> list[Progress]:
        self.calls.add(threading.get_ident())
        self.num_steps += 1
        self.hooks.get("step", lambda _: None)(self.num_steps)
        groups = [(SimpleNamespace(request_id=each), None, 1, True) for each in self.open]
        for listener in self.listeners:
            listener(SimpleNamespace(sequences=groups), None)
        return [self.advance(request_id) for request_id in list(self.open)]

    def advance(self, request_id: str) -> Progress:
        before, most = self.open[request_id]
        self.open[request_id] = before + 1, most
        ends = before + 1 == most
        if ends:
            del self.open[request_id]
        new = NewTokens(0, [before], f"{before} ", None, "length" if ends else None)
        return Progress(request_id, [new], ends, lambda: SimpleNamespace(text=texts(most)))

    def allow(self, steps: float = math.inf) -> None:
        """Allow this many more steps."""
        self.num_allowed += steps
        self.wake()


def texts(number: int) -> str:
    return "".join(f"{each} " for each in range(number))


def request(max_tokens: int = 3, num_prompt_tokens: int = 2, n: int = 1) -> CheckedRequest:
    params = SamplingParams(max_tokens=max_tokens, n=n, temperature=1)
    return CheckedRequest(TokenizedPrompt(None, [1] * num_prompt_tokens), params)


def with_engine(
    test: Callable[[AsyncEngine, OneTokenPerStep], Awaitable[None]],
    *,
    max_queued: int = 100,
    max_queued_tokens: int | None = None,
    interval: float = 0.0,
    observe: Callable = lambda _: None,
    **hooks: Callable,
) -> OneTokenPerStep:
    """Run a test in an event loop; afterwards the engine is closed, and nothing is left in it."""

    async def run() -> None:
        engine = AsyncEngine(
            inner,
            max_queued=max_queued,
            max_queued_tokens=max_queued_tokens,
            interval=interval,
            observers=[observe],
        )
        inner.wake = lambda: engine._inbox.put(lambda: None)
        try:
            await asyncio.wait_for(test(engine, inner), 20)
        finally:
            inner.allow()
            await engine.close(0)
            assert not engine._streams
            assert (engine.queue.num_requests, engine.queue.num_tokens) == (0, 0)
            if engine.error is None:
                assert not inner.open
                assert not engine._unscheduled
                assert not engine._without_tokens

    inner = OneTokenPerStep(**hooks)
    asyncio.run(run())
    return inner


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def read(stream) -> dict[int, str]:
    """All text of a stream, by prompt."""
    found: dict[int, str] = {}
    async for news in stream:
        for index, progress in news:
            found[index] = found.get(index, "") + "".join(new.text for new in progress.new)
    return found


def raiser(error: Exception, when: Callable[[object], bool] = lambda _: True) -> Callable:
    def hook(argument: object) -> None:
        if when(argument):
            raise error

    return hook


# ---- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [0.0, 0.01])
def test_each_prompt_gets_its_own_tokens_in_order(interval):
    async def test(engine, inner):
        inner.allow()
        streams = [
            await engine.serve(lambda n=n: [request(n), request(n + 1)], 2) for n in (1, 5, 30)
        ]
        found = await asyncio.gather(*map(read, streams))
        assert found == [{0: texts(n), 1: texts(n + 1)} for n in (1, 5, 30)]

    inner = with_engine(test, interval=interval)
    assert len(inner.calls) == 1
    assert inner.calls != {threading.get_ident()}


def test_a_step_wakes_the_loop_once_for_many_requests():
    async def test(engine, inner):
        loop, wakes = asyncio.get_running_loop(), []
        streams = [await engine.serve(lambda: [request(20)], 1) for _ in range(30)]
        for stream in streams:
            await stream.accepted()
        wake = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *call: (wakes.append(call), wake(*call))
        inner.allow()
        await asyncio.gather(*map(read, streams))
        assert len(wakes) <= inner.num_steps

    with_engine(test)


def test_fast_tokens_after_the_first_share_a_delivery():
    async def test(engine, inner):
        stream = await engine.serve(lambda: [request(50)], 1)
        inner.allow(1)
        news = stream.__aiter__()
        assert len((await news.__anext__())[0][1].new[0].token_ids) == 1
        inner.allow(49)
        [(_, progress)] = await news.__anext__()  # its end does not wait for the interval
        assert progress.finished
        assert len(progress.new[0].token_ids) == 49

    with_engine(test, interval=30.0)


def test_unread_deliveries_of_a_slow_reader_are_merged():
    async def test(engine, inner):
        stream = await engine.serve(lambda: [request(40), request(7)], 2)
        inner.allow()
        await until(lambda: not engine._streams)
        [news] = [news async for news in stream]
        assert {index: each.new[0].text for index, each in news} == {0: texts(40), 1: texts(7)}
        assert all(each.finished for _, each in news)

    with_engine(test)


def test_several_unread_deliveries_are_read_as_one():
    async def test(engine, inner):
        stream = await engine.serve(lambda: [request(5)], 1)
        for number in range(1, 6):
            inner.allow(1)
            await until(lambda n=number: len(stream._unread.get(0, ())) == n)
        assert await read(stream) == {0: texts(5)}

    with_engine(test)


def test_whole_results_come_in_the_order_of_the_prompts():
    async def test(engine, inner):
        stream = await engine.serve(lambda: [request(9), request(2), request(5)], 3)
        reading = asyncio.create_task(stream.results())
        for number_open in (2, 1, 0):  # the second ends first, and is read
            inner.allow({2: 2, 1: 3, 0: 4}[number_open])
            await until(lambda n=number_open: len(engine._streams) == n and not stream._unread)
        assert [each.text for each in await reading] == [texts(9), texts(2), texts(5)]

    with_engine(test)


# ---- aborts --------------------------------------------------------------------------------------


def test_a_request_aborted_before_it_is_accepted_is_gone():
    gate = threading.Event()

    async def test(engine, inner):
        engine._inbox.put(gate.wait)  # the engine's thread is busy
        stream = await engine.serve(lambda: [request()], 1)
        stream.close()
        assert engine.queue.num_requests == 0
        gate.set()
        await until(lambda: inner.aborted)
        assert not inner.open

    assert with_engine(test).num_steps == 0


def test_a_stream_that_is_closed_aborts_what_has_not_finished():
    seen = []

    async def test(engine, inner):
        stream = await engine.serve(lambda: [request(1), request(500)], 2)
        inner.allow(2)
        async for _ in stream:
            break
        stream.close()
        inner.allow(1)
        await until(lambda: inner.aborted)
        stream.close()  # once more changes nothing
        await asyncio.sleep(0.02)

    inner = with_engine(test, observe=seen.extend)
    assert inner.aborted == ["1"]
    assert [each.request_id for each in seen if each.finished] == ["0", "1"]


def test_a_finished_request_is_not_aborted():
    async def test(engine, inner):
        inner.allow()
        stream = await engine.serve(lambda: [request(2)], 1)
        assert await read(stream) == {0: texts(2)}
        stream.close()
        engine.abort("0")
        engine.abort("never")

    assert with_engine(test).aborted == []


def test_tokens_of_an_aborted_request_are_discarded():
    async def test(engine, inner):
        stream, other = [await engine.serve(lambda: [request(5)], 1) for _ in range(2)]
        await other.accepted()
        stream.close()
        inner.allow()
        assert await read(other) == {0: texts(5)}
        assert not stream._unread

    with_engine(test)


def test_a_failed_abort_does_not_affect_other_requests():
    async def test(engine, inner):
        stream, other = [await engine.serve(lambda: [request(5)], 1) for _ in range(2)]
        await other.accepted()
        stream.close()
        inner.allow()
        assert await read(other) == {0: texts(5)}

    with_engine(test, abort=raiser(Fault("cannot abort")))


def test_a_request_that_cannot_be_added_does_not_affect_others():
    async def test(engine, inner):
        inner.allow()
        streams = [await engine.serve(lambda: [request(5), request(4)], 2) for _ in range(2)]
        with pytest.raises(Fault, match="cannot add"):
            await streams[0].accepted()
        assert await read(streams[1]) == {0: texts(5), 1: texts(4)}

    with_engine(test, add=raiser(Fault("cannot add"), lambda request_id: request_id == "1"))


def test_a_request_whose_own_code_fails_ends_its_stream_alone():
    async def test(engine, inner):
        advance = inner.advance

        def failing(request_id):
            progress = advance(request_id)
            if request_id != "1":
                return progress
            inner.open.pop("1", None)
            return progress._replace(new=[], finished=True, error=RequestFailed("its tokenizer"))

        inner.advance = failing
        streams = [await engine.serve(lambda: [request(5), request(4)], 2) for _ in range(2)]
        inner.allow(1)
        with pytest.raises(RequestFailed, match="its tokenizer"):
            await read(streams[0])
        await until(lambda: inner.aborted == ["0"])
        inner.allow()
        assert await read(streams[1]) == {0: texts(5), 1: texts(4)}

    with_engine(test)


# ---- an engine that fails ------------------------------------------------------------------------


def test_an_engine_that_fails_fails_every_request():
    async def test(engine, inner):
        streams = [await engine.serve(lambda: [request(50)], 1) for _ in range(3)]
        inner.allow()
        for stream in streams:
            with pytest.raises(EngineDead, match="Fault: in a step"):
                await read(stream)
        await asyncio.wait_for(engine.died.wait(), 5)
        with pytest.raises(EngineDead):
            await engine.serve(lambda: [request()], 1)
        with pytest.raises(EngineDead):
            await engine.in_a_text_thread(lambda: None)

    with_engine(test, step=raiser(Fault("in a step"), lambda step: step == 5))


def test_an_idle_engine_that_has_lost_a_rank_is_dead(monkeypatch):
    monkeypatch.setattr(async_engine, "SECONDS_TO_CHECK", 0.01)

    def check() -> None:
        raise WorkerLost("rank 1 has ended")

    async def test(engine, inner):
        stream = await engine.serve(lambda: [request(50)], 1)  # which waits: no step is allowed
        await stream.accepted()
        inner.executor.check = check
        with pytest.raises(EngineDead, match="WorkerLost: rank 1 has ended"):
            await read(stream)
        await asyncio.wait_for(engine.died.wait(), 5)
        assert not engine._streams

    with_engine(test)


def test_an_observer_that_fails_is_a_failure_of_the_engine():
    async def test(engine, inner):
        inner.allow()
        with pytest.raises(EngineDead, match="cannot count"):
            await read(await engine.serve(lambda: [request(50)], 1))

    with_engine(test, observe=raiser(Fault("cannot count")))


def test_a_text_that_is_encoded_while_the_engine_fails_is_refused():
    gate = threading.Event()

    def check():
        gate.wait()
        return [request()]

    async def test(engine, inner):
        encoding = asyncio.create_task(engine.serve(check, 1))
        stream = await engine.serve(lambda: [request(50)], 1)
        inner.allow()
        with pytest.raises(EngineDead):
            await read(stream)
        gate.set()
        with pytest.raises(EngineDead):
            await encoding

    assert with_engine(test, step=raiser(Fault("in a step"))).num_steps == 1


# ---- the end -------------------------------------------------------------------------------------


def test_open_requests_may_finish_within_the_grace_period():
    async def test(engine, inner):
        stream = await engine.serve(lambda: [request(30)], 1)
        closing = asyncio.create_task(engine.close(20))
        await asyncio.sleep(0)
        with pytest.raises(ServerClosing):
            await engine.serve(lambda: [request()], 1)
        inner.allow()
        assert await read(stream) == {0: texts(30)}
        await closing

    with_engine(test)


def test_open_requests_are_aborted_after_the_grace_period():
    async def test(engine, inner):
        stream = await engine.serve(lambda: [request(10**6)], 1)
        inner.allow(2)
        await until(lambda: inner.num_steps == 2)
        closing = asyncio.create_task(engine.close(0.05))
        with pytest.raises(ServerClosing, match="aborted"):
            await read(stream)
        await closing

    assert with_engine(test).aborted == ["0"]


def test_texts_that_wait_when_the_engine_closes_are_refused():
    gate = threading.Event()

    def check():
        gate.wait()
        return [request()]

    async def test(engine, inner):
        serving = [asyncio.create_task(engine.serve(check, 1)) for _ in range(10)]
        other = asyncio.create_task(engine.in_a_text_thread(gate.wait))
        await asyncio.sleep(0.01)
        await engine.close(0)
        gate.set()
        ended = await asyncio.gather(*serving, other, return_exceptions=True)
        assert all(isinstance(each, ServerClosing) for each in ended), ended
        with pytest.raises(ServerClosing):
            await engine.in_a_text_thread(lambda: None)

    with_engine(test)


def test_a_step_that_hangs_does_not_keep_the_engine_open(monkeypatch):
    monkeypatch.setattr(async_engine, "SECONDS_TO_STOP", 0.05)
    gate = threading.Event()

    async def test(engine, inner):
        await (await engine.serve(lambda: [request()], 1)).accepted()
        inner.allow()
        await asyncio.wait_for(engine.close(0), 5)
        gate.set()
        engine._thread.join(5)

    with_engine(test, step=lambda _: gate.wait())


# ---- deadlines and the queue ---------------------------------------------------------------------


def test_a_request_that_takes_too_long_is_aborted():
    async def test(engine, inner):
        stream = await engine.serve(lambda: [request(50)], 1)
        stream.fail_after(100, passed=99.98)
        with pytest.raises(TimeoutError, match="longer than 100 seconds"):
            await read(stream)
        inner.allow(1)
        await until(lambda: inner.aborted)

    with_engine(test)


def test_a_finished_request_may_be_read_at_any_time():
    async def test(engine, inner):
        inner.allow()
        stream = await engine.serve(lambda: [request(3)], 1)
        stream.fail_after(0.2)
        await until(lambda: not engine._streams)
        await asyncio.sleep(0.25)
        assert await read(stream) == {0: texts(3)}

    with_engine(test)


def test_the_queue_counts_samples_until_they_are_scheduled():
    async def test(engine, inner):
        first = await engine.serve(lambda: [request(3, n=3), request(3, n=3)], 6)
        await first.accepted()
        assert (engine.queue.num_requests, engine.queue.num_tokens) == (6, 4)
        with pytest.raises(QueueFull, match="6 of at most 8 sequences are waiting"):
            await engine.serve(lambda: [request(n=3)], 3)
        inner.allow(1)
        await until(lambda: engine.queue.num_requests == 0)
        assert engine.queue.num_tokens == 0
        await engine.serve(lambda: [request(n=8)], 8)

    with_engine(test, max_queued=8)


def test_the_queue_counts_the_tokens_of_prompts():
    async def test(engine, inner):
        await (await engine.serve(lambda: [request(3, 60)], 1)).accepted()
        with pytest.raises(QueueFull, match="60 of at most 100 prompt tokens are waiting"):
            await engine.serve(lambda: [request(3, 60)], 1)
        assert (engine.queue.num_requests, engine.queue.num_tokens) == (1, 60)

    with_engine(test, max_queued_tokens=100)


def test_a_request_larger_than_the_queue_is_refused_for_good():
    async def test(engine, inner):
        with pytest.raises(InvalidRequest, match="9 sequences"):
            await engine.serve(lambda: [request(n=9)], 9)
        with pytest.raises(InvalidRequest, match="101 prompt tokens"):
            await engine.serve(lambda: [request(3, 101)], 1)

    with_engine(test, max_queued=8, max_queued_tokens=100)


def test_a_request_that_is_refused_or_cancelled_while_it_is_read_leaves_the_queue():
    gate = threading.Event()

    async def test(engine, inner):
        with pytest.raises(Fault):
            await engine.serve(lambda: raiser(Fault("unreadable"))(None), 1)
        serving = asyncio.create_task(engine.serve(lambda: gate.wait() and [request()], 1))
        await asyncio.sleep(0.01)
        serving.cancel()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert engine.queue.num_requests == 0

    assert with_engine(test).num_steps == 0
