"""One HTTP request, from its checked body to its response."""

import asyncio
import time
import uuid
from collections.abc import Iterator
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse, StreamingResponse

from minipaged.engine.arrivals import CheckedRequest, check_request
from minipaged.errors import InvalidRequest, MissingTokenizer
from minipaged.llm import LLM
from minipaged.serving import errors
from minipaged.serving.async_engine import AsyncEngine
from minipaged.serving.protocol import ChatBody, CompletionBody, GenerationBody, TokenizeBody
from minipaged.serving.replies import Reply
from minipaged.serving.reply_forms import ChatReply, CompletionReply
from minipaged.serving.settings import ServerArgs
from minipaged.serving.streams import ClientLeft, Stream
from minipaged.tokenizer.base import Tokenizer
from minipaged.tokenizer.chat_prompt import chat_prompt
from minipaged.utils.options import shown

EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


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

    def encode(self, body: TokenizeBody) -> list[int]:
        """The tokens of a text or of a chat. Raises InvalidRequest if there is neither."""
        if body.messages is not None:
            return self.chat_prompt(body)["prompt_token_ids"]
        if body.prompt is None:
            raise InvalidRequest("there is no text: give prompt or messages.")
        adds = body.add_special_tokens is not False
        return self.tokenizer.encode(body.prompt, add_special_tokens=adds)

    # ---- from a body to its prompts ------------------------------------------------------------

    async def completions(self, body: CompletionBody) -> Response:
        """Continue one prompt or several."""
        prompts = (self._completion_prompt(body, each) for each in body.prompts)
        return await self._answer(body, CompletionReply, prompts, len(body.prompts))

    async def chat_completions(self, body: ChatBody) -> Response:
        """Write the next turn of a conversation."""
        return await self._answer(body, ChatReply, map(self.chat_prompt, [body]), 1)

    def _completion_prompt(self, body: CompletionBody, prompt: Any) -> dict[str, Any]:
        if not isinstance(prompt, str):
            return {"prompt_token_ids": prompt}
        if body.add_special_tokens is not False:
            return {"prompt": prompt}
        ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        return {"prompt": prompt, "prompt_token_ids": ids}

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

    # ---- from prompts to a response ------------------------------------------------------------

    async def _answer(
        self,
        body: GenerationBody,
        kind: type[Reply[Any]],
        prompts: Iterator[dict[str, Any]],
        num_prompts: int,
    ) -> Response:
        """Serve the prompts of a body; they are read, one by one, in a thread for texts."""

        def check() -> list[CheckedRequest]:
            params, engine = body.params(self._sampling_defaults), self.llm.engine
            limits = engine.traits, engine.config.max_logprobs
            salt = {"cache_salt": body.cache_salt}
            return [check_request({**prompt, **salt}, params, *limits) for prompt in prompts]

        self.refuse_other_model(body.model)
        request_id = body.request_id or uuid.uuid4().hex
        reply = kind(request_id, self.name, body, self.llm.engine.tokenizer)
        arrival = time.monotonic()
        stream = await self.engine.serve(check, body.width * num_prompts)
        if self.args.request_timeout is not None:
            stream.fail_after(self.args.request_timeout, time.monotonic() - arrival)
        return Answer(reply, stream)


class Answer(Response):
    """A reply, whole or as server-sent events; its stream is closed in any case."""

    def __init__(self, reply: Reply[Any], stream: Stream) -> None:
        super().__init__()
        self._reply, self._stream = reply, stream

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send all of it, unless the client leaves; what has not finished then is aborted."""
        watcher = asyncio.create_task(self._watch(receive))
        try:
            if self._reply.body.stream:
                await self._stream.accepted()
                events = self._reply.events(self._stream)
                response = StreamingResponse(events, 200, EVENT_HEADERS, "text/event-stream")
                await response.stream_response(send)
            else:
                await JSONResponse(await self._reply.whole(self._stream))(scope, receive, send)
        except ClientLeft:
            pass
        finally:
            watcher.cancel()
            self._stream.close()

    async def _watch(self, receive: Any) -> None:
        """Fail the stream when the client leaves: Starlette does not cancel a handler for it."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._stream.fail(ClientLeft())
