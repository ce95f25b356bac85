"""How the JSON of a body is read, however large, deep or wrong it is."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic import BeforeValidator, Field
from pydantic_core import from_json

LARGE = 2**16  # bytes: from here on, others are served between parsing and checking
MOST_ITEMS = 1024  # of what each new token is compared with


def _few(value: Any) -> Any:
    """For dicts, whose own limit pydantic checks last."""
    if isinstance(value, dict) and len(value) > MOST_ITEMS:
        raise ValueError(f"{len(value)} entries are given, and at most {MOST_ITEMS} may be")
    return value


T = TypeVar("T")
# Only the first fault is looked for: to describe a million takes seconds.
Items = Annotated[list[T], Field(fail_fast=True)]
Few = Annotated[list[T], Field(fail_fast=True, max_length=MOST_ITEMS)]
Biases = Annotated[dict[str, float], BeforeValidator(_few)]


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
            return await asyncio.to_thread(from_json, body)
        except ValueError as error:
            raise HTTPException(400, f"the body is not valid JSON: {error}.") from None
