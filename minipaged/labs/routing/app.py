"""A router as an HTTP server: real requests to real servers, over plain HTTP.

Each request is read completely, sent to the server that the router chooses, and the response is
streamed back. A server that cannot be reached is skipped for a while, and its request goes to
another one. A response that has begun cannot move to another server: if its server fails, it is
aborted.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, MutableMapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from minipaged.errors import InvalidOption
from minipaged.labs.routing.load import Router

SECONDS_LEFT_OUT = 2.0
PASSED_ON = (b"content-type", b"authorization", b"retry-after", b"www-authenticate")
JSON = (b"content-type", b"application/json")
UNREACHABLE = b"""{"error": {"message": "no server can be reached: try again in a few seconds.",
    "type": "ServiceUnavailableError", "param": null, "code": 503}}"""
Headers = list[tuple[bytes, bytes]]
Scope = MutableMapping[str, Any]


class RouterApp:
    """An ASGI application in front of several servers.

    Args:
        router: chooses a server for each request, and is told when a request ends or a server is
            lost.
        urls: the addresses of the servers, such as http://127.0.0.1:8001.

    Raises InvalidOption for an invalid URL.
    """

    def __init__(self, router: Router, urls: list[str]) -> None:
        self._router = router
        self._addresses = [_address(url) for url in urls]
        self._left_out_until = [0.0] * len(urls)

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Forward one request, until it is answered or its client disconnects."""
        if scope["type"] != "http":
            return
        body = await _read_body(receive)
        serving = asyncio.ensure_future(self._serve(scope, body, send))
        leaving = asyncio.ensure_future(_wait_for_disconnect(receive))
        await asyncio.wait({serving, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not serving.done():
            serving.cancel()  # closes the connection, so the server aborts the request
        with suppress(asyncio.CancelledError):
            await serving

    async def _serve(self, scope: Scope, body: bytes, send: Any) -> None:
        prompt = prompt_in(body)
        for _ in self._addresses:  # try each at most once
            if not (alive := self._alive()):
                break
            server = self._router.choose(prompt, alive)
            response = exchange(self._addresses[server], scope, body)
            has_begun = False
            try:
                async for message in response:
                    await send(message)
                    has_begun = True
                return
            except (OSError, EOFError, ValueError):
                self._left_out_until[server] = time.monotonic() + SECONDS_LEFT_OUT
                self._router.forget(server)
                if has_begun:
                    return  # incomplete: uvicorn closes the client's connection
            finally:
                self._router.finish(server)
                await response.aclose()
        await send({"type": "http.response.start", "status": 503, "headers": [JSON]})
        await send({"type": "http.response.body", "body": UNREACHABLE})

    def _alive(self) -> list[int]:
        now = time.monotonic()
        return [server for server, until in enumerate(self._left_out_until) if until <= now]


def prompt_in(body: bytes) -> str:
    """The text by which a request is routed: its prompt, or the messages of its chat."""
    try:
        request = json.loads(body)
        if "messages" in request:
            return "\n".join(f"{each['role']}: {each['content']}" for each in request["messages"])
        return str(request["prompt"])  # equal token ids also have equal text
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""  # the server will report the error


def _address(url: str) -> tuple[str, int]:
    with suppress(ValueError):  # the port is not a number
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname and parts.path in ("", "/"):
            return parts.hostname, parts.port or 80
    raise InvalidOption(
        f"{url!r} is not a server address: give http://host:port, as `minipaged serve` prints it."
    )


async def _read_body(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def _wait_for_disconnect(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# ---- one request to a server, in HTTP/1.1 --------------------------------------------------------


async def exchange(
    address: tuple[str, int], scope: Scope, body: bytes
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the ASGI messages of the response.

    Raises OSError, EOFError or ValueError if the server is lost before its response is complete.
    """
    reader, writer = await asyncio.open_connection(*address)
    try:
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        target = scope.get("raw_path", scope["path"].encode()) + query
        lines = [scope["method"].encode() + b" " + target + b" HTTP/1.1", b"Host: router"]
        lines += [b"%s: %s" % header for header in scope["headers"] if header[0] in PASSED_ON]
        lines += [b"Content-Length: %d" % len(body), b"Connection: close", b"", body]
        writer.write(b"\r\n".join(lines))
        await writer.drain()
        status = int((await reader.readuntil(b"\r\n")).split()[1])
        headers = await _read_headers(reader)
        shown = [header for header in headers if header[0] in PASSED_ON]
        yield {"type": "http.response.start", "status": status, "headers": shown}
        if (b"transfer-encoding", b"chunked") in headers:
            while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
                yield _piece((await reader.readexactly(size + 2))[:-2], more=True)
        else:
            length = int(dict(headers).get(b"content-length", b"0"))
            yield _piece(await reader.readexactly(length), more=True)
        yield _piece(b"", more=False)
    finally:
        writer.close()


def _piece(data: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def _read_headers(reader: asyncio.StreamReader) -> Headers:
    headers: Headers = []
    while line := (await reader.readuntil(b"\r\n")).strip():
        name, _, value = line.partition(b":")
        headers.append((name.lower(), value.strip()))
    return headers
