"""The HTTP application: the endpoints of OpenAI's protocol, and vLLM's."""

from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from jinja2 import Environment
from starlette.exceptions import HTTPException

from minipaged import __version__
from minipaged.errors import MinipagedError
from minipaged.serving import errors
from minipaged.serving.bodies import JsonRoute
from minipaged.serving.metrics import Metrics
from minipaged.serving.protocol import DetokenizeBody, TokenizeBody
from minipaged.serving.service import Service


def build_app(service: Service, metrics: Metrics) -> FastAPI:
    """The application with all endpoints."""
    app = FastAPI(
        title="minipaged",
        version=__version__,
        description="OpenAI's protocol over a paged KV cache.",
        docs_url=None,  # FastAPI's page loads its program from the network
        redoc_url=None,
    )
    app.router.route_class = JsonRoute
    for kind in (RequestValidationError, HTTPException, MinipagedError, TimeoutError, Exception):
        app.add_exception_handler(kind, _answer_error)
    api = Endpoints(service, metrics)
    for method, path, endpoint in (
        ("POST", "/v1/completions", service.completions),
        ("POST", "/v1/chat/completions", service.chat_completions),
        ("GET", "/v1/models", api.models),
        ("GET", "/v1/models/{name:path}", api.model),
        ("POST", "/tokenize", api.tokenize),
        ("POST", "/detokenize", api.detokenize),
        ("GET", "/health", api.health),
        ("GET", "/version", api.version),
        ("GET", "/metrics", api.metrics),
    ):
        app.add_api_route(path, endpoint, methods=[method], response_model=None)

    async def docs() -> Response:
        page = (files("minipaged") / "assets" / "docs.html").read_text("utf-8")
        template = Environment(autoescape=True).from_string(page)
        return HTMLResponse(template.render(schema=app.openapi()))

    app.add_api_route("/docs", docs, include_in_schema=False)
    return app


async def _answer_error(_: Request, error: Exception) -> Response:
    return errors.as_response(error)


class Endpoints:
    """One method per endpoint that generates nothing."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service, self._engine, self._metrics = service, service.engine, metrics

    async def models(self) -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [await self.model(self._service.name)]}

    async def model(self, name: str) -> dict[str, Any]:
        """The same by its name."""
        service = self._service
        service.refuse_other_model(name)
        return {
            "id": service.name, "object": "model", "created": service.started,
            "owned_by": "minipaged", "root": str(service.llm.folder), "parent": None,
            "max_model_len": service.max_model_len,
        }  # fmt: skip

    async def tokenize(self, body: TokenizeBody) -> Response:
        """The tokens of a text, or of the prompt of a chat."""
        service = self._service
        service.refuse_other_model(body.model)

        def encode() -> Response:
            tokens, most = service.encode(body), service.max_model_len
            return JSONResponse({"count": len(tokens), "max_model_len": most, "tokens": tokens})

        return await self._engine.in_a_text_thread(encode)

    async def detokenize(self, body: DetokenizeBody) -> dict[str, Any]:
        """The text of tokens."""
        self._service.refuse_other_model(body.model)
        decode = partial(self._service.decode, body.tokens)
        return {"prompt": await self._engine.in_a_text_thread(decode)}

    async def health(self) -> Response:
        """200 while requests are accepted, else 503."""
        try:
            self._engine.refuse_if_closed()
        except MinipagedError:
            return Response(status_code=503)
        return Response(status_code=200)

    async def version(self) -> dict[str, str]:
        """The library's version."""
        return {"version": __version__}

    def metrics(self) -> Response:
        """What was counted, in Prometheus's text format."""
        return Response(self._metrics.render(), media_type=self._metrics.content_type)
