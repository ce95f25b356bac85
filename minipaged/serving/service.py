"""One HTTP request, from its checked body to its response."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from minipaged.engine.arrivals import CheckedRequest, check_request
from minipaged.errors import InvalidRequest, MissingTokenizer
from minipaged.llm import LLM
from minipaged.sampling import Params
from minipaged.serving import errors
from minipaged.serving.async_engine import AsyncEngine
from minipaged.serving.chat_reply import ChatReply
from minipaged.serving.completion_reply import CompletionReply
from minipaged.serving.protocol import ChatBody, CompletionBody, GenerationBody, TokenizeBody
from minipaged.serving.replies import Reply
from minipaged.serving.settings import ServerArgs
from minipaged.serving.streams import ClientLeft, Stream
from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.chat_prompt import chat_prompt
from minipaged.tokenizer.prompts import Prompt
from minipaged.utils.options import shown


class Service:
    """The model, the engine that serves it, and the server's options."""

    def __init__(self, llm: LLM, engine: AsyncEngine, args: ServerArgs) -> None:
        self.llm, self.engine, self.args = llm, engine, args
        self.name = args.served_model_name or str(llm.args.model)
        self.max_model_len = llm.engine.config.max_model_len
        self.started = int(time.time())
        self._sampling_defaults = llm.args.read_sampling_defaults(llm.folders)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises MissingTokenizer."""
        if self.llm.engine.tokenizer is None:
            raise MissingTokenizer("the model has no tokenizer, so it reads token ids only.")
        return self.llm.engine.tokenizer

    def refuse_other_model(self, name: str | None) -> None:
        """Raises UnknownModel."""
        if name is not None and name != self.name:
            raise errors.UnknownModel(
                f"the model {name[:100]!r} is not served here: the name is {self.name!r}."
            )

    def decode(self, token_ids: list[int]) -> str:
        """The text of tokens. Raises InvalidRequest for an id that no token has."""
        known = self.tokenizer.vocabulary
        for token_id in token_ids:
            if token_id not in known:
                raise InvalidRequest(
                    f"tokens has {shown(token_id)}, which no token of the model has."
                )
        return self.tokenizer.decode(token_ids)

    # ---- from a body to checked requests, in a thread for texts --------------------------------

    async def complete(self, http: Request, body: CompletionBody) -> Response:
        """Continue one prompt or several."""

        def check() -> list[CheckedRequest]:
            params = body.params(self._sampling_defaults)
            prompts = (self._completion_prompt(body, each) for each in body.prompts)
            return [self._check(prompt, params) for prompt in prompts]

        return await self._answer(http, body, CompletionReply, check, len(body.prompts))

    async def chat(self, http: Request, body: ChatBody) -> Response:
        """Write the next turn of a conversation."""

        def check() -> list[CheckedRequest]:
            params = body.params(self._sampling_defaults)
            return [self._check({**self.chat_prompt(body), "cache_salt": body.cache_salt}, params)]

        return await self._answer(http, body, ChatReply, check, 1)

    def _check(self, prompt: Prompt, params: Params) -> CheckedRequest:
        engine = self.llm.engine
        return check_request(prompt, params, engine.traits, engine.config.max_logprobs)

    def _completion_prompt(self, body: CompletionBody, prompt: Prompt) -> Prompt:
        form: dict[str, Any] = {"cache_salt": body.cache_salt}
        if not isinstance(prompt, str):
            return {"prompt_token_ids": prompt, **form}
        if body.add_special_tokens is False:
            form["prompt_token_ids"] = self.tokenizer.encode(prompt, add_special_tokens=False)
        return {"prompt": prompt, **form}

    def chat_prompt(self, body: ChatBody | TokenizeBody) -> dict[str, Any]:
        """The messages as a prompt. Raises what `tokenizer.chat_prompt` raises."""
        continues, opens = bool(body.continue_final_message), body.add_generation_prompt
        messages: Any = body.messages  # `read_chat` checks each of them
        prompt: Any = chat_prompt(
            self.llm.folders.tokenizer,
            self.tokenizer,
            messages,
            self.max_model_len,
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

    # ---- from checked requests to a response ---------------------------------------------------

    async def _answer(
        self,
        http: Request,
        body: GenerationBody,
        kind: Callable[..., Reply[Any]],
        check: Callable[[], list[CheckedRequest]],
        num_prompts: int,
    ) -> Response:
        """Serve the prompts of a body until they have finished, or until the client has left."""
        self.refuse_other_model(body.model)
        reply = kind(
            body.request_id or uuid.uuid4().hex, self.name, body, self.llm.engine.tokenizer
        )
        arrival = time.monotonic()
        stream = await self.engine.serve(check, body.width * num_prompts)
        if self.args.request_timeout is not None:
            stream.fail_after(self.args.request_timeout, time.monotonic() - arrival)
        watcher = asyncio.create_task(_watch(http, stream))
        is_handed_over = False
        try:
            if body.stream:
                await stream.accepted()
                is_handed_over = True
                return EventStream(reply.events(stream), stream, watcher)
            return JSONResponse(await reply.whole(stream))
        except ClientLeft:
            return Response(status_code=499)  # nginx's code, for its log: the client has left
        finally:
            if not is_handed_over:
                watcher.cancel()
                stream.close()


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
