"""Checks before a request reaches the application: deadlines, API keys, and sizes of bodies."""

import asyncio
import secrets
from collections.abc import MutableMapping
from typing import Any

import h11
from anyio import move_on_after
from fastapi import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from minipaged.serving import errors
from minipaged.serving.settings import ServerArgs
from minipaged.serving.streams import ClientLeft

HEAD_SECONDS = 30.0  # for the headers of a request: incomplete ones keep a socket open
BODY_SECONDS = 30.0  # for its body: an incomplete one keeps its memory
STALL_SECONDS = 60.0  # in which a client must read something: unread responses keep their memory
LINGER_SECONDS = 5.0  # for which a refused body is still read: see `_refuse`
MAX_BODIES = 16  # bodies of the largest size that may be in memory at once
READ_BYTES = 2**13  # at once: parsed in 40 ms or less, even if each byte is a chunk of its own
AHEAD_BYTES = 2**16  # of the next requests on a connection, which wait for the response
OPEN_PATHS = ("/health", "/metrics")


class Connection(H11Protocol):
    """uvicorn's connection, with deadlines and OpenAI's error for invalid HTTP."""

    _head: asyncio.TimerHandle | None = None  # deadline for the headers
    _stall: asyncio.TimerHandle | None = None  # ... for reading a part of the response

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        transport.max_size = READ_BYTES  # pyright: ignore[reportAttributeAccessIssue]
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_head()
        # uvicorn stops reading when the next request arrives before the response has been sent.
        # Then a client that leaves would not be noticed.
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < AHEAD_BYTES:
            self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head, self._stall):
            if timer is not None:
                timer.cancel()

    def _expect_head(self) -> None:
        if self.conn.their_state is not h11.IDLE and self._head is not None:
            self._head.cancel()
            self._head = None
        elif self.conn.their_state is h11.IDLE and self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        assert self._stall is not None
        self._stall.cancel()

    def _expect_reading(self, num_unread: int | None = None) -> None:
        """Close the connection if the client has read nothing since the last call."""
        now = self.transport.get_write_buffer_size()
        if now == num_unread:
            self.transport.abort()
        else:
            self._stall = self.loop.call_later(STALL_SECONDS, self._expect_reading, now)

    def send_400_response(self, msg: str) -> None:
        """Refuse invalid HTTP."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return self.transport.abort()  # the response has begun
        refusal = errors.response(400, f"{msg} Send a valid HTTP/1.1 request.")
        refusal.headers["Connection"] = "close"
        head = h11.Response(status_code=400, headers=refusal.raw_headers)
        for event in (head, h11.Data(data=bytes(refusal.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        return self.transport.close()


def sent_key(scope: MutableMapping[str, Any]) -> bytes | None:
    """The key in the Authorization header of a request."""
    scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else None


class Gate:
    """ASGI middleware that refuses a request before the application reads it."""

    def __init__(self, app: Any, args: ServerArgs) -> None:
        self._app = app
        self._key = args.key
        self._max_bytes = args.max_body_bytes
        self._num_bytes = 0  # of all bodies in memory

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Pass a request on with its whole body, or respond with an error."""
        chunks: list[bytes] = []
        try:
            refusal = self._wrong_key(scope) or await self._read(scope, receive, chunks)
            if refusal is not None:
                return await self._refuse(refusal, scope, receive, send)
            body = [b"".join(chunks)]

            async def receive_again() -> Any:
                return {"type": "http.request", "body": body.pop()} if body else await receive()

            return await self._app(scope, receive_again, send)
        except ClientLeft:
            return None  # before its body was complete: no one waits for a response
        finally:
            self._num_bytes -= sum(map(len, chunks))

    def _wrong_key(self, scope: MutableMapping[str, Any]) -> Response | None:
        if self._key is None or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return None
        if secrets.compare_digest(sent_key(scope) or b"", self._key):
            return None
        return errors.response(
            401, "the API key is missing or wrong: send it as `Authorization: Bearer <key>`."
        )

    async def _read(
        self, scope: MutableMapping[str, Any], receive: Any, chunks: list[bytes]
    ) -> Response | None:
        """Read the body in chunks. Returns an error response if it is too large or too slow.

        Raises ClientLeft.
        """
        num_bytes, length = 0, int(dict(scope["headers"]).get(b"content-length", b"0"))
        more = True
        with move_on_after(BODY_SECONDS):
            while more:
                if max(num_bytes, length) > self._max_bytes:
                    message = f"the body has more than {self._max_bytes} bytes (max_body_bytes)"
                    return errors.response(413, f"{message}: send less.")
                if self._num_bytes > MAX_BODIES * self._max_bytes:
                    message = f"the bodies of other requests take {self._num_bytes} bytes of memory"
                    return errors.response(429, f"{message}: send this request again later.")
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                chunks.append(message["body"])
                num_bytes += len(chunks[-1])
                self._num_bytes += len(chunks[-1])
                more = message["more_body"]
            return None
        return errors.response(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds.")

    async def _refuse(
        self, refusal: Response, scope: MutableMapping[str, Any], receive: Any, send: Any
    ) -> None:
        """Respond at once, but keep reading the body: many clients send all of it before they read.

        A socket closed with unread data sends a reset, which may discard the response.
        """
        refusal.headers["Connection"] = "close"

        async def send_but_go_on(message: Any) -> None:
            await send({**message, "more_body": True} if "body" in message else message)

        await refusal(scope, receive, send_but_go_on)
        with move_on_after(LINGER_SECONDS):
            while (await receive()).get("more_body"):
                pass
        await send({"type": "http.response.body"})
