"""The HTTP application: the endpoints of OpenAI's protocol, and vLLM's."""

from importlib.resources import files

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from jinja2 import Environment
from starlette.exceptions import HTTPException

from minipaged import __version__
from minipaged.errors import MinipagedError
from minipaged.serving import errors
from minipaged.serving.bodies import JsonRoute
from minipaged.serving.service import Service


def build_app(service: Service) -> FastAPI:
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


async def _answer_error(_: Request, error: Exception) -> Response:
    return errors.as_response(error)
