"""How the JSON of a body is read."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

LARGE = 2**16  # bytes, which are parsed in less than a millisecond


class JsonRoute(APIRoute):
    """Reads bodies with a parser that limits the nesting, and refuses half a surrogate pair."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handler


class JsonRequest(Request):
    """A request whose body is JSON."""

    async def json(self) -> Any:
        body = await self.body()
        try:
            if len(body) < LARGE:
                return from_json(body)
            return await asyncio.to_thread(
                from_json, body
            )  # others are served before it is checked
        except ValueError as error:
            raise HTTPException(400, f"the body is not valid JSON: {error}.") from None
