"""HTTP/1.1 for the load client: h11 over asyncio streams, and server-sent events.

h11 is the parser that uvicorn uses. A general client library needs several times the CPU time per
chunk, which on a small machine is taken from the measured server.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11

from minipaged.errors import InvalidOption, MinipagedError

READ_BYTES = 2**16


class ServerUnusable(MinipagedError):
    """A server cannot be measured: it does not answer, or violates the protocol."""


@dataclass(frozen=True)
class Target:
    """A server with OpenAI's protocol, and the requested model."""

    host: str
    port: int
    path: str = ""  # before /v1
    is_tls: bool = False
    api_key: str | None = None
    model: str = ""

    @classmethod
    def of_url(cls, url: str, api_key: str | None = None) -> "Target":
        """Parse http://host:port, with or without /v1. Raises InvalidOption."""
        try:
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
            assert parts.hostname, "no host"
        except (AssertionError, KeyError, ValueError) as error:
            raise InvalidOption(
                f"--url is {url!r}: give a server's address, as in http://127.0.0.1:8000."
            ) from error
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port, path, parts.scheme == "https", api_key)

    @property
    def url(self) -> str:
        """The address, for messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.is_tls else ''}://{host}:{self.port}{self.path}"

    def headers(self) -> list[tuple[str, str]]:
        """The headers of every request."""
        key = [("Authorization", f"Bearer {self.api_key}")] if self.api_key else []
        return [("Host", f"{self.host}:{self.port}"), *key]


class Connection:
    """One connection. It can be reused after a response was read completely."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._http = h11.Connection(h11.CLIENT)

    @classmethod
    async def open(cls, target: Target) -> "Connection":
        """Connect. Raises OSError."""
        return cls(
            *await asyncio.open_connection(target.host, target.port, ssl=target.is_tls or None)
        )

    async def send(
        self, method: str, path: str, headers: list[tuple[str, str]], body: bytes = b""
    ) -> int:
        """Send a request and wait for the status of its response.

        Raises OSError, h11.RemoteProtocolError.
        """
        headers = [*headers, ("Content-Length", str(len(body)))]
        request = h11.Request(method=method, target=path, headers=headers)
        parts = (request, h11.Data(data=body), h11.EndOfMessage())
        self._writer.write(b"".join(self._http.send(part) or b"" for part in parts))
        await self._writer.drain()
        while not isinstance(event := await self._next(), h11.Response):
            pass  # 100 Continue and the like
        return event.status_code

    async def _next(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._reader.read(READ_BYTES))
        return event

    async def body(self) -> AsyncIterator[bytes]:
        """Yield the response's body as it arrives."""
        while isinstance(event := await self._next(), h11.Data):
            yield bytes(event.data)

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the data of server-sent events of one line each."""
        rest = b""
        async for data in self.body():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()

    def can_be_reused(self) -> bool:
        """Whether another request may follow; prepares for it."""
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
            return True
        return False

    def is_closed_by_peer(self) -> bool:
        """Whether the server has closed it, as it does after some idle seconds."""
        return self._reader.at_eof()

    def close(self) -> None:
        """Close it at once, even during a response."""
        with suppress(RuntimeError):  # the loop has ended
            self._writer.close()


async def get(target: Target, path: str) -> tuple[int, bytes]:
    """Status and body of a GET request. Raises OSError, h11.RemoteProtocolError."""
    connection = await Connection.open(target)
    try:
        headers = [*target.headers(), ("Connection", "close")]
        status = await connection.send("GET", target.path + path, headers)
        return status, b"".join([data async for data in connection.body()])
    finally:
        connection.close()


async def cpu_seconds(target: Target) -> float | None:
    """CPU time of the server's process so far; None if /metrics does not report it."""
    with suppress(OSError, h11.RemoteProtocolError):
        _, text = await get(target, "/metrics")
        for line in text.splitlines():
            if line.startswith(b"process_cpu_seconds_total"):
                return float(line.split()[-1])
    return None


@dataclass(frozen=True)
class ModelFacts:
    """A model in the response of /v1/models."""

    name: str
    max_model_len: int | None  # vLLM's extension


async def ask_for_model(target: Target, name: str | None) -> ModelFacts:
    """Return the model with this name, or the first one. Raises ServerUnusable."""
    try:
        status, text = await get(target, "/v1/models")
    except (OSError, h11.RemoteProtocolError) as error:
        raise ServerUnusable(f"{target.url} does not answer ({error}): is it running?") from error
    if status != 200:
        raise ServerUnusable(f"{target.url}/v1/models answers {status}: {text[:200].decode()}")
    try:
        models: list[dict[str, Any]] = json.loads(text)["data"]
        facts: dict[str, int | None] = {e["id"]: e.get("max_model_len") for e in models}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServerUnusable(f"{target.url}/v1/models is not a list of models.") from error
    if not facts or (name is not None and name not in facts):
        names = ", ".join(map(repr, facts)) or "no model"
        raise ServerUnusable(f"{target.url} serves {names}, not {name!r}: give --model.")
    name = name if name is not None else next(iter(facts))
    return ModelFacts(name, facts[name])
