"""The HTTP application: OpenAI's endpoints over an `AsyncEngine`."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from minipaged import __version__
from minipaged.engine.arrivals import CheckedRequest, check_request
from minipaged.errors import InvalidOption, InvalidRequest, MinipagedError, MissingTokenizer
from minipaged.llm import LLM
from minipaged.sampling import BeamSearchParams, Params
from minipaged.serving import errors
from minipaged.serving.async_engine import AsyncEngine
from minipaged.serving.docs_page import docs_page
from minipaged.serving.metrics import Metrics
from minipaged.serving.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
)
from minipaged.serving.replies import ChatReply, CompletionReply, Reply
from minipaged.serving.settings import ServerArgs
from minipaged.serving.streams import Stream
from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.chat_prompt import chat_prompt
from minipaged.tokenizer.prompts import Prompt, list_prompts

CLIENT_LEFT = Response(status_code=499)  # nginx's code; nobody reads it


class Service:
    """What the endpoints share: the model, the engine that serves it, and the server's options."""

    def __init__(self, llm: LLM, engine: AsyncEngine, metrics: Metrics, args: ServerArgs) -> None:
        self.llm, self.engine, self.metrics, self.args = llm, engine, metrics, args
        self.name = args.served_model_name or str(llm.args.model)
        self.started = int(time.time())
        self.sampling_defaults = llm.args.read_sampling_defaults(llm.folders)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises MissingTokenizer."""
        if self.llm.engine.tokenizer is None:
            raise MissingTokenizer("the model has no tokenizer, so it reads token ids only.")
        return self.llm.engine.tokenizer

    def refuse_other_model(self, name: str | None) -> None:
        """Raise HTTPException, 404, for a model that is not served."""
        if name is not None and name != self.name:
            raise HTTPException(
                404, f"the model {name[:100]!r} is not served here: the name is {self.name!r}."
            )

    def check(self, prompt: Prompt, params: Params) -> CheckedRequest:
        """The prompt in tokens, checked as `LLMEngine.add_request` checks it."""
        engine = self.llm.engine
        return check_request(prompt, params, engine.traits, engine.config.max_logprobs)

    def chat_prompt(self, body: ChatBody | TokenizeBody) -> dict[str, Any]:
        """The messages as a prompt. Raises what `tokenizer.chat_prompt` raises."""
        continues = bool(body.continue_final_message)
        opens = body.add_generation_prompt
        messages: Any = body.messages  # `read_chat` checks each of them
        prompt: Any = chat_prompt(
            self.llm.folders.tokenizer,
            self.tokenizer,
            messages,
            self.llm.engine.config.max_model_len,
            chat_template=self._template(body),
            add_generation_prompt=not continues if opens is None else opens,
            continue_final_message=continues,
            tools=body.tools,
            chat_template_kwargs=body.chat_template_kwargs,
        )
        return prompt

    def _template(self, body: ChatBody | TokenizeBody) -> str | None:
        given = body.chat_template if isinstance(body, ChatBody) else None
        if given is not None and not self.args.trust_request_chat_template:
            raise InvalidRequest(
                "chat_template is a program, and this server runs none from strangers: leave it "
                "out, or start the server with trust_request_chat_template."
            )
        return self.llm.args.read_chat_template() if given is None else given

    # ---- prompts of a body ---------------------------------------------------------------------

    def check_completion(
        self, body: CompletionBody, prompts: Sequence[Prompt], params: Params
    ) -> list[CheckedRequest]:
        """All prompts of /v1/completions."""
        checked: list[CheckedRequest] = []
        for prompt in prompts:
            if isinstance(prompt, str) and body.add_special_tokens is False:
                ids = self.tokenizer.encode(prompt, add_special_tokens=False)
                prompt = {"prompt": prompt, "prompt_token_ids": ids}
            elif isinstance(prompt, str):
                prompt = {"prompt": prompt}
            else:
                prompt = {"prompt_token_ids": prompt}
            checked.append(self.check({**prompt, "cache_salt": body.cache_salt}, params))
        return checked

    def check_chat(self, body: ChatBody, params: Params) -> list[CheckedRequest]:
        """The conversation of /v1/chat/completions."""
        return [self.check({**self.chat_prompt(body), "cache_salt": body.cache_salt}, params)]

    # ---- one request, from its body to its response --------------------------------------------

    async def answer(
        self,
        http: Request,
        body: GenerationBody,
        kind: Callable[..., Reply[Any]],
        check: Callable[[Params], list[CheckedRequest]],
        num_prompts: int,
    ) -> Response:
        """Serve the prompts of a body until they have finished, or until the client has left."""
        self.refuse_other_model(body.model)
        params = body.params(self.sampling_defaults)
        prefix = "chatcmpl" if kind is ChatReply else "cmpl"
        reply = kind(
            f"{prefix}-{body.request_id or uuid.uuid4().hex}",
            self.name,
            body,
            self.llm.engine.tokenizer,
        )
        width = params.beam_width if isinstance(params, BeamSearchParams) else params.num_samples
        stream = await self.engine.serve(partial(check, params), width * num_prompts)
        if self.args.request_timeout is not None:
            stream.fail_after(self.args.request_timeout)
        watcher = asyncio.create_task(_watch(http, stream))
        try:
            if body.stream:
                await stream.accepted()
                events = EventStream(reply.events(stream), stream, watcher)
                watcher = None  # it is the response's now
                return events
            return JSONResponse(await reply.whole(stream))
        except ClientLeft:
            return CLIENT_LEFT
        finally:
            if watcher is not None:
                watcher.cancel()
                stream.close()


class ClientLeft(Exception):
    """The client has closed the connection before its response was complete."""


async def _watch(http: Request, stream: Stream) -> None:
    """Fail the stream when the client leaves: Starlette does not cancel a handler for it."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    stream.fail(ClientLeft())


class EventStream(StreamingResponse):
    """Server-sent events of a stream, which is closed in any case."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], stream: Stream, watcher: "asyncio.Task[None]"
    ) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._stream, self._watcher = stream, watcher

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send all events; what is not sent because the client has left is aborted."""
        try:
            await self.stream_response(send)
        except OSError:
            pass  # the client has left
        finally:
            self._watcher.cancel()
            self._stream.close()


def build_app(service: Service) -> FastAPI:
    """The application with all endpoints."""
    app = FastAPI(
        title="minipaged",
        version=__version__,
        description="OpenAI's protocol over a paged KV cache.",
        docs_url=None,  # FastAPI's page loads its program from the network
        redoc_url=None,
    )
    add_error_handlers(app)
    add_generation(app, service)
    add_information(app, service)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:  # pyright: ignore[reportUnusedFunction]
        return HTMLResponse(docs_page(app.openapi()))

    return app


def add_error_handlers(app: FastAPI) -> None:
    """Errors in OpenAI's form, whoever has raised them."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: Exception) -> Response:  # pyright: ignore[reportUnusedFunction]
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = [str(each) for each in first["loc"] if each != "body"]
        param = place[0] if place else None
        return errors.response(400, f"{'.'.join(place) or 'the body'}: {first['msg']}.", param)

    @app.exception_handler(StarletteHTTPException)
    async def http_error(_: Request, error: Exception) -> Response:  # pyright: ignore[reportUnusedFunction]
        assert isinstance(error, StarletteHTTPException)
        return errors.response(error.status_code, str(error.detail))

    async def other(_: Request, error: Exception) -> Response:
        return errors.as_response(error)

    for kind in (MinipagedError, TimeoutError, Exception):
        app.add_exception_handler(kind, other)


def add_generation(app: FastAPI, service: Service) -> None:
    """The endpoints that generate."""

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, http: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Continue one prompt or several."""
        prompts = list_prompts(body.prompt)
        if not prompts:
            raise InvalidOption("prompt is an empty list: give at least one.", "prompt")
        check = partial(service.check_completion, body, prompts)
        return await service.answer(http, body, CompletionReply, check, len(prompts))

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, http: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Write the next turn of a conversation."""
        return await service.answer(http, body, ChatReply, partial(service.check_chat, body), 1)


def add_information(app: FastAPI, service: Service) -> None:
    """The endpoints that do not generate."""
    engine, config = service.engine, service.llm.engine.config

    @app.get("/health")
    async def health() -> Response:  # pyright: ignore[reportUnusedFunction]
        """200 while requests are accepted, else 503."""
        with suppress(MinipagedError):
            engine.refuse_if_closed()
            return Response(status_code=200)
        return Response(status_code=503)

    @app.get("/version")
    async def version() -> dict[str, str]:  # pyright: ignore[reportUnusedFunction]
        return {"version": __version__}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        return {"object": "list", "data": [await model(service.name)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.refuse_other_model(name)
        return {
            "id": service.name, "object": "model", "created": service.started,
            "owned_by": "minipaged", "root": str(service.llm.folder), "parent": None,
            "max_model_len": config.max_model_len,
        }  # fmt: skip

    @app.get("/metrics")
    def metrics() -> Response:  # pyright: ignore[reportUnusedFunction]
        """In Prometheus's text format."""
        return Response(service.metrics.render(), media_type=service.metrics.content_type)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """The tokens of a text, or of the prompt of a chat."""
        service.refuse_other_model(body.model)

        def encode() -> list[int]:
            if body.messages is not None:
                return service.chat_prompt(body)["prompt_token_ids"]
            if body.prompt is None:
                raise InvalidRequest("there is no text: give prompt or messages.")
            adds = body.add_special_tokens is not False
            return service.tokenizer.encode(body.prompt, add_special_tokens=adds)

        tokens = await engine.in_a_text_thread(encode)
        return {"count": len(tokens), "max_model_len": config.max_model_len, "tokens": tokens}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """The text of tokens."""
        service.refuse_other_model(body.model)
        decode = partial(service.tokenizer.decode, body.tokens)
        return {"prompt": await engine.in_a_text_thread(decode)}
