"""The HTTP application: the endpoints of OpenAI's protocol, and vLLM's."""

from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from minipaged import __version__
from minipaged.errors import InvalidRequest, MinipagedError
from minipaged.serving import errors
from minipaged.serving.bodies import JsonRoute
from minipaged.serving.docs_page import docs_page
from minipaged.serving.metrics import Metrics
from minipaged.serving.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
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
        ("POST", "/v1/completions", api.completions),
        ("POST", "/v1/chat/completions", api.chat_completions),
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
        return HTMLResponse(docs_page(app.openapi()))

    app.add_api_route("/docs", docs, include_in_schema=False)
    return app


async def _answer_error(_: Request, error: Exception) -> Response:
    """Any error, in OpenAI's form."""
    if isinstance(error, HTTPException):
        return errors.response(error.status_code, str(error.detail))
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        place = [str(each) for each in first["loc"] if each != "body"]
        message = f"{'.'.join(place) or 'the body'}: {first['msg']}."
        return errors.response(400, message, place[0] if place else None)
    return errors.as_response(error)


class Endpoints:
    """One method per endpoint."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service, self._engine, self._metrics = service, service.engine, metrics

    async def completions(self, body: CompletionBody, http: Request) -> Response:
        """Continue one prompt or several."""
        return await self._service.complete(http, body)

    async def chat_completions(self, body: ChatBody, http: Request) -> Response:
        """Write the next turn of a conversation."""
        return await self._service.chat(http, body)

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
            if body.messages is not None:
                tokens = service.chat_prompt(body)["prompt_token_ids"]
            elif body.prompt is None:
                raise InvalidRequest("there is no text: give prompt or messages.")
            else:
                adds = body.add_special_tokens is not False
                tokens = service.tokenizer.encode(body.prompt, add_special_tokens=adds)
            most = service.max_model_len
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
