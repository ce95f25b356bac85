"""Between a socket and the application: deadlines, and answers that arrive, in this process."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from servers import raw_request

from minipaged.serving import gate, run
from minipaged.serving.gate import Gate
from minipaged.serving.settings import ServerArgs


async def echo(scope, receive, send):
    """An application that answers with the length of the body."""
    message = await receive()
    body = str(len(message["body"])).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def with_gate(test: Callable[[int], Awaitable[None]], app=echo, **args) -> None:
    """Run a test with the port of a server that has nothing but a gate and an application."""

    async def serve() -> None:
        sockets = run.listen("127.0.0.1", 0)
        server = run.Server(Gate(app, ServerArgs(**args)), ready="ready")
        serving = asyncio.create_task(server.serve(sockets))
        try:
            await asyncio.wait_for(test(sockets[0].getsockname()[1]), 20)
        finally:
            server.should_exit = True
            await asyncio.wait_for(serving, 10)

    asyncio.run(serve())


@asynccontextmanager
async def connection(port: int):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in head[1:] if line)
    return int(head[0].split()[1]), await reader.readexactly(int(headers["content-length"]))


def test_connections_send_small_writes_at_once():
    """With Nagle's algorithm, the body of a response is sent up to 40 ms after its head."""
    [listening] = run.listen("127.0.0.1", 0)
    with listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("sent", [b"", b"GET", b"GET / HTTP/1.1\r\nHost: x\r\n"])
def test_headers_that_do_not_arrive_close_the_connection(monkeypatch, sent):
    monkeypatch.setattr(gate, "HEAD_SECONDS", 0.2)

    async def test(port):
        async with connection(port) as (reader, writer):
            writer.write(sent)
            assert await reader.read() == b""

    with_gate(test)


def test_slow_headers_do_not_extend_their_deadline(monkeypatch):
    monkeypatch.setattr(gate, "HEAD_SECONDS", 0.3)

    async def test(port):
        async with connection(port) as (reader, writer):
            for _ in range(1000):
                writer.write(b"G")
                await asyncio.sleep(0.02)
                if reader.at_eof() or reader.exception():  # the end, or a reset after it
                    return
            raise AssertionError("it is still open")

    with_gate(test)


def test_the_deadline_for_headers_does_not_limit_the_response(monkeypatch):
    monkeypatch.setattr(gate, "HEAD_SECONDS", 0.2)

    async def slow(scope, receive, send):
        await asyncio.sleep(0.5)
        await echo(scope, receive, send)

    async def test(port):
        async with connection(port) as (reader, writer):
            for _ in range(2):
                writer.write(raw_request("/", b"abc"))
                assert await answer(reader) == (200, b"3")

    with_gate(test, slow)


def test_a_body_that_does_not_arrive_is_refused(monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(gate, "LINGER_SECONDS", 0.2)

    async def test(port):
        async with connection(port) as (reader, writer):
            writer.write(raw_request("/", b"abc", length=10))
            status, body = await answer(reader)
            assert (status, json.loads(body)["error"]["type"]) == (408, "RequestTimeoutError")
            assert await reader.read() == b""

    with_gate(test)


def test_a_client_that_leaves_before_its_body_is_complete_reaches_no_application():
    async def test(port):
        async with connection(port) as (_, writer):
            writer.write(raw_request("/", b"abc", length=10))
            await writer.drain()
        await asyncio.sleep(0.1)
        assert not seen

    async def note(scope, receive, send):
        seen.append(await receive())

    seen: list[object] = []
    with_gate(test, note)


def test_a_refused_body_is_still_read_for_a_limited_time(monkeypatch):
    monkeypatch.setattr(gate, "LINGER_SECONDS", 0.5)

    async def test(port):
        async with connection(port) as (reader, writer):
            writer.write(raw_request("/", b"", length=10**9))
            status, _ = await answer(reader)
            assert status == 413
            for _ in range(5):
                writer.write(b"a" * 10**5)
                await writer.drain()  # a reset would make this fail
                await asyncio.sleep(0.02)
            assert await reader.read() == b""

    with_gate(test, max_body_bytes=10)


def test_all_bodies_in_memory_share_one_limit():
    waits = asyncio.Event()

    async def hold(scope, receive, send):
        await waits.wait()
        await echo(scope, receive, send)

    async def test(port):
        held = []
        for _ in range(gate.MAX_BODIES + 1):
            held.append(await asyncio.open_connection("127.0.0.1", port))
            held[-1][1].write(raw_request("/", b"a" * 1000))
        await asyncio.sleep(0.2)
        async with connection(port) as (reader, writer):
            writer.write(raw_request("/", b"a"))
            status, body = await answer(reader)
            assert (status, json.loads(body)["error"]["type"]) == (429, "RateLimitError")
        waits.set()
        for reader, writer in held:
            assert (await answer(reader))[0] == 200
            writer.close()
        async with connection(port) as (reader, writer):
            writer.write(raw_request("/", b"a"))
            assert await answer(reader) == (200, b"1")

    with_gate(test, hold, max_body_bytes=1000)


def test_a_client_that_leaves_is_noticed_although_it_has_sent_its_next_request():
    left = asyncio.Event()

    async def wait(scope, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()

    async def test(port):
        async with connection(port) as (_, writer):
            for _ in range(2):
                writer.write(raw_request("/", b"abc"))
                await asyncio.sleep(0.1)  # so that it arrives after the first has been read
        await left.wait()

    with_gate(test, wait)


def test_the_loop_parses_a_few_kilobytes_at_once(monkeypatch):
    """A larger piece could have so many tiny chunks that all other connections wait."""
    sizes: list[int] = []
    receive = gate.Connection.data_received

    def note(self, data):
        sizes.append(len(data))
        receive(self, data)

    monkeypatch.setattr(gate.Connection, "data_received", note)

    async def test(port):
        async with connection(port) as (reader, writer):
            writer.write(raw_request("/", b"a" * 300_000))
            assert await answer(reader) == (200, b"300000")

    with_gate(test)
    assert max(sizes) <= gate.READ_BYTES < 300_000 < sum(sizes)


@pytest.mark.parametrize("reads", [False, True])
def test_only_a_client_that_reads_nothing_is_disconnected(monkeypatch, reads):
    monkeypatch.setattr(gate, "STALL_SECONDS", 0.3)
    size = 20 * 2**20
    has_ended = asyncio.Event()

    async def large(scope, receive, send):
        headers = [(b"content-length", str(size).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"a" * size, "more_body": True})
        await send({"type": "http.response.body"})  # waits until the client has read, or is gone
        has_ended.set()

    async def test(port):
        async with connection(port) as (reader, writer):
            writer.write(raw_request("/", b""))
            await reader.readuntil(b"\r\n\r\n")
            for _ in range(20 if reads else 0):
                await reader.readexactly(size // 20)
                await asyncio.sleep(0.05)
            await has_ended.wait()
            if not reads:
                with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                    await reader.readexactly(size)

    with_gate(test, large)


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearer wrong", "Basic key", "key", "Bearer key key", "Bearer \xff"],
)
def test_a_wrong_key_is_refused_before_the_body_arrives(header):
    async def test(port):
        async with connection(port) as (reader, writer):
            data = raw_request("/v1/models", b"", length=1000, Authorization="?")
            writer.write(data.replace(b"?", header.encode("latin-1")))
            status, body = await answer(reader)
            assert (status, json.loads(body)["error"]["type"]) == (401, "AuthenticationError")
        async with connection(port) as (reader, writer):
            writer.write(raw_request("/v1/models", b"", Authorization="bearer  key "))
            assert (await answer(reader))[0] == 200

    with_gate(test, api_key="key")
