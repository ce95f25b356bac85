"""The live view over HTTP: /viz is its page, /viz/events its server-sent events.

If the server has an API key, clients must send it: as a header, or as `/viz?key=...`, because a
browser's EventSource cannot send headers. Without a key, only clients on this machine may watch,
and only under a loopback name: otherwise a website could point its own name here (DNS rebinding)
and read the response in a visitor's browser.
"""

import html
import secrets
from collections.abc import AsyncGenerator, MutableMapping
from contextlib import aclosing
from typing import Any
from urllib.parse import parse_qs

from fastapi import Response
from fastapi.responses import HTMLResponse, StreamingResponse

from minipaged.serving import errors
from minipaged.serving.async_engine import AsyncEngine
from minipaged.serving.gate import sent_key
from minipaged.serving.live_view import LiveView
from minipaged.tracing.replay import fill_page
from minipaged.utils.sockets import is_loopback

PATHS = ("/viz", "/viz/events")
MOST_VIEWERS = 32
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",  # the address may contain the key
    "X-Content-Type-Options": "nosniff",
    "X-Accel-Buffering": "no",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
}


class LivePages:
    """ASGI middleware that serves the live view, and passes on all other requests.

    Args:
        app: the rest of the server.
        view: the events of the engine.
        engine: the same engine.
        model: its name, for the title.
        key: the API key; None: only clients on this machine may watch.
    """

    def __init__(
        self, app: Any, view: LiveView, engine: AsyncEngine, model: str, key: bytes | None
    ) -> None:
        self._app, self._view, self._engine = app, view, engine
        self._title = html.escape(model)
        self._key = key

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Serve, refuse or pass on a request."""
        if scope["path"] not in PATHS:
            return await self._app(scope, receive, send)
        response = refuse_viewer(scope, self._key) or self._respond(scope)
        return await response(scope, receive, send)

    def _respond(self, scope: MutableMapping[str, Any]) -> Response:
        if scope["method"] != "GET":
            return errors.response(405, "the live view can only be read: use GET.")
        if scope["path"] == "/viz":
            return HTMLResponse(fill_page("live.html", title=self._title), headers=HEADERS)
        if self._view.num_viewers >= MOST_VIEWERS:
            return errors.response(429, f"{MOST_VIEWERS} views are already open: close one.")
        return EventStream(self._view.messages(self._engine))


class EventStream(StreamingResponse):
    """Messages for one viewer. Closes them when the response ends, even in the middle of one."""

    def __init__(self, messages: AsyncGenerator[bytes]) -> None:
        super().__init__(messages, headers=HEADERS, media_type="text/event-stream")
        self._messages = messages

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send messages until either side closes the stream."""
        async with aclosing(self._messages):
            await super().__call__(scope, receive, send)


def refuse_viewer(scope: MutableMapping[str, Any], key: bytes | None) -> Response | None:
    """The response to a client that may not watch; None if it may."""
    if key is not None:
        sent = sent_key(scope)
        if sent is None:
            [given, *_] = parse_qs(scope["query_string"].decode("latin-1")).get("key", [""])
            sent = given.encode().strip()
        if secrets.compare_digest(sent, key):
            return None
        return errors.response(401, "the API key is missing or wrong: open /viz?key=<key>.")
    host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if is_loopback((scope["client"] or [""])[0]) and is_loopback(name):
        return None
    return errors.response(
        403,
        "without an API key, only this machine may watch, at http://localhost: start the server "
        "with api_key, and open /viz?key=<key>.",
    )
