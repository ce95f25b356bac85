"""The HTTP application: the endpoints of OpenAI's protocol, and vLLM's."""

import asyncio
from collections.abc import Callable, Coroutine
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute
from jinja2 import Environment
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from minipaged import __version__
from minipaged.errors import MinipagedError
from minipaged.serving import errors
from minipaged.serving.service import Service

HANDLED = (RequestValidationError, HTTPException, MinipagedError, TimeoutError, Exception)
LARGE = 2**16  # bytes; larger bodies are parsed in a thread, while other requests are served


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


def build_app(service: Service) -> FastAPI:
    """The application with all endpoints."""
    app = FastAPI(
        title="minipaged",
        version=__version__,
        description="OpenAI's protocol over a paged KV cache.",
        docs_url=None,  # FastAPI's page loads its program from the network
        redoc_url=None,
        exception_handlers=dict.fromkeys(HANDLED, errors.as_response),
    )
    app.router.route_class = JsonRoute
    for method, path, endpoint in (
        ("POST", "/v1/completions", service.completions),
        ("POST", "/v1/chat/completions", service.chat_completions),
        ("GET", "/v1/models", service.models),
        ("GET", "/v1/models/{name:path}", service.model),
        ("POST", "/tokenize", service.tokenize),
        ("POST", "/detokenize", service.detokenize),
        ("GET", "/health", service.health),
        ("GET", "/version", service.version),
        ("GET", "/metrics", service.metrics),
    ):
        app.add_api_route(path, endpoint, methods=[method], response_model=None)

    async def docs() -> Response:
        page = (files("minipaged") / "assets" / "docs.html").read_text("utf-8")
        template = Environment(autoescape=True).from_string(page)
        return HTMLResponse(template.render(schema=app.openapi()))

    app.add_api_route("/docs", docs, include_in_schema=False)
    return app
