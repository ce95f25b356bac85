"""Reads the JSON of request bodies, however large, deep or invalid they are."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic import BeforeValidator, Field
from pydantic_core import from_json

LARGE = 2**16  # bytes; larger bodies are parsed in a thread, while other requests are served
MOST_ITEMS = 1024  # in a field that is compared with each new token


def _few(value: Any) -> Any:
    """Limit the size of a dict before its entries are checked; pydantic's own limit comes last."""
    if isinstance(value, dict) and len(value) > MOST_ITEMS:
        raise ValueError(f"has {len(value)} entries, but at most {MOST_ITEMS} are allowed")
    return value


T = TypeVar("T")
# Checking stops at the first fault: describing a million of them would take seconds.
Items = Annotated[list[T], Field(fail_fast=True)]
Few = Annotated[list[T], Field(fail_fast=True, max_length=MOST_ITEMS)]
Biases = Annotated[dict[str, float], BeforeValidator(_few)]


class JsonRoute(APIRoute):
    """Reads bodies with a parser that limits the nesting and refuses lone surrogates."""

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
