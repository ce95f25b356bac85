"""What stands between a socket and the application: keys, and bodies that are too large or slow."""

import asyncio
import secrets
from collections.abc import MutableMapping
from typing import Any

from minipaged.serving import errors
from minipaged.serving.settings import ServerArgs

BODY_SECONDS = 30.0  # in which a body must arrive: half a request would keep its memory for ever
OPEN_PATHS = ("/health", "/metrics")


class Gate:
    """ASGI middleware that refuses a request before the application reads it."""

    def __init__(self, app: Any, args: ServerArgs) -> None:
        self._app = app
        self._key = None if args.api_key is None else args.api_key.strip().encode()
        self._max_bytes = args.max_body_bytes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Pass a request on, with its whole body, or answer it with an error."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        refusal = self._wrong_key(scope)
        messages: list[Any] = []
        if refusal is None:
            try:
                refusal = await asyncio.wait_for(self._read(scope, receive, messages), BODY_SECONDS)
            except asyncio.TimeoutError:
                refusal = errors.response(
                    408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds."
                )
        if refusal is not None:
            refusal.headers["Connection"] = "close"  # what is left of the body is not read
            return await refusal(scope, receive, send)

        async def receive_again() -> Any:
            return messages.pop(0) if messages else await receive()

        return await self._app(scope, receive_again, send)

    def _wrong_key(self, scope: MutableMapping[str, Any]) -> Any:
        if self._key is None or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return None
        headers = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and secrets.compare_digest(key.strip(), self._key):
            return None
        return errors.response(
            401, "the API key is missing or wrong: send it as `Authorization: Bearer <key>`."
        )

    async def _read(
        self, scope: MutableMapping[str, Any], receive: Any, messages: list[Any]
    ) -> Any:
        """Read the body into messages; returns the refusal of one that is too large."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        num_bytes, more = 0, True
        while more:
            if max(num_bytes, int(length) if length.isdigit() else 0) > self._max_bytes:
                return errors.response(
                    413,
                    f"the body has more than {self._max_bytes} bytes (max_body_bytes): send less.",
                )
            message = await receive()
            messages.append(message)
            num_bytes += len(message.get("body", b""))
            more = message.get("more_body", False)
        return None
