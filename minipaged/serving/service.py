"""The endpoints: from the checked body of a request to its response."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse, StreamingResponse

from minipaged import __version__
from minipaged.engine.arrivals import CheckedRequest, check_request
from minipaged.errors import InvalidRequest, MissingTokenizer
from minipaged.llm import LLM
from minipaged.serving import errors
from minipaged.serving.async_engine import AsyncEngine
from minipaged.serving.metrics import Metrics
from minipaged.serving.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
)
from minipaged.serving.replies import Reply
from minipaged.serving.reply_forms import ChatReply, CompletionReply
from minipaged.serving.settings import ServerArgs
from minipaged.serving.streams import ClientLeft, Stream
from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.chat_prompt import chat_prompt
from minipaged.utils.options import shown

PIECE_BYTES = 2**18
EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Service:
    """One method per endpoint, over the model and the engine that serves it."""

    def __init__(self, llm: LLM, engine: AsyncEngine, args: ServerArgs, metrics: Metrics) -> None:
        self._llm, self._engine, self._args, self._metrics = llm, engine, args, metrics
        self._name = args.served_model_name or str(llm.args.model)
        self._max_model_len = llm.engine.config.max_model_len
        self._started = int(time.time())
        self._sampling_defaults = llm.args.read_sampling_defaults(llm.folders)

    async def models(self) -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [await self.model(self._name)]}

    async def model(self, name: str) -> dict[str, Any]:
        """The model with this name. Raises UnknownModel for any other name."""
        self._refuse_other_model(name)
        return {
            "id": self._name, "object": "model", "created": self._started,
            "owned_by": "minipaged", "root": str(self._llm.folder), "parent": None,
            "max_model_len": self._max_model_len,
        }  # fmt: skip

    async def health(self) -> Response:
        """Status 200 while requests are accepted, otherwise 503."""
        self._engine.refuse_if_closed()
        return Response()

    async def version(self) -> dict[str, str]:
        """The library's version."""
        return {"version": __version__}

    def metrics(self) -> Response:
        """The metrics in Prometheus's text format."""
        return Response(self._metrics.render(), media_type=self._metrics.content_type)

    # ---- text and tokens -------------------------------------------------------------------------

    async def tokenize(self, body: TokenizeBody) -> Response:
        """The tokens of a text, or of the prompt of a chat."""
        self._refuse_other_model(body.model)

        def encode() -> Response:
            if body.messages is not None:
                tokens = self._chat_prompt(body)["prompt_token_ids"]
            elif body.prompt is not None:
                adds = body.add_special_tokens is not False
                tokens = self._tokenizer.encode(body.prompt, add_special_tokens=adds)
            else:
                raise InvalidRequest("there is no text: give prompt or messages.")
            most = self._max_model_len
            return JSONResponse({"count": len(tokens), "max_model_len": most, "tokens": tokens})

        return await self._engine.in_a_text_thread(encode)

    async def detokenize(self, body: DetokenizeBody) -> dict[str, Any]:
        """The text of tokens."""
        self._refuse_other_model(body.model)

        def decode() -> str:
            known = self._tokenizer.vocabulary
            unknown = next((each for each in body.tokens if each not in known), None)
            if unknown is not None:
                raise InvalidRequest(
                    f"tokens contains {shown(unknown)}, which is not a token id of the model: "
                    "correct it."
                )
            return self._tokenizer.decode(body.tokens)

        return {"prompt": await self._engine.in_a_text_thread(decode)}

    @property
    def _tokenizer(self) -> Tokenizer:
        if self._llm.engine.tokenizer is None:
            raise MissingTokenizer("the model has no tokenizer, so it reads token ids only.")
        return self._llm.engine.tokenizer

    def _refuse_other_model(self, name: str | None) -> None:
        if name is not None and name != self._name:
            raise errors.UnknownModel(
                f"the model {name[:100]!r} is not served here: the name is {self._name!r}."
            )

    # ---- from a body to its prompts --------------------------------------------------------------

    async def completions(self, body: CompletionBody) -> Response:
        """Complete one prompt or several."""
        read = partial(self._completion_prompt, body)
        return await self._answer(body, CompletionReply, read, body.prompts)

    async def chat_completions(self, body: ChatBody) -> Response:
        """Generate the next turn of a conversation."""
        return await self._answer(body, ChatReply, self._chat_prompt, [body])

    def _completion_prompt(self, body: CompletionBody, prompt: Any) -> dict[str, Any]:
        if not isinstance(prompt, str):
            return {"prompt_token_ids": prompt}
        if body.add_special_tokens is not False:
            return {"prompt": prompt}
        ids = self._tokenizer.encode(prompt, add_special_tokens=False)
        return {"prompt": prompt, "prompt_token_ids": ids}

    def _chat_prompt(self, body: ChatBody | TokenizeBody) -> dict[str, Any]:
        """The messages as a prompt. Raises what `tokenizer.chat_prompt` raises."""
        continues, opens = bool(body.continue_final_message), body.add_generation_prompt
        messages: Any = body.messages  # `read_chat` checks each of them
        prompt: Any = chat_prompt(
            self._llm.folders.tokenizer,
            self._tokenizer,
            messages,
            self._max_model_len,
            chat_template=self._template(body),
            add_generation_prompt=not continues if opens is None else opens,
            continue_final_message=continues,
            tools=body.tools,
            chat_template_kwargs=body.chat_template_kwargs,
        )
        return prompt

    def _template(self, body: ChatBody | TokenizeBody) -> str | None:
        given = body.chat_template if isinstance(body, ChatBody) else None
        if given is not None and not self._args.trust_request_chat_template:
            raise InvalidRequest(
                "chat_template is a program, and this server does not run programs of clients: "
                "leave it out, or start the server with trust_request_chat_template."
            )
        return self._llm.args.read_chat_template() if given is None else given

    # ---- from prompts to a response --------------------------------------------------------------

    async def _answer(
        self,
        body: GenerationBody,
        kind: type[Reply[Any]],
        read: Callable[[Any], dict[str, Any]],
        prompts: list[Any],
    ) -> Response:
        """Serve the prompts of a body, which `read` converts in a thread for texts."""

        def check() -> list[CheckedRequest]:
            params, engine = body.params(self._sampling_defaults), self._llm.engine
            limits = engine.traits, engine.config.max_logprobs
            salt = {"cache_salt": body.cache_salt}
            return [check_request({**read(each), **salt}, params, *limits) for each in prompts]

        self._refuse_other_model(body.model)
        request_id = body.request_id or uuid.uuid4().hex
        reply = kind(request_id, self._name, body, self._llm.engine.tokenizer)
        arrival = time.monotonic()
        stream = await self._engine.serve(check, body.width * len(prompts))
        if self._args.request_timeout is not None:
            stream.fail_after(self._args.request_timeout, time.monotonic() - arrival)
        return Answer(reply, stream)


async def pieces(body: bytes) -> AsyncIterator[bytes]:
    """A large reply in pieces, so that sending it does not block the event loop."""
    for start in range(0, len(body), PIECE_BYTES):
        yield body[start : start + PIECE_BYTES]


class Answer(Response):
    """A reply, whole or as server-sent events. It always closes its stream."""

    def __init__(self, reply: Reply[Any], stream: Stream) -> None:
        super().__init__()
        self._reply, self._stream = reply, stream

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the reply. If the client leaves, abort the requests that have not finished."""
        watcher = asyncio.create_task(self._watch(receive))
        try:
            if self._reply.body.stream:
                await self._stream.accepted()
                events = self._reply.events(self._stream)
                response = StreamingResponse(events, 200, EVENT_HEADERS, "text/event-stream")
                await response.stream_response(send)
            else:
                body = await self._reply.whole(self._stream)
                headers = {"Content-Length": str(len(body))}
                response = StreamingResponse(pieces(body), 200, headers, "application/json")
                await response.stream_response(send)
        except ClientLeft:
            pass  # no one is left to be told, and it is no fault: the metrics count an abort
        finally:
            watcher.cancel()
            self._stream.close()

    async def _watch(self, receive: Any) -> None:
        """Fail the stream when the client leaves; Starlette does not cancel the handler then."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._stream.fail(ClientLeft())
